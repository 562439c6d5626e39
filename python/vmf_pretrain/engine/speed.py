"""How fast a run goes and what it takes: images a second, the share of the time that is waiting for data, and memory."""

import sys
import time

import torch

from vmf_pretrain.data.batch import Batch
from vmf_pretrain.data.waiting import Waiting

GIB = 2**30
MACOS = "darwin"


class Speed:
    """Measures from one logged step to the next.

    Args:
        waiting: the batches, timed.
        images: of a step, on all ranks.
        step: that the run begins or goes on with.
        device: of this rank.
    """

    def __init__(self, waiting: Waiting[Batch], images: int, step: int, device: torch.device) -> None:
        self._waiting, self._images, self._device = waiting, images, device
        self._first = True  # the first stretch starts workers, which is no sign of what comes
        self._measured: dict[int, dict[str, float]] = {}
        self.restart(step)

    def restart(self, step: int) -> None:
        """Measure from here: what came before was no training."""
        self._step, self._then = step, time.perf_counter()
        self._waiting.restart()

    def measure(self, step: int) -> str | None:
        """Keep the figures since the last logged step; returns what to do if too much of the time is waiting, else None."""
        rate = (step - self._step) * self._images / max(time.perf_counter() - self._then, 1e-9)
        wait, advice = self._waiting.share, None if self._first else self._waiting.advice
        self._measured[step] = {"images_per_second": round(rate, 2), "data_wait": round(wait, 4)}
        self._measured[step] |= {"memory_gib": round(taken, 3)} if (taken := memory(self._device)) else {}
        self._first = False
        self.restart(step)
        return advice

    def of(self, step: int) -> dict[str, float]:
        """The figures that were kept for a step."""
        return self._measured.pop(step, {})


def memory(device: torch.device) -> float:
    """The most memory that this process has had so far, GiB: of the GPU, or else of the machine; 0 where nothing says it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    try:
        import resource  # not on Windows
    except ModuleNotFoundError:
        return 0.0
    unit = 1 if sys.platform == MACOS else 1024  # bytes; Linux counts in KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB
