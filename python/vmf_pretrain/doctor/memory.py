"""Memory that steps take, measured, and how many images fit into what can be had."""

import contextlib
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from vmf_bench.machine import free_gib
from vmf_pretrain.recipes.machine import this_machine

STATUS = Path("/proc/self/status")
RESET = Path("/proc/self/clear_refs")  # "5" lets the kernel forget the peak so far
USABLE = 0.9  # share of the memory at hand: workers, evaluations and the system need some


class PeakMemory:
    """The most memory that was in use since ``reset``: of the GPU by torch, or of this process.

    Args:
        device: where the steps run.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def reset(self) -> None:
        """Forget the peak so far; where a system cannot, a peak counts from the start of the process."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            with contextlib.suppress(OSError):
                RESET.write_text("5")

    def read(self) -> int:
        """Bytes."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        if STATUS.is_file():
            return _status("VmHWM")
        import resource  # not on every system

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak  # elsewhere in KiB


def at_hand(device: torch.device) -> int:
    """Bytes that this process can have, with what it has already."""
    free = free_gib(device) * 2**30
    if device.type == "cuda":
        return int(free + torch.cuda.memory_allocated(device))
    whole = this_machine("cpu").memory
    return int(min(whole, free + (_status("VmRSS") if STATUS.is_file() else 0)))


@dataclass(frozen=True)
class Sized:
    """A step of some images.

    Attributes:
        images: in the step.
        seconds: that it took.
        bytes: the peak of its memory.
    """

    images: int
    seconds: float
    bytes: int


def fitting(smaller: Sized, larger: Sized, memory: int) -> int | None:
    """Images of a step that fit into so many bytes, by the line through two sizes; None if the larger took no more.

    Args:
        smaller: of fewer images than ``larger``.
        larger: nearest to what is asked.
        memory: bytes at hand.
    """
    grown = (larger.bytes - smaller.bytes) / (larger.images - smaller.images)
    if grown <= 0:
        return None
    return max(0, math.floor((USABLE * memory - larger.bytes) / grown) + larger.images)


def _status(name: str) -> int:
    """Bytes of a line of /proc/self/status, which counts in KiB."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return 1024 * int(line.split()[1])
