"""Sums have the dtype of the features: fp64 rows with prototypes of fewer bits are as exact as with fp64 prototypes.

Legend: R rows of either network, K prototypes, D embedding dim.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from vmf_kernels import DINOvMFLoss, LogitCenter, PrototypeLogits, Prototypes
from vmf_kernels.prototypes import KINDS
from vmf_kernels.testing import GRADIENTS, Problem, dense_outcome, library_outcome, random_problem

pytestmark = pytest.mark.quick

BUDGET = 1e-12  # relative to the largest element
STORED = {"fp32": torch.float32, "bf16": torch.bfloat16}


def rounded(problem: Problem, dtype: torch.dtype) -> Problem:
    """fp64 rows and prototypes of fewer bits."""
    few = problem.to(dtype)
    return replace(
        problem,
        student_prototypes=few.student_prototypes,
        teacher_prototypes=few.teacher_prototypes,
        teacher_bias=problem.teacher_bias,
    )


def error_of(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).abs().max() / exact.abs().max().clamp(min=1e-300))


@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["streaming", "reference", "auto"])
def test_fp64_features_have_fp64_results(backend: str, kind: str, dtype: str) -> None:
    problem = rounded(random_problem(images=3, views=(2, 3), prototypes=60, kind=kind), STORED[dtype])
    got, exact = library_outcome(problem, backend), dense_outcome(problem.to(torch.float64))
    for name, truth in exact.items():
        stored = name in GRADIENTS[1:]  # comes back in the dtype of what is stored
        assert got[name].dtype == (STORED[dtype] if stored else torch.float64)
        budget = torch.finfo(STORED[dtype]).eps if stored else BUDGET
        error = error_of(got[name], truth)
        assert error <= budget, f"{name}: relative error {error:.1e}, budget {budget:.0e}"


@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("kind", KINDS)
def test_fp64_logits_and_their_centre_are_fp64(kind: str, dtype: str) -> None:
    problem = rounded(random_problem(images=3, views=(2, 3), prototypes=60, kind=kind), STORED[dtype])
    exact = problem.to(torch.float64)
    logits = PrototypeLogits(problem.teacher_features, problem.teacher_prototypes)
    truth = PrototypeLogits(exact.teacher_features, exact.teacher_prototypes)
    error = error_of(logits.materialize(), truth.materialize())
    assert error <= BUDGET, f"logits: relative error {error:.1e}"
    center = LogitCenter(60, 0.0).double()
    center.update(logits, 0.04)
    error = error_of(center.center[0], truth.materialize().mean(dim=0))
    assert error <= BUDGET, f"centre: relative error {error:.1e}"


@pytest.mark.parametrize("kind", ["linear", "weight_norm"])
def test_the_normaliser_of_fp64_stored_logits_is_fp64(kind: str) -> None:
    problem = rounded(random_problem(images=3, views=(2, 3), prototypes=60, kind=kind), torch.float32)

    def loss(prototypes: tuple[Prototypes, Prototypes], rows: tuple[Tensor, Tensor]) -> Tensor:
        logits = [PrototypeLogits(x, p).materialize() for x, p in zip(rows, prototypes, strict=True)]
        named = dict(zip(("student_prototypes", "teacher_prototypes"), prototypes, strict=True))
        value: Tensor = DINOvMFLoss(60, 3, 0.04, 0.04, 0, 1).double()(*logits, 0, **named)
        return value

    exact = problem.to(torch.float64)
    rows = exact.student_features, exact.teacher_features
    got = loss((problem.student_prototypes, problem.teacher_prototypes), rows)
    error = error_of(got, loss((exact.student_prototypes, exact.teacher_prototypes), rows))
    assert error <= BUDGET, f"relative error {error:.1e}"
