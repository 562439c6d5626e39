"""Nsight Compute's counters of the hot kernels, as text: pipes, memory, occupancy, stalls, of one launch of each pass.

    python -m bench.gpu.counters cuda       what is profiled: the passes of a backend, each once, between two marks

Reads counters and sets nothing; where the driver keeps them to administrators, the record says so.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from bench.gpu.passes import BACKENDS_BESIDE, CASES, PASSES, kernels_on, tile_of
from bench.gpu.processes import CUDA_BIN, TAIL, finish, log_file, start
from bench.gpu.settings import Settings
from bench.pass_case import PassCase
from vmf_kernels.assign import BACKENDS

SECTIONS = (
    "SpeedOfLight",
    "ComputeWorkloadAnalysis",
    "MemoryWorkloadAnalysis",
    "SchedulerStats",
    "WarpStateStats",
    "Occupancy",
    "LaunchStats",
)
NO_PERMISSION = "ERR_NVGPUCTRPERM"


def find_ncu() -> str | None:
    """On PATH, beside the CUDA toolkit, or the newest of those installed on their own."""
    alone = sorted(Path("/opt/nvidia/nsight-compute").glob("*"), reverse=True)
    return next((hit for path in (None, CUDA_BIN, *alone) if (hit := shutil.which("ncu", path=path))), None)


def run(settings: Settings, seconds: float, skip: tuple[str, ...] = ()) -> dict[str, Any]:
    """Profile the passes of each backend not in ``skip``; the text goes to ``counters-<backend>.txt`` beside the record."""
    if seconds <= 0:
        return {"status": "skipped", "reason": "no time left"}
    ncu = find_ncu()
    if ncu is None:
        return {"status": "not available", "reason": "ncu (Nsight Compute) is neither on PATH nor installed with CUDA"}
    # the library's own kernels first: they are what there is to find out about
    names = [name for name in reversed(BACKENDS_BESIDE) if name in BACKENDS and name not in skip]
    outcomes = {name: profile(ncu, name, settings, seconds / len(names)) for name in names}
    worst = next((outcome for outcome in outcomes.values() if outcome["status"] != "ok"), {"status": "ok"})
    return worst | {"backends": outcomes}


def profile(ncu: str, backend: str, settings: Settings, seconds: float) -> dict[str, Any]:
    """How profiling one backend ended."""
    path = settings.out / f"counters-{backend}.txt"
    path.unlink(missing_ok=True)
    command = [ncu, "--profile-from-start", "off", "--target-processes", "all", "--print-details", "all"]
    command += ["--clock-control", "none"]  # its default sets the clocks
    command += [word for section in SECTIONS for word in ("--section", section)]
    with log_file(settings, f"counters {backend}") as log:
        ended = finish(start([*command, sys.executable, "-m", "bench.gpu.counters", backend], log), log, seconds)
    outcome = judged(ended.status(), ended.output)
    if outcome["status"] == "ok":
        path.write_text(ended.output)
        outcome["text"] = path.name
    return outcome


def judged(status: dict[str, Any], output: str) -> dict[str, Any]:
    """The status, and what kind of failure it is: ncu ends well when it was not allowed to count."""
    if NO_PERMISSION in output:
        return {"status": "not permitted", "reason": f"{NO_PERMISSION}: the driver keeps counters to administrators"}
    if status["status"] == "ok" and "No kernels were profiled" in output:
        return {"status": "failed", "reason": output[-TAIL:]}
    return status


def launch_each(backend: str) -> None:
    """Every pass once to compile and warm up, and once more between the profiler's marks.

    Raises:
        RuntimeError: the backend does not run here.
    """
    case, device = CASES[0], torch.device("cuda")
    found, reasons = kernels_on(case, device)
    if backend not in found:
        raise RuntimeError(f"backend {backend!r} cannot run here: {reasons[backend]}")
    inputs = [PassCase.of(name, "16-bit", case.width, device=device, dtype=case.dtype) for name in PASSES]

    def launch() -> None:
        for each in inputs:
            each.run(tile_of(each, found[backend]), found[backend])

    launch()
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStart()  # type: ignore[no-untyped-call]
    launch()
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStop()  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    launch_each(sys.argv[1])
