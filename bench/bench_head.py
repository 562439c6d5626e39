"""The last layer and the loss against the published ones: one training step, forward and backward, in fp32 by default.

    pytest bench --benchmark-enable --benchmark-json=bench/results/cpu/head.json

Each round of a benchmark is preceded by one step of its baseline, so that both meet the same clock and the same neighbours;
``extra_info`` holds the baseline's times, the ratio of medians and the peak extra memory of both; of the native backend also
the rate of its products, counted as 8 (S + T) K D, over that of torch.mm in the same rounds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.workloads import Inputs, Workload
from tests.published import PublishedDINOLoss
from vmf_bench.memory import cpu_peak_extra_mib
from vmf_kernels import DINOLoss, DINOvMFLoss
from vmf_kernels.backends.choice import BACKENDS
from vmf_kernels.backends.native.module import has_bf16_products

Step = Callable[[], object]
ROUNDS = 15
SCHEDULE = (0.04, 0.04, 0, 1)  # teacher temperature 0.04 throughout
MM_SIZE = 4096


@pytest.mark.parametrize("backend", ["native", "streaming"])
def test_loss_against_published_loss(benchmark: Any, workload: Workload, backend: str) -> None:
    skip_without(backend)
    inputs = Inputs.of(workload)
    published = training_step(
        inputs, inputs.published_layers, PublishedDINOLoss(workload.prototypes, workload.crops, *SCHEDULE)
    )
    loss = DINOLoss(workload.prototypes, workload.crops, *SCHEDULE, backend=backend)
    ours = training_step(inputs, inputs.layers, loss)
    compare(benchmark, ours, published, workload.flops if backend == "native" else None)
    benchmark.extra_info["extra_mib"] = round(cpu_peak_extra_mib(ours, inputs.gradient_bytes), 1)
    benchmark.extra_info["baseline_extra_mib"] = round(cpu_peak_extra_mib(published, inputs.gradient_bytes), 1)


def test_bf16_features_against_fp32_features(benchmark: Any, workload: Workload) -> None:
    skip_without("native")
    if not has_bf16_products():
        pytest.skip("this CPU has no bf16 products")
    inputs = Inputs.of(workload)
    loss = DINOLoss(workload.prototypes, workload.crops, *SCHEDULE, backend="native")

    def rounded(rows: Tensor) -> Tensor:
        return rows.to(torch.bfloat16)

    compare(benchmark, training_step(inputs, inputs.layers, loss, rounded), training_step(inputs, inputs.layers, loss))


@pytest.mark.parametrize("centering", ["logit", "probability"])
def test_vmf_normaliser_against_none(benchmark: Any, workload: Workload, centering: str) -> None:
    inputs = Inputs.of(workload)
    plain = training_step(inputs, inputs.layers, DINOLoss(workload.prototypes, workload.crops, *SCHEDULE))
    loss = DINOvMFLoss(workload.prototypes, workload.crops, *SCHEDULE, centering=centering)
    compare(benchmark, training_step(inputs, inputs.layers, loss), plain)


def test_dense_loss_against_published_loss(benchmark: Any, workload: Workload) -> None:
    inputs = Inputs.of(workload)
    published = training_step(
        inputs, inputs.published_layers, PublishedDINOLoss(workload.prototypes, workload.crops, *SCHEDULE)
    )
    dense = training_step(inputs, inputs.published_layers, DINOLoss(workload.prototypes, workload.crops, *SCHEDULE))
    compare(benchmark, dense, published)


def skip_without(backend: str) -> None:
    """Skip if this installation has no such backend."""
    reason = BACKENDS[backend].unsupported(torch.empty(1, 2), torch.empty(1, 2))
    if reason is not None:
        pytest.skip(reason)


def training_step(
    inputs: Inputs,
    layers: tuple[nn.Module, nn.Module],
    loss: nn.Module,
    change: Callable[[Tensor], Tensor] = lambda x: x,
) -> Step:
    """The last layer of both networks on the features (``change`` may replace them), the loss, and the gradients."""
    student, teacher = layers

    def step() -> None:
        inputs.clear_gradients()
        loss(student(change(inputs.student_features)), teacher(change(inputs.teacher_features)), 0).backward()

    return step


def compare(benchmark: Any, step: Step, baseline: Step, flops: int | None = None) -> None:
    """Time ``step``, each round right after one of ``baseline`` and, where its ``flops`` are given, one of torch.mm."""
    baseline_seconds: list[float] = []
    mm_seconds: list[float] = []
    square = torch.randn(MM_SIZE, MM_SIZE) if flops is not None and benchmark.enabled else None

    def run_baseline() -> None:
        baseline_seconds.append(seconds_of(baseline))
        if square is not None:
            mm_seconds.append(seconds_of(lambda: square @ square))

    benchmark.pedantic(step, setup=run_baseline, rounds=ROUNDS, iterations=1, warmup_rounds=2)
    baseline_median = statistics.median(baseline_seconds[-ROUNDS:])
    benchmark.extra_info["baseline_seconds"] = [round(seconds, 4) for seconds in baseline_seconds[-ROUNDS:]]
    benchmark.extra_info["baseline_median_seconds"] = round(baseline_median, 4)
    if benchmark.stats is not None:
        benchmark.extra_info["speedup"] = round(baseline_median / benchmark.stats.stats.median, 3)
    if flops is not None and mm_seconds:
        mm_rate = 2 * MM_SIZE**3 / statistics.median(mm_seconds[-ROUNDS:])
        benchmark.extra_info["mm_gflops"] = round(mm_rate / 1e9, 1)
        benchmark.extra_info["rate_over_mm"] = round(flops / benchmark.stats.stats.median / mm_rate, 3)


def seconds_of(step: Step) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start
