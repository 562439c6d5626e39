"""Made-up programs for the stages of a call on a GPU."""

from __future__ import annotations

from pathlib import Path

FIRST_LIGHT = """
import argparse, json, pathlib, sys, time
parser = argparse.ArgumentParser()
for name in ("out", "seconds", "kernels", "workers", "module"):
    parser.add_argument(f"--{name}")
parser.add_argument("--dry-run", action="store_true")
options = parser.parse_args()
status = STATUS
pathlib.Path(options.out, "first_light.txt").write_text(status)
variants = {"rows keys 256 bf16": {"status": status, "width": 256}, "columns 64 fp16": {"status": "ok", "width": 64}}
pathlib.Path(options.out, "first_light.json").write_text(json.dumps({"variants": variants}))
print("all right" if status == "ok" else f"{options.kernels} {status} {options.module}")
sys.exit(status != "ok")
"""


def fake_first_light(folder: Path, status: str = "ok") -> Path:
    """A stand-in for ``bench.first_light``; one of its variants ends with the status."""
    folder.mkdir(exist_ok=True)
    path = folder / "first_light.py"
    path.write_text(FIRST_LIGHT.replace("STATUS", repr(status)))
    return path
