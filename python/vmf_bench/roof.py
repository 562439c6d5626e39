"""The least time of a step: its products at the rate of torch.mm, its exponentials, and its bytes.

Legend: S / T student / teacher rows, K prototypes, D embedding dim.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from vmf_bench.errors import BenchError
from vmf_bench.inputs import HeadShape
from vmf_bench.machine import free_gib
from vmf_bench.timing import Stopwatch

SMALLEST_MM = 256  # sides of the square product, doubled until one takes long enough to be timed
LARGEST_MM = {"cpu": 2048, "cuda": 8192}
LONG_ENOUGH = {"cpu": 0.05, "cuda": 0.002}  # seconds
# on a CPU they stay in the cache, as the logits of a chunk do; on a GPU those that fit its L2 take about as long as a launch
EXPONENTIALS = {"cpu": 2**20, "cuda": 2**26}
# read and written: beyond the L2 of GPUs and the L3 of most CPUs; the largest L3 may hold a part of them
COPIED_BYTES = {"cpu": 2**28, "cuda": 2**31}
TAKEN_SHARE = 0.25  # of the free memory that a tensor may take; three squares or two copies are there at once
LEAST_FREE_GIB = 0.25
REPEATS = 5


@dataclass(frozen=True)
class Rates:
    """What a device does a second, measured in this run."""

    mm_size: int  # side of the square product that gave ``operations``
    operations: float  # multiplications and additions of torch.mm, in the dtype of the features
    exponentials: float  # of torch.exp on an fp32 tensor: on a GPU, where this is larger than L2, memory sets the rate
    bytes: float  # read and written by a copy


@dataclass(frozen=True)
class Roof:
    """Work that no implementation of the step avoids, and the least seconds that it takes on a device."""

    operations: int
    exponentials: int
    bytes: int
    seconds: float
    parts: dict[str, float]  # seconds of each by itself


def operations_of(shape: HeadShape) -> int:
    """(6 S + 2 T) K D on every device: logits of both sides, gradients of student rows and prototypes, each formed once.

    Pairs are folded before the products. What an implementation computes again is not counted: the backends for GPUs form
    logits twice and multiply 8 (S + T) K D, ``HeadShape.flops``, because keeping the logits would cost more.
    """
    return (6 * shape.student_rows + 2 * shape.teacher_rows) * shape.prototypes * shape.dim


def roof_of(shape: HeadShape, dtype: torch.dtype, device: str, rates: Rates) -> Roof:
    """The roof of a step: fp32 prototypes are read twice and their gradient is written; each logit has one exponential.

    On a CPU products and exponentials share the vector units, so their times add up; a GPU has separate units, and the longest
    of the three decides. Above the roof is possible: torch.mm and torch.exp are good, not perfect, and on a GPU torch.exp
    waits for memory, which a loss that keeps its logits on the chip does not.
    """
    logits = (shape.student_rows + shape.teacher_rows) * shape.prototypes
    rows = (2 * shape.student_rows + shape.teacher_rows) * shape.dim * dtype.itemsize
    moved = 3 * shape.prototypes * shape.dim * torch.float32.itemsize + rows
    operations = operations_of(shape)
    parts = {
        "products": operations / rates.operations,
        "exponentials": logits / rates.exponentials,
        "bytes": moved / rates.bytes,
    }
    compute = [parts["products"], parts["exponentials"]]
    seconds = max(sum(compute) if device == "cpu" else max(compute), parts["bytes"])
    return Roof(operations, logits, moved, seconds, parts)


def measured_rates(dtype: torch.dtype, device: torch.device) -> Rates:
    """Rates now; the products are timed once more in every round. Tensors are smaller where little memory is free.

    Raises:
        BenchError: there is too little of it even so.
    """
    free = free_gib(device)
    refusal = f"{free:.2g} GiB of memory are free on {device}; expected {LEAST_FREE_GIB} or more to measure its rates."
    if free < LEAST_FREE_GIB:
        raise BenchError(refusal)
    try:
        return _rates(dtype, device, TAKEN_SHARE * free * 2**30)
    except torch.OutOfMemoryError as error:  # others may have taken it meanwhile
        raise BenchError(refusal) from error


def _rates(dtype: torch.dtype, device: torch.device, most_bytes: float) -> Rates:
    """The rates, from tensors of at most so many bytes."""
    stopwatch = Stopwatch(device)
    size, seconds = _mm_size(dtype, device, stopwatch, most_bytes)
    return Rates(
        mm_size=size,
        operations=2 * size**3 / seconds,
        exponentials=_exponentials(device, stopwatch, most_bytes),
        bytes=_bytes(device, stopwatch, most_bytes),
    )


def _exponentials(device: torch.device, stopwatch: Stopwatch, most_bytes: float) -> float:
    """A second."""
    logits = torch.randn(int(min(EXPONENTIALS[device.type], most_bytes / torch.float32.itemsize)), device=device)
    results = torch.empty_like(logits)
    return logits.numel() / _least_seconds(lambda: torch.exp(logits, out=results), stopwatch)


def _bytes(device: torch.device, stopwatch: Stopwatch, most_bytes: float) -> float:
    """Read and written by a copy, a second."""
    source = torch.empty(int(min(COPIED_BYTES[device.type] / 2, most_bytes)), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / _least_seconds(lambda: target.copy_(source), stopwatch)


def square_product(size: int, dtype: torch.dtype, device: torch.device) -> Callable[[], object]:
    """A call of torch.mm on random squares."""
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return lambda: torch.mm(left, right)


def _mm_size(dtype: torch.dtype, device: torch.device, stopwatch: Stopwatch, most_bytes: float) -> tuple[int, float]:
    """The first size that takes long enough, and its seconds: 16-bit products are slow where a CPU has none."""
    size, largest = SMALLEST_MM, LARGEST_MM[device.type]
    while True:
        seconds = _least_seconds(square_product(size, dtype, device), stopwatch)
        next_bytes = (2 * size) ** 2 * torch.float32.itemsize  # squares are drawn in fp32
        if seconds >= LONG_ENOUGH[device.type] or size >= largest or next_bytes > most_bytes:
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
