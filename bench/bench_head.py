"""The last layer and the loss: one training step, forward and backward, in fp32 unless named, on a CPU.

    pytest bench/bench_head.py --benchmark-enable --benchmark-json=bench/results/cpu/head.json

Each round of a benchmark is preceded by one step of each of its rivals, so that all meet the same clock and the same
neighbours. Rivals of the loss are the published one, eager; the same with one log-softmax a row, as a careful user writes it;
and the published one under ``torch.compile``. ``extra_info`` holds the rivals' times and the peak extra memory of all. For the
native backend it also has the rate of its products, counted as 8 (S + T) K D, over that of torch.mm in the same rounds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.workloads import Inputs, Workload
from tests.fuzz.statements.dino import PublishedDINOLoss
from vmf_bench.memory import cpu_peak_extra_mib
from vmf_bench.published import TEACHER_CROPS
from vmf_kernels import DINOLoss, DINOvMFLoss, multi_crop_weights
from vmf_kernels.backends.choice import BACKENDS
from vmf_kernels.backends.native.module import has_bf16_products

Step = Callable[[], object]
ROUNDS = 15
SCHEDULE = (0.04, 0.04, 0, 1)  # teacher temperature 0.04 throughout
MM_SIZE = 4096


def test_rivals_compute_the_same_loss(workload: Workload) -> None:
    inputs, values = Inputs.of(workload), []
    losses = PublishedDINOLoss, OneSoftmaxDINOLoss, DINOLoss
    for kind, layers in zip(losses, (*[inputs.published_layers] * 2, inputs.layers), strict=True):
        loss = kind(workload.prototypes, workload.crops, *SCHEDULE)
        inputs.clear_gradients()
        value = loss(layers[0](inputs.student_features), layers[1](inputs.teacher_features), 0)
        value.backward()
        values.append([value.detach(), inputs.student_features.grad, layers[0].weight_v.grad, loss.center])
    for published, one, ours in zip(*values, strict=True):
        torch.testing.assert_close(one, published, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(ours, published, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("backend", ["native", "streaming"])
def test_loss(benchmark: Any, workload: Workload, backend: str, dtype: str) -> None:
    if dtype == "bf16" and backend == "streaming":
        pytest.skip("plain torch multiplies in fp32")
    skip_without(backend)
    if dtype == "bf16" and benchmark.enabled and not has_bf16_products():
        pytest.skip("without instructions for bf16, a round of the rivals takes minutes here")
    inputs = Inputs.of(workload)
    rivals = rivals_of(inputs, workload, benchmark.enabled, dtype)
    loss = DINOLoss(workload.prototypes, workload.crops, *SCHEDULE, backend=backend)
    ours = training_step(inputs, inputs.layers, loss, dtype)
    compare(benchmark, ours, rivals, workload.flops if backend == "native" else None, dtype)
    steps = {"ours": ours, **rivals}
    memory = {name: round(cpu_peak_extra_mib(step, inputs.gradient_bytes), 1) for name, step in steps.items()}
    benchmark.extra_info["extra_mib"] = memory


@pytest.mark.parametrize("centering", ["logit", "probability", "sinkhorn_knopp"])
def test_vmf(benchmark: Any, workload: Workload, centering: str) -> None:
    inputs = Inputs.of(workload)
    plain = training_step(inputs, inputs.layers, DINOLoss(workload.prototypes, workload.crops, *SCHEDULE))
    loss = DINOvMFLoss(workload.prototypes, workload.crops, *SCHEDULE, centering=centering)
    compare(benchmark, training_step(inputs, inputs.layers, loss), {"plain DINO": plain})


def test_stored_logits(benchmark: Any, workload: Workload) -> None:
    inputs = Inputs.of(workload)
    dense = training_step(inputs, inputs.published_layers, DINOLoss(workload.prototypes, workload.crops, *SCHEDULE))
    compare(benchmark, dense, rivals_of(inputs, workload, benchmark.enabled))


class OneSoftmaxDINOLoss(PublishedDINOLoss):
    """The published loss as a careful user writes it: one log-softmax a row, summed over the views that a target meets."""

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, epoch: int) -> Tensor:
        """As ``PublishedDINOLoss.forward``."""
        targets = ((teacher_logits.detach() - self.center) / self.teacher_temps[epoch]).softmax(dim=-1)
        q_GBK = targets.view(TEACHER_CROPS, -1, targets.shape[-1])
        log_p_VX = (student_logits / self.student_temp).log_softmax(dim=-1).view(self.ncrops, -1)
        pairs_GV = multi_crop_weights(TEACHER_CROPS, self.ncrops)
        met_GBK = (pairs_GV.to(log_p_VX.dtype) @ log_p_VX).view_as(q_GBK)
        self.move_center(teacher_logits.detach().mean(dim=0, keepdim=True))
        return -(q_GBK * met_GBK).sum() / q_GBK.shape[1]


def rivals_of(inputs: Inputs, workload: Workload, timed: bool, dtype: str = "fp32") -> dict[str, Step]:
    """Steps of the losses to compare with; that which is compiled only where times are taken, for compiling takes a minute."""
    arguments = (workload.prototypes, workload.crops, *SCHEDULE)
    losses: dict[str, nn.Module] = {
        "published": PublishedDINOLoss(*arguments),
        "one log-softmax": OneSoftmaxDINOLoss(*arguments),
    }
    if timed:
        torch.compiler.reset()
        losses["published, compiled"] = torch.compile(PublishedDINOLoss(*arguments))  # type: ignore[assignment]
    return {name: training_step(inputs, inputs.published_layers, loss, dtype) for name, loss in losses.items()}


def skip_without(backend: str) -> None:
    """Skip if this installation has no such backend."""
    reason = BACKENDS[backend].unsupported(torch.empty(1, 2), torch.empty(1, 2))
    if reason is not None:
        pytest.skip(reason)


def training_step(inputs: Inputs, layers: tuple[nn.Module, nn.Module], loss: nn.Module, dtype: str = "fp32") -> Step:
    """The last layer of both networks on the features, the loss, and the gradients; bf16 is what autocast makes of that."""
    student, teacher = layers

    def step() -> None:
        inputs.clear_gradients()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
            value = loss(student(inputs.student_features), teacher(inputs.teacher_features), 0)
        value.backward()

    return step


def compare(
    benchmark: Any, step: Step, rivals: Mapping[str, Step], flops: int | None = None, dtype: str = "fp32"
) -> None:
    """Time ``step``, each round right after one of each rival and, where its ``flops`` are given, one of torch.mm."""
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    mm_seconds: list[float] = []
    square = None
    if flops is not None and benchmark.enabled:
        square = torch.randn(MM_SIZE, MM_SIZE).to(torch.bfloat16 if dtype == "bf16" else torch.float32)

    def run_rivals() -> None:
        for name, rival in rivals.items():
            seconds[name].append(seconds_of(rival))
        if square is not None:
            mm_seconds.append(seconds_of(lambda: square @ square))

    benchmark.pedantic(step, setup=run_rivals, rounds=ROUNDS, iterations=1, warmup_rounds=2)
    counted = {name: [round(second, 4) for second in values[-ROUNDS:]] for name, values in seconds.items()}
    benchmark.extra_info["rival_seconds"] = counted
    benchmark.extra_info["rival_medians"] = {name: statistics.median(values) for name, values in counted.items()}
    if flops is not None and mm_seconds:
        mm_rate = 2 * MM_SIZE**3 / statistics.median(mm_seconds[-ROUNDS:])
        benchmark.extra_info["mm_gflops"] = round(mm_rate / 1e9, 1)
        benchmark.extra_info["rate_over_mm"] = round(flops / benchmark.stats.stats.median / mm_rate, 3)


def seconds_of(step: Step) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start
