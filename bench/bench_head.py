"""The loss with its last layer against the published ones: one training step, forward and backward, fp32.

    pytest bench --benchmark-enable --benchmark-json=bench/results/cpu/head.json

Each round of a benchmark is preceded by one step of its baseline, so that both meet the same clock and the same neighbours;
``extra_info`` holds the baseline's times, the ratio of medians and the peak extra memory of both.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

from bench.memory import peak_extra_mib
from bench.workloads import Inputs, Workload
from tests.published import PublishedDINOLoss
from vmf_kernels import DINOLoss, DINOvMFLoss

Step = Callable[[], object]
ROUNDS = 15
SCHEDULE = (0.04, 0.04, 0, 1)  # teacher temperature 0.04 throughout


def test_streaming_loss_against_published_loss(benchmark: Any, workload: Workload) -> None:
    inputs = Inputs.of(workload)
    published = training_step(
        inputs, inputs.published_layers, PublishedDINOLoss(workload.prototypes, workload.crops, *SCHEDULE)
    )
    streaming = training_step(inputs, inputs.layers, DINOLoss(workload.prototypes, workload.crops, *SCHEDULE))
    compare(benchmark, streaming, published)
    benchmark.extra_info["extra_mib"] = round(peak_extra_mib(streaming, inputs.gradient_bytes), 1)
    benchmark.extra_info["baseline_extra_mib"] = round(peak_extra_mib(published, inputs.gradient_bytes), 1)


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


def training_step(inputs: Inputs, layers: tuple[nn.Module, nn.Module], loss: nn.Module) -> Step:
    """Last layer of both networks, loss and gradients."""
    student, teacher = layers

    def step() -> None:
        inputs.clear_gradients()
        loss(student(inputs.student_features), teacher(inputs.teacher_features), 0).backward()

    return step


def compare(benchmark: Any, step: Step, baseline: Step) -> None:
    """Time ``step``, each round right after one of ``baseline``."""
    baseline_seconds: list[float] = []

    def run_baseline() -> None:
        start = time.perf_counter()
        baseline()
        baseline_seconds.append(time.perf_counter() - start)

    benchmark.pedantic(step, setup=run_baseline, rounds=ROUNDS, iterations=1, warmup_rounds=2)
    baseline_median = statistics.median(baseline_seconds[-ROUNDS:])
    benchmark.extra_info["baseline_seconds"] = [round(seconds, 4) for seconds in baseline_seconds[-ROUNDS:]]
    benchmark.extra_info["baseline_median_seconds"] = round(baseline_median, 4)
    if benchmark.stats is not None:
        benchmark.extra_info["speedup"] = round(baseline_median / benchmark.stats.stats.median, 3)
