"""The two ceilings of the device: the rate of memory copies and of cuBLAS's bf16 products."""

from __future__ import annotations

import torch

from bench.gpu.record import Record
from bench.gpu.settings import Settings
from vmf_bench.timing import Stopwatch, interleaved

COPY_BYTES = 2**32
MATMUL_SIZE = 8192
ROUNDS = 20
TOY_COPY_BYTES = 2**20
TOY_MATMUL_SIZE = 128


def run(settings: Settings, record: Record) -> None:
    """Measure both, on random data: zeros let the clocks rise."""
    device = settings.device
    stopwatch = Stopwatch(device)
    size = TOY_MATMUL_SIZE if settings.dry else MATMUL_SIZE
    x, y = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.randn((TOY_COPY_BYTES if settings.dry else COPY_BYTES) // 4, device=device)
    target = torch.empty_like(source)
    steps = {"matmul": lambda: torch.mm(x, y), "copy": lambda: target.copy_(source)}
    for step in steps.values():
        stopwatch.warm_up(step)
    times = interleaved(stopwatch.device_milliseconds, steps, ROUNDS)
    record.put("matmul_ms", value=times["matmul"]._asdict())
    record.put("matmul_size", value=size)
    record.put("matmul_tflops", value=2 * size**3 / times["matmul"].median / 1e9)
    record.put("copy_ms", value=times["copy"]._asdict())
    moved = 2 * source.numel() * source.element_size()  # read once, written once
    record.put("copy_gb_per_s", value=moved / times["copy"].median / 1e6)
