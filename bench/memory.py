"""Peak memory of a step on the CPU, from the allocator's own events."""

from __future__ import annotations

from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile

MIB = 2**20


def peak_extra_mib(step: Callable[[], object], kept_bytes: int) -> float:
    """Largest sum of live allocations during ``step``, in MiB, minus ``kept_bytes`` (the gradients that remain)."""
    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return (peak - kept_bytes) / MIB
