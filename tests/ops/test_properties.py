"""Random problems against the loss written out here in fp64, pair by pair, with nothing of the library's mathematics.

Legend: S / T student / teacher rows, G / V their views, B images, R rows of either, K prototypes, D embedding dim.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import mpmath
import pytest
import torch
from torch import Tensor

from vmf_kernels import Prototypes, testing
from vmf_kernels.backends.native import module
from vmf_kernels.prototypes import KINDS
from vmf_kernels.testing import (
    GRADIENTS,
    Outcome,
    Problem,
    assert_within_budget,
    library_outcome,
    random_problem,
    rounding_sizes,
)

pytestmark = pytest.mark.quick

PROBLEMS = 40
AGREEMENT = 1e-11  # of the sizes that roundings are relative to: fp64's own, written in two ways


class LogNormalizer(torch.autograd.Function):
    """log C_D(kappa) - log C_D(0) from Bessel functions of 40 digits, and its slope, minus their ratio."""

    @staticmethod
    def forward(ctx: Any, kappa: Tensor, dim: int) -> Tensor:
        values, slopes = [], []
        with mpmath.workdps(40):
            order = mpmath.mpf(dim) / 2 - 1
            for k in map(mpmath.mpf, kappa.tolist()):
                lower, upper = (mpmath.besseli(nu, k) for nu in (order, order + 1))
                constant = order * mpmath.log(k / 2) - mpmath.loggamma(order + 1) - mpmath.log(lower) if k else 0
                values.append(float(constant))
                slopes.append(float(-upper / lower) if k else 0.0)
        ctx.save_for_backward(kappa.new_tensor(slopes))
        return kappa.new_tensor(values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.saved_tensors[0], None


def effective(prototypes: Prototypes) -> tuple[Tensor, Tensor]:
    """[K, D] what multiplies the rows, and [K] its norm."""
    w = prototypes.weight
    length = (w * w).sum(dim=1).clamp(min=1e-300).sqrt()
    if prototypes.kind == "normalized":
        return w / length[:, None], torch.ones_like(length)
    if prototypes.magnitude is not None:
        return prototypes.magnitude.view(-1, 1) * w / length[:, None], prototypes.magnitude.view(-1).abs()
    return w, length


def log_probabilities(features: Tensor, prototypes: Prototypes, temperature: float, bias: Tensor | None) -> Tensor:
    w, norm = effective(prototypes)
    logits = features @ w.T / temperature
    if prototypes.kind.endswith("vmf"):
        logits = logits + LogNormalizer.apply(norm / temperature, w.shape[1])  # type: ignore[no-untyped-call]
    logits = logits if bias is None else logits + bias
    return logits - logits.logsumexp(dim=1, keepdim=True)


def statement(problem: Problem) -> Outcome:
    """Equation by equation what the library promises, from a problem in fp64."""
    features, prototypes = problem.student_leaves()
    log_p = log_probabilities(features, prototypes, problem.student_temperature, None)
    log_q = log_probabilities(
        problem.teacher_features, problem.teacher_prototypes, problem.teacher_temperature, problem.teacher_bias
    )
    q, views = log_q.exp(), problem.pair_weights.shape
    images = len(features) // views[1]
    total = entropies = loss = torch.zeros((), dtype=torch.float64)
    usage, student_entropy = q.new_zeros(q.shape[1]), torch.zeros((), dtype=torch.float64)
    for g in range(views[0]):
        for v in range(views[1]):
            for b in range(images):
                weight = problem.pair_weights[g, v] * (
                    1.0 if problem.image_weights is None else problem.image_weights[b]
                )
                t, s = g * images + b, v * images + b
                loss = loss - weight * (q[t] * log_p[s]).sum()
                total, usage = total + weight, usage + weight * q[t]
                entropies = entropies - weight * (q[t] * log_q[t]).sum()
                student_entropy = student_entropy - weight * (log_p[s].exp() * log_p[s]).sum().detach()
    total = total if total > 0 else torch.ones_like(total)
    leaves = dict(zip(GRADIENTS, (features, prototypes.weight, prototypes.magnitude), strict=True))
    wanted = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    loss = loss + 0 * sum(leaf.sum() for leaf in wanted.values())  # of no pairs as well
    gradients = torch.autograd.grad(loss, list(wanted.values()))
    return {
        "loss": loss.detach(),
        "teacher_entropy": entropies / total,
        "student_entropy": student_entropy / total,
        "kl": (loss.detach() - entropies) / total,
        "usage": usage / total,
    } | dict(zip(wanted, gradients, strict=True))


def drawn(seed: int) -> Problem:
    """Shapes from nothing to small, norms from 1e-4 to 1e4, temperatures from 1e-3 to 1e3, some weights 0; fp32 numbers."""
    pick = random.Random(seed)
    torch.manual_seed(seed)
    problem = random_problem(
        images=pick.choice([0, 1, 1, 2, 5]),
        views=(pick.randint(1, 3), pick.randint(1, 4)),
        prototypes=pick.choice([1, 2, 7, 17, 33]),
        dim=pick.choice([2, 3, 8, 16, 21]),
        kind=KINDS[seed % len(KINDS)],
    )
    spread = pick.uniform(0, 4)

    def stretched(prototypes: Prototypes) -> Prototypes:
        lengths = 10 ** (spread * (2 * torch.rand(prototypes.count, 1, dtype=torch.float64) - 1))
        magnitude = None if prototypes.magnitude is None else prototypes.magnitude * lengths
        return replace(prototypes, weight=prototypes.weight * lengths, magnitude=magnitude)

    weights = problem.pair_weights
    return replace(
        problem,
        student_prototypes=stretched(problem.student_prototypes),
        teacher_prototypes=stretched(problem.teacher_prototypes),
        pair_weights=weights * (torch.rand_like(weights) > pick.choice([0.0, 0.5, 1.0])),
        student_temperature=10 ** pick.uniform(-3, 3),
        teacher_temperature=10 ** pick.uniform(-3, 3),
        teacher_bias=pick.choice([None, problem.teacher_bias]),
        image_weights=pick.choice([None, problem.image_weights]),
    ).to(torch.float32)


@pytest.mark.parametrize("first", range(0, PROBLEMS, 10))
def test_random_problems_equal_the_statement(first: int) -> None:
    backends = ["reference", "streaming", *(["native"] if module.native() is not None else [])]
    for seed in range(first, first + 10):
        problem = drawn(seed)
        exact = problem.to(torch.float64)
        truth, plain, sizes = statement(exact), testing.dense_outcome(exact), rounding_sizes(exact)
        for name, value in truth.items():
            off = (plain[name] - value).abs().max().item() if value.numel() else 0.0
            allowed = AGREEMENT * sizes[name].abs().max().item() if value.numel() else 0.0
            assert off <= allowed, f"seed {seed}, {name}: the budget's truth is off by {off:.1e}, allowed {allowed:.1e}"
        for backend in backends:
            try:
                assert_within_budget(library_outcome(problem, backend), problem)
            except AssertionError as error:
                raise AssertionError(f"seed {seed}, {backend}: {error}") from error
