"""Distillation with different bottleneck dims: the teacher's D enters only its logits; K is the same.

Legend: G / V teacher / student views, B images, K prototypes, D embedding dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from vmf_kernels import (
    DINOLoss,
    DINOvMFLoss,
    IBOTPatchLoss,
    IBOTvMFPatchLoss,
    PrototypeLogits,
    Prototypes,
    TeacherTargets,
    linear_prototypes,
    logit_cross_entropy,
    prototype_cross_entropy,
    target_cross_entropy,
    weight_norm_prototypes,
)
from vmf_kernels.backends.choice import BACKENDS, choose_backend
from vmf_kernels.backends.native import module
from vmf_kernels.bessel import log_vmf_constant
from vmf_kernels.compat import dinov3
from vmf_kernels.prototypes import KINDS
from vmf_kernels.testing import Problem, assert_within_budget, library_outcome, random_problem

K, STUDENT_DIM, TEACHER_DIM = 70, 16, 40
Logits = PrototypeLogits | Tensor


def problem_of(kind: str, dtype: torch.dtype, dims: tuple[int, int] = (STUDENT_DIM, TEACHER_DIM)) -> Problem:
    """Two networks of one K, each of a dim of its own."""
    student, teacher = (
        random_problem(images=5, views=(2, 4), prototypes=K, dim=dim, kind=kind, dtype=dtype) for dim in dims
    )
    return replace(student, teacher_features=teacher.teacher_features, teacher_prototypes=teacher.teacher_prototypes)


@pytest.mark.parametrize("dims", [(16, 40), (40, 16)], ids=["wider teacher", "wider student"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["reference", "streaming", "native", "auto"])
def test_each_network_has_a_dim_of_its_own(backend: str, dtype: torch.dtype, kind: str, dims: tuple[int, int]) -> None:
    if backend == "native" and (module.native() is None or dtype == torch.float64):
        pytest.skip("native takes no fp64, or was not built")
    if dtype == torch.bfloat16 and backend in ("native", "auto") and module.native() and module.has_bf16_products():
        pytest.skip("bf16 products have another budget")
    problem = problem_of(kind, dtype, dims)
    assert_within_budget(library_outcome(problem, backend), problem)


def heads(dtype: torch.dtype = torch.float64) -> tuple[Prototypes, Prototypes]:
    """Student's and teacher's last layers, as leaves."""

    def layer(dim: int) -> Prototypes:
        magnitude, direction = 1 + torch.rand(K, 1, dtype=dtype), torch.randn(K, dim, dtype=dtype)
        return weight_norm_prototypes(magnitude.requires_grad_(), direction.requires_grad_())

    return layer(STUDENT_DIM), layer(TEACHER_DIM)


def dino(make: Any) -> Callable[..., Tensor]:
    def run(student: Logits, teacher: Logits, prototypes: tuple[Prototypes, Prototypes]) -> Tensor:
        loss = make(K, 5, 0.04, 0.04, 0, 1).double()
        named = {}
        if make is DINOvMFLoss and isinstance(student, Tensor):
            named = dict(zip(("student_prototypes", "teacher_prototypes"), prototypes, strict=True))
        # the second time with a centre
        first, second = (loss(student[:15], teacher[:6], 0, **named) for _ in range(2))
        total: Tensor = first + second
        return total

    return run


def patches(student: Logits, teacher: Logits, prototypes: tuple[Prototypes, Prototypes]) -> Tensor:
    loss = IBOTPatchLoss(K).double()
    mask = torch.arange(24).view(4, 6) % 3 == 0
    batch = student[:24].unflatten(0, (4, 6)), teacher[:24].unflatten(0, (4, 6)), mask, 0.04
    total: Tensor = loss(*batch) + loss(*batch)
    return total


def dinov3_class_tokens(student: Logits, teacher: Logits, prototypes: tuple[Prototypes, Prototypes]) -> Tensor:
    loss = dinov3.DINOLoss(K).double()
    targets = loss.sinkhorn_knopp_teacher(teacher[:6], 0.07).unflatten(0, (2, 3))
    value: Tensor = loss(student[:15].unflatten(0, (5, 3)), targets, ignore_diagonal=True)
    return value


def dinov3_patches(student: Logits, teacher: Logits, prototypes: tuple[Prototypes, Prototypes]) -> Tensor:
    loss = dinov3.iBOTPatchLoss(K).double()
    mask = torch.arange(24).view(4, 6) % 3 == 0
    targets = loss.sinkhorn_knopp_teacher(teacher[:8], 0.07, torch.tensor([8]))
    return loss.forward_masked(student[:8], targets, mask, 8)


LOSSES: dict[str, Callable[..., Tensor]] = {
    "DINOLoss": dino(DINOLoss),
    "DINOvMFLoss": dino(DINOvMFLoss),
    "IBOTPatchLoss": patches,
    "dinov3.DINOLoss": dinov3_class_tokens,
    "dinov3.iBOTPatchLoss": dinov3_patches,
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_equal_those_of_stored_logits(name: str) -> None:
    prototypes, rows = heads(), (torch.randn(24, STUDENT_DIM).double(), torch.randn(24, TEACHER_DIM).double())
    results = []
    for stored in (False, True):
        outputs = [PrototypeLogits(x, p) for x, p in zip(rows, prototypes, strict=True)]
        loss = LOSSES[name](*([x.materialize() for x in outputs] if stored else outputs), prototypes)
        student = prototypes[0]
        assert student.magnitude is not None
        results.append([loss, *torch.autograd.grad(loss, [student.weight, student.magnitude])])
    for got, exact in zip(*results, strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-11, atol=1e-13)


def test_ibot_vmf_patches_equal_the_dense_formula() -> None:
    """Of its two centres' start alone: stored logits it does not take."""
    student, teacher = (p.with_vmf() for p in heads())
    rows = torch.randn(24, STUDENT_DIM).double(), torch.randn(24, TEACHER_DIM).double()
    outputs = [PrototypeLogits(x, p.without_vmf()) for x, p in zip(rows, (student, teacher), strict=True)]
    mask = torch.ones(4, 6, dtype=torch.bool)
    got = IBOTvMFPatchLoss(K).double()(*(x.unflatten(0, (4, 6)) for x in outputs), mask, 0.04)
    biases = [log_vmf_constant(p.norms(torch.float64) / tau, p.dim) for p, tau in ((student, 0.1), (teacher, 0.04))]
    dense = logit_cross_entropy(
        outputs[0].materialize(),
        outputs[1].materialize(),
        torch.ones(1, 1),
        image_weights=torch.full((24,), 1 / 24),
        student_bias=biases[0],
        teacher_bias=biases[1].detach(),
    ).loss
    torch.testing.assert_close(got, dense, rtol=1e-7, atol=0.0)


