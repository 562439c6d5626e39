"""Training steps of the library and of the published code on the same numbers, and the networks they train.

Legend: B images, V crops, K prototypes, D bottleneck dim.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.fuzz.statements.dino import PublishedDINOHead, PublishedDINOLoss, PublishedDINOvMFLoss, follow
from tests.measure import worst_error
from vmf_kernels import (
    DINOHead,
    DINOLoss,
    DINOvMFLoss,
    PrototypeLogits,
)

BUDGET = {torch.float64: 1e-10, torch.float32: 1e-5}  # relative, in norm, of each tensor of each step
SEEN = 100  # a broken formula must be off by so many budgets
STEPS = 5
IMAGES, CROPS = 3, 5
IN_DIM, DIM = 12, 24
SCHEDULE = (CROPS, 0.04, 0.07, 3, STEPS)  # crops, teacher temperatures and their epochs: every step has its own
FP64 = pytest.param(torch.float64, id="fp64")
DTYPES = [FP64, pytest.param(torch.float32, id="fp32")]
PROTOTYPES = [pytest.param(4099, id="K4099"), pytest.param(301, id="K301")]
OUTPUTS = ["unstored", "stored"]
VMF_RULES: list[tuple[str, str]] = [
    ("logit", "log_probability"),
    ("probability", "log_probability"),
    ("probability", "probability"),
]

Record = dict[str, Tensor]
Step = Callable[[nn.Module, nn.Module, Tensor, Tensor, int], Tensor]


def networks(
    prototypes: int, dtype: torch.dtype, *, frozen_norm: bool = False, dim: int = DIM
) -> tuple[DINOHead, DINOHead]:
    """A student and a teacher near it, norms between 0.5 and 1.5 with either sign unless frozen."""
    student = DINOHead(
        IN_DIM, prototypes, norm_last_layer=frozen_norm, nlayers=2, hidden_dim=16, bottleneck_dim=dim
    ).double()
    with torch.no_grad():
        student.mlp[0].weight.mul_(20)  # type: ignore[index]
        if not frozen_norm:
            g = student.last_layer.weight_g
            g.copy_((0.5 + torch.rand_like(g)) * torch.randn_like(g).sign())
    teacher = copy.deepcopy(student).requires_grad_(False)
    with torch.no_grad():
        for parameter in teacher.parameters():
            if not frozen_norm or parameter is not teacher.last_layer.weight_g:
                parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
    return student.to(dtype), teacher.to(dtype)


def published_twin(head: DINOHead) -> PublishedDINOHead:
    """The published head with the parameters of ours."""
    twin = PublishedDINOHead(
        IN_DIM, head.last_layer.weight_g.shape[0], norm_last_layer=False, nlayers=2, hidden_dim=16, bottleneck_dim=DIM
    )
    twin = twin.to(head.last_layer.weight_v.dtype)
    twin.load_state_dict(head.state_dict())
    twin.last_layer.weight_g.requires_grad_(head.last_layer.weight_g.requires_grad)
    return twin


def train(student: nn.Module, teacher: nn.Module, loss: nn.Module, step: Step, dtype: torch.dtype) -> Record:
    """Five steps of momentum SGD, the teacher following; every loss, gradient and centre by step."""
    batches = torch.Generator().manual_seed(1)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.02, momentum=0.5)
    record: Record = {}
    for i in range(STEPS):
        x = torch.randn(CROPS * IMAGES, IN_DIM, generator=batches, dtype=torch.float64).to(dtype).requires_grad_()
        views = (x.detach() + 0.1)[: 2 * IMAGES]
        optimizer.zero_grad()
        value = step(student, teacher, x, views, i)
        value.backward()
        assert x.grad is not None
        gradients = {name: p.grad for name, p in student.named_parameters() if p.requires_grad}
        measured = {"loss": value.detach(), "input": x.grad, "center": loss.center.clone(), **gradients}  # type: ignore[operator]
        record |= {f"step {i} {name}": tensor for name, tensor in measured.items() if isinstance(tensor, Tensor)}
        optimizer.step()
        follow(teacher, student, 0.9)
    return record


def our_step(loss: nn.Module, output: str) -> Step:
    """Ours, on logits that are not stored or on stored ones (which need the prototypes for the vMF loss)."""

    def step(student: nn.Module, teacher: nn.Module, x: Tensor, views: Tensor, epoch: int) -> Tensor:
        s, t = student(x), teacher(views)
        if output == "unstored":
            return loss(s, t, epoch)  # type: ignore[no-any-return]
        extra = {}
        if isinstance(loss, DINOvMFLoss):
            extra = {"student_prototypes": s.prototypes, "teacher_prototypes": t.prototypes}
        return loss(s.materialize(), t.materialize(), epoch, **extra)  # type: ignore[no-any-return]

    return step


def published_step(loss: nn.Module) -> Step:
    """The published one, with the norms for the vMF loss."""

    def step(student: nn.Module, teacher: nn.Module, x: Tensor, views: Tensor, epoch: int) -> Tensor:
        extra = []
        if isinstance(loss, PublishedDINOvMFLoss):
            extra = [head.last_layer.weight_g[:, 0].abs() for head in (student, teacher)]  # type: ignore[index, union-attr]
        return loss(student(x), teacher(views), epoch, *extra)  # type: ignore[no-any-return]

    return step


def error_over_steps(
    ours: DINOLoss, published: PublishedDINOLoss, output: str, dtype: torch.dtype, *, frozen_norm: bool = False
) -> tuple[float, str]:
    """The worst relative error of any tensor in five steps; the published side runs in fp64 on the same numbers."""
    student, teacher = networks(ours.center.shape[1], dtype, frozen_norm=frozen_norm)
    twins = published_twin(student).double(), published_twin(teacher).double().requires_grad_(False)
    expected = train(*twins, published.double(), published_step(published), torch.float64)
    got = train(student, teacher, ours.to(dtype), our_step(ours, output), dtype)
    return worst_error(got, expected)


def outputs(prototypes: int = 50, *, frozen_norm: bool = False) -> tuple[PrototypeLogits, PrototypeLogits]:
    """What two fp32 heads return for one batch."""
    student, teacher = networks(prototypes, torch.float32, frozen_norm=frozen_norm)
    return student(torch.randn(CROPS * IMAGES, IN_DIM)), teacher(torch.randn(2 * IMAGES, IN_DIM))
