"""Errors of the library's backend and of the dense formulas, all against fp64.

"dense" is the formula in plain torch on the same rounded inputs, summed in fp32; "autocast" is the published loss with
bf16 logits, which is what the library replaces in training.

Legend: B images, G / V teacher / student views, K prototypes, D embedding dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.gpu.agreement import exact_outcome
from bench.gpu.record import Record, attempt
from bench.gpu.settings import Settings
from vmf_bench.agreement import outcome_of, relative_errors
from vmf_bench.inputs import HeadInputs, HeadShape, matched_shape
from vmf_bench.ours import ours
from vmf_bench.peers.stored import published
from vmf_kernels.prototypes import Prototypes
from vmf_kernels.testing import Outcome, Problem, assert_within_budget, dense_outcome, library_outcome, random_problem


class Case(NamedTuple):
    """Arguments of ``random_problem``, the dtype by name."""

    images: int
    views: tuple[int, int]
    prototypes: int
    dim: int
    kind: str
    dtype: str

    @property
    def name(self) -> str:
        """What is unlike the other cases."""
        rows = f"{self.views[1] * self.images}/{self.views[0] * self.images}"
        return f"{self.dtype} {self.kind} {rows} K{self.prototypes} D{self.dim}"


K = 65_536
CASES = (
    Case(8, (2, 10), K, 256, "weight_norm_vmf", "bfloat16"),
    Case(8, (2, 10), K, 256, "weight_norm", "bfloat16"),
    Case(257, (1, 1), K, 256, "weight_norm_vmf", "bfloat16"),
    Case(8, (2, 10), K, 256, "weight_norm_vmf", "float16"),
    Case(8, (2, 10), K, 256, "weight_norm_vmf", "float32"),
    Case(8, (2, 10), K, 384, "weight_norm_vmf", "bfloat16"),
    Case(63, (1, 1), K, 64, "linear_vmf", "bfloat16"),
    Case(63, (1, 1), K, 768, "normalized", "bfloat16"),
    Case(65, (1, 1), K + 3, 256, "linear", "bfloat16"),
)
TOY_CASES = (Case(2, (2, 3), 301, 32, "weight_norm_vmf", "bfloat16"), Case(5, (1, 1), 301, 24, "linear", "float32"))
TRAINING_SHAPES = (HeadShape(8), matched_shape(257), HeadShape(8, dim=384))  # bf16 features, fp32 prototypes
TOY_TRAINING_SHAPES = (HeadShape(2, 2, 4, prototypes=301, dim=32),)


def run(settings: Settings, record: Record) -> None:
    """Every case, one entry each, while there is time."""
    jobs: list[tuple[str, Callable[[], dict[str, object]]]] = []
    for case in TOY_CASES if settings.dry else CASES:
        jobs.append((case.name, lambda case=case: measure_case(case, settings)))  # type: ignore[misc]
    for shape in TOY_TRAINING_SHAPES if settings.dry else TRAINING_SHAPES:
        name = f"bf16 features, fp32 weight_norm {shape.name}"
        jobs.append((name, lambda shape=shape: measure_training(shape, settings)))  # type: ignore[misc]
    for name, job in jobs:
        if settings.seconds_left() < 0:
            record.put(name, value={"status": "skipped", "reason": "no time left"})
            continue
        result, outcome = attempt(job)
        record.put(name, value=outcome | (result or {}))


def measure_case(case: Case, settings: Settings) -> dict[str, object]:
    """Relative errors by quantity, and the used share of the error budget of the tests."""
    torch.manual_seed(0)
    arguments = case._asdict() | {"dtype": getattr(torch, case.dtype)}
    problem = on_device(random_problem(**arguments), settings.device)
    truth = dense_outcome(problem.to(torch.float64))
    got = library_outcome(problem, settings.backend)
    _, budget = attempt(lambda: assert_within_budget(got, problem))
    return {
        "ours": _gradient_errors(got, truth),
        "dense": _gradient_errors(dense_outcome(problem), truth),
        "within_budget": budget["status"] == "ok",
        "budget": budget.get("reason", ""),
    }


def measure_training(shape: HeadShape, settings: Settings) -> dict[str, object]:
    """Relative errors as training has them: bf16 features, fp32 parameters."""
    inputs = HeadInputs.of(shape, device=settings.device)
    exact, _ = exact_outcome(inputs)
    return {
        "ours": relative_errors(outcome_of(ours(settings.backend), inputs), exact),
        "autocast": relative_errors(outcome_of(published, inputs), exact),
    }


def on_device(problem: Problem, device: torch.device) -> Problem:
    """The problem with every tensor moved; images get explicit weights."""

    def move(prototypes: Prototypes) -> Prototypes:
        magnitude = None if prototypes.magnitude is None else prototypes.magnitude.to(device)
        return replace(prototypes, weight=prototypes.weight.to(device), magnitude=magnitude)

    moved: dict[str, Any] = {
        name: value.to(device) for name, value in vars(problem).items() if isinstance(value, Tensor)
    }
    moved |= {name: move(value) for name, value in vars(problem).items() if isinstance(value, Prototypes)}
    return replace(problem, **moved)


def _gradient_errors(outcome: Outcome, truth: Outcome) -> dict[str, float]:
    wanted = [name for name in truth if name == "loss" or name.endswith("_gradient")]
    return relative_errors({name: outcome[name] for name in wanted}, {name: truth[name] for name in wanted})
