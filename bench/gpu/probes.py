"""Properties of a step other than its time: kernels, memory, graph capture, repeatability."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from vmf_bench.agreement import outcome_of
from vmf_bench.inputs import HeadInputs
from vmf_bench.peers.peer import Loss
from vmf_bench.timing import Step, training_step

MOST_KERNELS = 30
PROFILED_RUNS = 5
NAME_LENGTH = 100
GRAPH_WARM_UP_RUNS = 3


def forward_step(loss: Loss, inputs: HeadInputs) -> Step:
    """The forward pass of a training step; without a graph a compiled loss would be compiled anew."""

    def step() -> None:
        loss(inputs)

    return step


def kernels(loss: Loss, inputs: HeadInputs) -> dict[str, Any]:
    """Kernels of one forward and one backward pass: how many, and the mean microseconds of each name."""
    device = inputs.student_features.device
    _profiled([training_step(loss, inputs)], device)  # the first profile of a process loses kernels
    values: list[Tensor] = []

    def forward() -> None:
        values.append(loss(inputs))

    def backward() -> None:
        inputs.clear_gradients()  # or adding to the last one's would count as a launch
        values.pop().backward()

    both = {"forward": _profiled([forward] * PROFILED_RUNS, device)}
    both["backward"] = _profiled([backward] * PROFILED_RUNS, device)
    inputs.clear_gradients()
    return both


def _profiled(runs: Sequence[Step], device: torch.device) -> dict[str, Any]:
    """The launches of an average run."""
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as recorded:
        for run in runs:
            run()
        if on_gpu:
            torch.cuda.synchronize(device)
    times: dict[str, list[float]] = {}
    wanted = DeviceType.CUDA if on_gpu else DeviceType.CPU
    for event in recorded.events():
        # ranges that a library annotates appear among the device's events too, but are no launches
        if event.device_type == wanted and not getattr(event, "is_user_annotation", False):
            times.setdefault(event.name[:NAME_LENGTH], []).append(event.time_range.elapsed_us())
    copies = sum(len(t) for name, t in times.items() if name.startswith(("Memcpy", "Memset")))
    slowest = sorted(times.items(), key=lambda item: -sum(item[1]))[:MOST_KERNELS]
    return {
        "launches": (sum(map(len, times.values())) - copies) / len(runs),
        "copies_and_fills_by_driver": copies / len(runs),
        "microseconds": sum(map(sum, times.values())) / len(runs),
        "by_name": [
            {"name": name, "count": len(t) / len(runs), "microseconds": sum(t) / len(runs)} for name, t in slowest
        ],
    }


def is_repeatable(loss: Loss, inputs: HeadInputs) -> bool:
    """Whether two runs agree in every bit of loss and gradients."""
    first, second = (outcome_of(loss, inputs) for _ in range(2))
    return all(torch.equal(first[name], second[name]) for name in first)


def captured(loss: Loss, inputs: HeadInputs) -> tuple[Step, bool]:
    """Replay of the step as a CUDA graph, and whether it gives the eager step's gradients bit for bit."""
    eager = outcome_of(loss, inputs)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(GRAPH_WARM_UP_RUNS):
            training_step(loss, inputs)()
    torch.cuda.current_stream().wait_stream(side)
    inputs.clear_gradients()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss(inputs).backward()
    gradients = {name: leaf.grad for name, leaf in inputs.leaves.items()}
    for gradient in gradients.values():
        assert gradient is not None
        gradient.fill_(float("nan"))  # whatever the replay does not write shows
    graph.replay()
    torch.cuda.synchronize()
    equal = all(torch.equal(eager[name], g) for name, g in gradients.items() if g is not None)
    return graph.replay, equal
