"""The rates of a GPU that ``bench.roofline`` uses."""

from __future__ import annotations

from typing import NamedTuple

from vmf_kernels.backends.triton.launch import Target


class Rates(NamedTuple):
    """One GPU. Only ``copies`` and the clock differ in what vendors state; the others are assumptions shared by both parts."""

    name: str
    copies: float  # bytes/s of a device-to-device copy, read and written
    products: float = 790e12  # FLOP/s: what cuBLAS reaches in bf16 on random data; the peak is 989e12. Assumed of both
    l2: float = 5.5e12  # bytes/s: an assumption, from public measurements of the same generation
    clock: float = 1.755e9  # assumed to hold; under load a part may run slower
    launch: float = 2e-6  # seconds from one kernel to the next on the device, at least
    target: Target = Target(90, 132)

    @property
    def exponentials(self) -> float:
        """Exponentials per second on the special-function units: 16 per clock and multiprocessor."""
        return 16 * self.target.multiprocessors * self.clock

    @property
    def instructions(self) -> float:
        """Warp instructions per second: four schedulers per multiprocessor, one instruction each per clock."""
        return 4 * self.target.multiprocessors * self.clock

    @property
    def shared_memory(self) -> float:
        """Bytes/s that products read and copies write: 128 per clock and multiprocessor."""
        return 128 * self.target.multiprocessors * self.clock


H200 = Rates("H200", copies=4.3e12)
H100 = Rates("H100 80 GB SXM", copies=3.0e12)
GPUS = (H200, H100)
