"""Half precision around head and loss: autocast, half parameters, GradScaler, and steps that overflow.

Both sides see the same half-rounded bottleneck features; the published side then computes in fp64.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.fuzz.statements.dino import PublishedDINOLoss, PublishedDINOvMFLoss
from tests.measure import relative_error, worst_error
from vmf_kernels import DINOHead, DINOLoss, DINOvMFLoss, PrototypeLogits, weight_norm_prototypes

IMAGES, CROPS, PROTOTYPES, IN_DIM, DIM = 3, 5, 301, 12, 24
SCHEDULE = (PROTOTYPES, CROPS, 0.05, 0.05, 0, 3)
HALVES = [pytest.param(torch.bfloat16, id="bf16"), pytest.param(torch.float16, id="fp16")]
LOSSES: list[type[DINOLoss]] = [DINOLoss, DINOvMFLoss]
OUTPUTS = ["unstored", "stored"]


def make_head(dtype: torch.dtype = torch.float32) -> DINOHead:
    head = DINOHead(IN_DIM, PROTOTYPES, norm_last_layer=False, nlayers=2, hidden_dim=16, bottleneck_dim=DIM)
    with torch.no_grad():
        head.mlp[0].weight.mul_(20)  # type: ignore[index]
        head.last_layer.weight_g.uniform_(0.5, 1.5)
    return head.to(dtype)


def batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(CROPS * IMAGES, IN_DIM).to(dtype), torch.randn(2 * IMAGES, IN_DIM).to(dtype)


def loss_value(loss: DINOLoss, student: Any, teacher: Any, output: str) -> Tensor:
    if output == "unstored":
        return loss(student, teacher, 0)  # type: ignore[no-any-return]
    extra = {}
    if isinstance(loss, DINOvMFLoss):
        extra = {"student_prototypes": student.prototypes, "teacher_prototypes": teacher.prototypes}
    return loss(student.materialize(), teacher.materialize(), 0, **extra)  # type: ignore[no-any-return]


def widened(logits: PrototypeLogits) -> PrototypeLogits:
    """The same numbers in fp64: half prototypes are not rounded again when their norm enters."""
    g, v = logits.prototypes.magnitude, logits.prototypes.weight
    assert g is not None
    return PrototypeLogits(logits.features.double(), weight_norm_prototypes(g.double(), v.double()))


def published_value(loss: DINOLoss, student: Any, teacher: Any) -> Tensor:
    """The formula in fp64 on the features and prototypes as they are."""
    wide = [widened(x) for x in (student, teacher)]
    stored = [x.materialize() for x in wide]
    if not isinstance(loss, DINOvMFLoss):
        return PublishedDINOLoss(*SCHEDULE).double()(*stored, 0)  # type: ignore[no-any-return]
    norms = [x.prototypes.norms() for x in wide]
    return PublishedDINOvMFLoss(*SCHEDULE, dim=DIM).double()(*stored, 0, *norms)  # type: ignore[no-any-return]


@pytest.mark.parametrize("backend", ["streaming", "auto"])
@pytest.mark.parametrize("loss_class", LOSSES)
@pytest.mark.parametrize("dtype", HALVES)
def test_loss_under_autocast_is_exact_on_the_features_it_gets(
    dtype: torch.dtype, loss_class: type[DINOLoss], backend: str
) -> None:
    """Backend "auto" may form the products of 16-bit features in their dtype: the last layer under autocast does no better."""
    head, other, loss = make_head(), make_head(), loss_class(*SCHEDULE, backend=backend)
    x, views = batch()
    with torch.autocast("cpu", dtype=dtype):
        student, teacher = head(x), other(views)
        value = loss(student, teacher, 0)
    value.backward()
    error = relative_error(value, published_value(loss, student, teacher))
    budget = 1e-5 if backend == "streaming" else torch.finfo(dtype).eps
    assert (student.dtype, value.dtype, loss.center.dtype) == (dtype, torch.float32, torch.float32)
    assert error <= budget, f"relative error {error:.2e}, budget {budget:.1e}"
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in head.parameters())


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("loss_class", LOSSES)
@pytest.mark.parametrize("dtype", HALVES)
def test_autocast_is_near_full_precision(dtype: torch.dtype, loss_class: type[DINOLoss], output: str) -> None:
    head, other = make_head(), make_head()
    x, views = batch()
    results = []
    for enabled in (True, False):
        head.zero_grad()
        loss = loss_class(*SCHEDULE)
        with torch.autocast("cpu", dtype=dtype, enabled=enabled):
            value = loss_value(loss, head(x), other(views), output)
        value.backward()
        gradients = {name: p.grad.clone() for name, p in head.named_parameters() if p.grad is not None}
        results.append({"loss": value.detach(), "center": loss.center, **gradients})
    error, name = worst_error(*results)
    budget = 16 * torch.finfo(dtype).eps  # of features and gradients of the MLP, sharpened by the temperatures
    assert error <= budget, f"{name}: relative error {error:.2e}, budget {budget:.1e}"


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("loss_class", LOSSES)
@pytest.mark.parametrize("dtype", HALVES)
def test_half_parameters_get_half_gradients(dtype: torch.dtype, loss_class: type[DINOLoss], output: str) -> None:
    head, other, loss = make_head(dtype), make_head(dtype), loss_class(*SCHEDULE)
    x, views = batch(dtype)
    value = loss_value(loss, head(x), other(views), output)
    value.backward()
    assert value.dtype == torch.float32
    assert loss.center.dtype == torch.float32
    assert {p.grad.dtype for p in head.parameters() if p.grad is not None} == {dtype}
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())


@pytest.mark.parametrize("loss_class", LOSSES)
@pytest.mark.parametrize("dtype", HALVES)
def test_gradients_of_half_prototypes_are_rounded_once(dtype: torch.dtype, loss_class: type[DINOLoss]) -> None:
    head, other, loss = make_head(dtype), make_head(dtype), loss_class(*SCHEDULE)
    x, views = batch(dtype)
    student, teacher = head(x), other(views)
    leaves = [head.last_layer.weight_g, head.last_layer.weight_v]
    got = torch.autograd.grad(loss(student, teacher, 0), leaves)
    wide = make_head().double()
    wide.load_state_dict(head.state_dict())
    exact = wide.last_layer(student.features.detach())
    expected = torch.autograd.grad(published_value(loss, exact, teacher), list(wide.last_layer.parameters()))
    budget = torch.finfo(dtype).eps / 2
    for name, one, two in zip(("weight_g", "weight_v"), got, expected, strict=True):
        error = relative_error(one, two)
        assert error <= budget, f"{name}: relative error {error:.2e}, budget {budget:.1e}, one rounding"


def train_step(head: DINOHead, loss: DINOLoss, scaler: torch.amp.GradScaler, inputs: tuple[Tensor, Tensor]) -> Tensor:
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    with torch.autocast("cpu", dtype=torch.float16):
        value: Tensor = loss(head(inputs[0]), head(inputs[1]).detach(), 0)
    scaler.scale(value).backward()
    scaler.step(optimizer)
    scaler.update()
    return value.detach()


@pytest.mark.parametrize("loss_class", LOSSES)
def test_a_scaled_step_equals_an_unscaled_one(loss_class: type[DINOLoss]) -> None:
    inputs, start = batch(), make_head().state_dict()
    ends = []
    for enabled in (True, False):
        head, loss = make_head(), loss_class(*SCHEDULE)
        head.load_state_dict(start)
        train_step(head, loss, torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=enabled), inputs)
        moved = {name: p.detach() - start[name] for name, p in head.named_parameters()}
        ends.append(moved | {"center": loss.center.clone()})
    error, name = worst_error(*ends)
    budget = 8 * torch.finfo(torch.float16).eps
    assert error <= budget, f"{name}: relative error {error:.2e}, budget {budget:.1e}"


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("loss_class", LOSSES)
def test_a_step_of_features_that_overflow_changes_nothing(loss_class: type[DINOLoss], value: float) -> None:
    head, loss, scaler = make_head(), loss_class(*SCHEDULE), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    train_step(head, loss, scaler, batch())
    before, center = {k: v.clone() for k, v in head.state_dict().items()}, loss.center.clone()
    bad = batch()
    bad[1][2, 3] = value
    train_step(head, loss, scaler, bad)
    assert torch.equal(loss.center, center), "the centre took in a batch that is not finite"
    assert all(torch.equal(v, before[k]) for k, v in head.state_dict().items()), "the step was not skipped"
    assert scaler.get_scale() == 2.0**9
    good = train_step(head, loss, scaler, batch())
    assert good.isfinite()
    assert not torch.equal(loss.center, center), "the next good batch did not move the centre"


def test_the_published_center_is_destroyed_by_such_a_step() -> None:
    """Negative control: what the guard is for."""
    loss, logits = PublishedDINOLoss(*SCHEDULE), torch.randn(2 * IMAGES, PROTOTYPES)
    logits[0, 0] = math.nan
    loss(torch.randn(CROPS * IMAGES, PROTOTYPES), logits, 0)
    assert loss.center.isnan().any()


@pytest.mark.parametrize("dtype", HALVES)
def test_fp32_and_half_sides_may_be_mixed(dtype: torch.dtype) -> None:
    """An fp32 teacher beside a half student, as when only one of them runs under autocast."""
    x, views = batch()
    head, other = make_head(dtype), make_head()
    student, teacher = head(x.to(dtype)), other(views)
    value = DINOLoss(*SCHEDULE)(student, teacher, 0)
    error = relative_error(value, published_value(DINOLoss(*SCHEDULE), student, teacher))
    assert error <= 1e-5, f"relative error {error:.2e}, budget 1e-05"


@pytest.mark.parametrize("dtype", HALVES)
def test_fp32_and_half_logits_may_be_mixed(dtype: torch.dtype) -> None:
    student, teacher = torch.randn(CROPS * IMAGES, PROTOTYPES).to(dtype), torch.randn(2 * IMAGES, PROTOTYPES)
    for pair in ((student, teacher), (student.float(), teacher.to(dtype))):
        value = DINOLoss(*SCHEDULE)(*pair, 0)
        error = relative_error(value, PublishedDINOLoss(*SCHEDULE).double()(*(x.double() for x in pair), 0))
        assert error <= 1e-5, f"relative error {error:.2e}, budget 1e-05"


def test_a_head_may_be_moved_to_half_and_back() -> None:
    head = nn.Sequential(make_head()).half().float()
    assert head(batch()[0]).materialize().isfinite().all()
