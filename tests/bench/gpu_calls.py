"""Made-up programs for the stages of a call on a GPU."""

from __future__ import annotations

from pathlib import Path

FIRST_LIGHT = """
import argparse, json, pathlib, sys, time
parser = argparse.ArgumentParser()
for name in ("out", "seconds", "kernels", "workers", "module", "only"):
    parser.add_argument(f"--{name}")
parser.add_argument("--dry-run", action="store_true")
options = parser.parse_args()
status, folder = STATUS, pathlib.Path(options.out)
folder.mkdir(exist_ok=True)
folder.joinpath("first_light.txt").write_text(status)
results = {"KERNELS/columns/bf16/256": {"status": status}, "cuda/columns/fp16/64": {"status": "right"}}
folder.joinpath("first_light.json").write_text(json.dumps({"results": results}))
print(f"{options.kernels} {status} {options.module}")
sys.exit({"right": 0, "not reached": 2}.get(status, 1))
"""


def fake_first_light(folder: Path, status: str = "right", kernels: str = "cuda") -> Path:
    """A stand-in for ``bench.first_light``; one of its variants ends with the status."""
    folder.mkdir(exist_ok=True)
    path = folder / "first_light.py"
    path.write_text(FIRST_LIGHT.replace("STATUS", repr(status)).replace("KERNELS", kernels))
    return path
