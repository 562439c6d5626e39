"""Temperatures over the whole range of fp32 and beyond: wherever the dense formula is finite, every backend is.

Legend: R rows of either network, K prototypes, D embedding dim.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.fuzz.statements.cross_entropy import plain_loss
from vmf_kernels import logit_cross_entropy, prototype_usage
from vmf_kernels.backends.native import module
from vmf_kernels.ops.assignments import column_log_sum_exp, row_log_sum_exp
from vmf_kernels.testing import Problem, assert_within_budget, library_outcome, random_problem

TEMPERATURES = [1e-38, 1e-37, 1e-35, 1e-30, 1e-20, 1e-10, 1e-5, 1e5, 1e10, 1e20, 1e30, 1e37, 1e38, 3e38, 1e39, 1e300]
SIDES = {"student": (1, 0), "teacher": (0, 1), "both": (1, 1)}


def problem_at(temperature: float, side: str, kind: str) -> Problem:
    problem = random_problem(images=3, views=(2, 3), prototypes=70, dim=16, kind=kind, dtype=torch.float32)
    student, teacher = SIDES[side]
    return replace(
        problem,
        student_temperature=temperature if student else problem.student_temperature,
        teacher_temperature=temperature if teacher else problem.teacher_temperature,
    )


def check(backend: str) -> None:
    """Raise AssertionError, with all faults, unless losses and gradients are within their budget at every temperature."""
    faults = []
    for temperature in TEMPERATURES:
        for side in SIDES:
            for kind in ("linear", "weight_norm_vmf"):
                problem = problem_at(temperature, side, kind)
                try:
                    assert_within_budget(library_outcome(problem, backend), problem)
                except AssertionError as error:
                    faults.append(f"{side} at {temperature}, {kind}: {error}")
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("backend", ["reference", "streaming"])
def test_any_temperature_is_as_good_as_the_dense_formula(backend: str) -> None:
    check(backend)


def test_any_temperature_is_as_good_as_the_dense_formula_natively(isa: str) -> None:
    check("native")


def of_both(backend: str, temperature: float, dtype: torch.dtype = torch.float32) -> None:
    """Raise AssertionError unless usage and log-sums are those of the dense formula."""
    problem = problem_at(temperature, "student", "linear").to(dtype)
    features, prototypes = problem.student_features, problem.student_prototypes
    logits = features.double() @ prototypes.weight.double().T / temperature
    exact = {
        "usage": logits.softmax(dim=1).mean(dim=0),
        "rows": logits.logsumexp(dim=1),
        "columns": logits.logsumexp(dim=0),
    }
    got = {
        "usage": prototype_usage(features, prototypes, temperature, backend=backend),
        "rows": row_log_sum_exp(features, prototypes, temperature, backend=backend),
        "columns": column_log_sum_exp(
            features, prototypes, temperature, features.new_zeros(len(features)), backend=backend
        ),
    }
    for name, truth in exact.items():
        # a product is rounded relative to its terms, not to itself
        error = float((got[name].double() - truth).abs().max() / truth.abs().max())
        budget = 0.02 if dtype == torch.bfloat16 else 2e-6
        assert error <= budget, f"{name} at {temperature}: relative error {error:.1e}, budget {budget:.0e}"


@pytest.mark.parametrize("backend", ["reference", "streaming", "native"])
def test_any_temperature_gives_usage_and_log_sums(backend: str) -> None:
    if backend == "native" and module.native() is None:
        pytest.skip("vmf_kernels._native was not built")
    for temperature in TEMPERATURES:
        of_both(backend, temperature)


@pytest.mark.parametrize("temperature", [1e-37, 1e-10, 1e10, 1e39])
def test_any_temperature_goes_with_bf16_products(isa: str, temperature: float) -> None:
    of_both("native", temperature, torch.bfloat16)
    problem = problem_at(temperature, "both", "weight_norm_vmf").to(torch.bfloat16)
    lost = [name for name, value in library_outcome(problem, "native").items() if not value.isfinite().all()]
    assert not lost, f"{lost} are not finite"


@pytest.mark.parametrize("side", SIDES)
def test_any_temperature_goes_with_stored_logits(side: str) -> None:
    for temperature in TEMPERATURES:
        check_stored(temperature, side)


def check_stored(temperature: float, side: str) -> None:
    """Raise AssertionError unless the loss of stored logits is that of the plain formula, and all of it finite."""
    student, teacher = SIDES[side]
    logits = (
        torch.rand(6, 20, requires_grad=True),
        torch.rand(4, 20),
    )  # within [0, 1]: their differences are finite in fp32
    temperatures = temperature if student else 0.1, temperature if teacher else 0.04
    loss, statistics = logit_cross_entropy(
        *logits,
        torch.full((2, 3), 1 / 12),
        student_temperature=temperatures[0],
        teacher_temperature=temperatures[1],
    )
    l_s, l_t = (x.detach().double() / tau for x, tau in zip(logits, temperatures, strict=True))
    exact = plain_loss(l_s, l_t.softmax(dim=1), torch.full((2, 3), 1 / 12, dtype=torch.float64))
    assert abs(loss.detach().double() - exact) <= 1e-5 * exact.abs(), f"{loss.item()}, expected {exact.item()}"
    (gradient,) = torch.autograd.grad(loss, logits[0])
    of = (loss, statistics.teacher_entropy, statistics.student_entropy, statistics.kl, statistics.usage, gradient)
    assert all(value.isfinite().all() for value in of), f"not finite at {temperature}"
