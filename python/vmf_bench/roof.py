"""The least time of a step: its products at the rate of torch.mm, its exponentials, and its bytes.

Legend: S / T student / teacher rows, K prototypes, D embedding dim.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from vmf_bench.inputs import HeadShape
from vmf_bench.timing import Stopwatch

SMALLEST_MM = 256  # sides of the square product, doubled until one takes long enough to be timed
LARGEST_MM = {"cpu": 2048, "cuda": 8192}
LONG_ENOUGH = {"cpu": 0.05, "cuda": 0.002}  # seconds
EXPONENTIALS = {"cpu": 2**20, "cuda": 2**26}  # on a CPU they stay in the cache, as the logits of a chunk do
COPIED_BYTES = {"cpu": 2**28, "cuda": 2**31}  # beyond any cache
REPEATS = 5


@dataclass(frozen=True)
class Rates:
    """What a device does a second, measured in this run."""

    mm_size: int  # side of the square product that gave ``operations``
    operations: float  # multiplications and additions of torch.mm, in the dtype of the features
    exponentials: float  # of torch.exp in fp32
    bytes: float  # read and written by a copy


@dataclass(frozen=True)
class Roof:
    """Work that no implementation of the step avoids on a device, and the least seconds that it takes."""

    operations: int
    exponentials: int
    bytes: int
    seconds: float
    parts: dict[str, float]  # seconds of each by itself


def operations_of(shape: HeadShape, device: str) -> int:
    """(6 S + 2 T) K D on a CPU: logits of both, gradients of rows and prototypes; pairs are folded before the products.

    8 (S + T) K D on a GPU, whose column pass computes the logits again, because keeping them would cost more.
    """
    students, teachers = shape.student_rows, shape.teacher_rows
    rows = 8 * (students + teachers) if device == "cuda" else 6 * students + 2 * teachers
    return rows * shape.prototypes * shape.dim


def roof_of(shape: HeadShape, dtype: torch.dtype, device: str, rates: Rates) -> Roof:
    """The roof of a step: fp32 prototypes are read twice and their gradient is written; each logit has one exponential.

    On a CPU products and exponentials share the vector units, so their times add up; a GPU has separate units, and the longest
    of the three decides. Above the roof is possible: torch.mm and torch.exp are good, not perfect.
    """
    logits = (shape.student_rows + shape.teacher_rows) * shape.prototypes
    rows = (2 * shape.student_rows + shape.teacher_rows) * shape.dim * dtype.itemsize
    moved = 3 * shape.prototypes * shape.dim * torch.float32.itemsize + rows
    operations = operations_of(shape, device)
    parts = {
        "products": operations / rates.operations,
        "exponentials": logits / rates.exponentials,
        "bytes": moved / rates.bytes,
    }
    compute = [parts["products"], parts["exponentials"]]
    seconds = max(sum(compute) if device == "cpu" else max(compute), parts["bytes"])
    return Roof(operations, logits, moved, seconds, parts)


def measured_rates(dtype: torch.dtype, device: torch.device) -> Rates:
    """Rates now; the products are timed once more in every round."""
    stopwatch, kind = Stopwatch(device), device.type
    size, seconds = _mm_size(dtype, device, stopwatch)
    logits = torch.randn(EXPONENTIALS[kind], device=device)
    results = torch.empty_like(logits)
    source = torch.empty(COPIED_BYTES[kind] // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return Rates(
        mm_size=size,
        operations=2 * size**3 / seconds,
        exponentials=logits.numel() / _least_seconds(lambda: torch.exp(logits, out=results), stopwatch),
        bytes=COPIED_BYTES[kind] / _least_seconds(lambda: target.copy_(source), stopwatch),
    )


def square_product(size: int, dtype: torch.dtype, device: torch.device) -> Callable[[], object]:
    """A call of torch.mm on random squares."""
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return lambda: torch.mm(left, right)


def _mm_size(dtype: torch.dtype, device: torch.device, stopwatch: Stopwatch) -> tuple[int, float]:
    """The first size that takes long enough, and its seconds: 16-bit products are slow where a CPU has none."""
    size = SMALLEST_MM
    while True:
        seconds = _least_seconds(square_product(size, dtype, device), stopwatch)
        if seconds >= LONG_ENOUGH[device.type] or size >= LARGEST_MM[device.type]:
            return size, seconds
        size *= 2


def _least_seconds(call: Callable[[], object], stopwatch: Stopwatch) -> float:
    """Of a few runs after one that is not counted."""
    call()
    seconds = []
    for _ in range(REPEATS):
        stopwatch.synchronize()
        start = time.perf_counter()
        call()
        stopwatch.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