def test_gpu_kernels_say_what_they_need_and_auto_goes_around_them() -> None:
    weights = torch.randn(K, STUDENT_DIM), torch.randn(K, TEACHER_DIM)
    assert choose_backend("auto", torch.randn(3, STUDENT_DIM, dtype=torch.float64), *weights) is BACKENDS["streaming"]
    for name in ("triton", "cuda"):
        said = f"backend '{name}' cannot run here: it needs one embedding dim, but the networks have 16 and 40"
        with pytest.raises(RuntimeError, match=said):
            choose_backend(name, torch.randn(3, STUDENT_DIM, dtype=torch.float16), *weights)


@pytest.mark.parametrize("call", ["operator", "targets", "DINOLoss"])
def test_k_must_be_one(call: str) -> None:
    rows, teacher_rows = torch.randn(4, 5), torch.randn(4, 7)
    student, teacher = linear_prototypes(torch.randn(9, 5)), linear_prototypes(torch.randn(8, 7))
    outputs = PrototypeLogits(rows, student), PrototypeLogits(teacher_rows, teacher)
    calls: dict[str, Callable[[], object]] = {
        "operator": lambda: prototype_cross_entropy(rows, student, teacher_rows, teacher, torch.ones(2, 2)),
        "targets": lambda: target_cross_entropy(outputs[0], TeacherTargets(outputs[1], 0.04), torch.ones(2, 2)),
        "DINOLoss": lambda: DINOLoss(8, 2, 0.04, 0.04, 0, 1)(*outputs, 0),
    }
    with pytest.raises(ValueError, match=r"9.*8.*both networks must have the same K"):
        calls[call]()
