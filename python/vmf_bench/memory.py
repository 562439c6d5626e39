"""Peak memory of a step, from the allocators' own records."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.profiler import ProfilerActivity, profile

from vmf_bench.inputs import HeadInputs

MIB = 2**20


def cpu_peak_extra_mib(step: Callable[[], object], kept_bytes: int) -> float:
    """Largest sum of live allocations during ``step``, in MiB, minus ``kept_bytes`` (the gradients that remain).

    What torch's allocator gives, to whomever; not what a library takes from the system by itself. The step should have run
    before, or what a first call sets up counts as well.
    """
    with _silent_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    results = recorded.profiler.kineto_results if recorded.profiler is not None else None
    assert results is not None, "the profiler kept no events"
    events = [event for event in results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return (peak - kept_bytes) / MIB


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """The profiler writes lines about its own start and stop there, from C++."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def peak_extra_mib(step: Callable[[], object], inputs: HeadInputs) -> float:
    """Peak memory of a step on its device in MiB, beyond what was there before it and the gradients it leaves."""
    inputs.clear_gradients()  # freed in the step, earlier ones might count: the profiler remembers addresses
    if inputs.device.type != "cuda":
        return cpu_peak_extra_mib(step, inputs.gradient_bytes)
    torch.cuda.synchronize(inputs.device)
    torch.cuda.reset_peak_memory_stats(inputs.device)
    before = torch.cuda.memory_allocated(inputs.device)
    step()
    torch.cuda.synchronize(inputs.device)
    peak = torch.cuda.max_memory_allocated(inputs.device)
    inputs.clear_gradients()
    return (peak - before - inputs.gradient_bytes) / MIB
