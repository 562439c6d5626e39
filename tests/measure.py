"""How the tests measure: relative errors, and what a step allocates."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile


class Allocations(NamedTuple):
    """Bytes of CPU memory taken during a step."""

    largest: int  # one allocation
    peak: int  # live at once


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of ``expected``; infinite where shapes differ or a value is not finite."""
    if actual.shape != expected.shape or not actual.isfinite().all():
        return float("inf")
    difference = (actual.detach().double() - expected.detach().double()).norm()
    return float(difference / expected.detach().double().norm().clamp(min=torch.finfo(torch.float64).tiny))


def worst_error(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> tuple[float, str]:
    """The largest relative error and the quantity it is of.

    Raises:
        AssertionError: the two do not hold the same quantities.
    """
    assert actual.keys() == expected.keys(), f"got {sorted(actual)}, expected {sorted(expected)}"
    return max((relative_error(actual[name], expected[name]), name) for name in expected)


def allocations_of(step: Callable[[], object]) -> Allocations:
    """What ``step`` allocates, from the allocator's own events; the second of two calls is recorded."""
    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        kept = step()
    assert recorded.profiler is not None
    assert recorded.profiler.kineto_results is not None
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    del kept
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    assert events, "the profiler recorded no allocation"
    return Allocations(max(event.nbytes() for event in events), peak)


def return_freed_memory() -> None:
    """Give pages that are free back to the system: what a step then takes is seen in the resident memory of the process.

    A process of many tests has freed much, and would be served from that.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
    if trim is not None:
        trim(0)
