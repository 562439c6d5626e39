"""Nsight Compute's counters for one launch of each pass, as text: pipes, memory, occupancy, stalls.

    python -m bench.gpu.counters cuda       what is profiled: the passes of a backend, each once, between two marks

Reads counters and sets nothing; where the driver keeps them to administrators, the record says so.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from bench.gpu.passes import CASES, PASSES, kernels_on, tile_of
from bench.gpu.processes import CUDA_BIN, TAIL, Running
from bench.gpu.settings import Settings
from bench.pass_case import PassCase

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


def run(settings: Settings, seconds: float, backend: str) -> dict[str, Any]:
    """Profile the passes of one backend; the text goes to ``counters-<backend>.txt`` beside the record."""
    ncu = find_ncu()
    if ncu is None:
        return {"status": "not available", "reason": "ncu (Nsight Compute) is neither on PATH nor installed with CUDA"}
    path = settings.out / f"counters-{backend}.txt"
    path.unlink(missing_ok=True)
    command = [ncu, "--profile-from-start", "off", "--target-processes", "all", "--print-details", "all"]
    command += ["--clock-control", "none"]  # its default sets the clocks
    command += [word for section in SECTIONS for word in ("--section", section)]
    command += [sys.executable, "-m", "bench.gpu.counters", backend]
    ended = Running(command, f"counters {backend}", settings.log).finish(seconds)
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
    """Launch every pass once to compile and warm up, and once more between the profiler's marks.

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
    torch.cuda.cudart().cudaProfilerStart()
    launch()
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStop()


if __name__ == "__main__":
    launch_each(sys.argv[1])
