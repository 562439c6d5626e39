"""The drop-in for lightly against lightly's own classes: steps, state dicts, signatures, errors.

Legend: B images, V crops, K prototypes, D bottleneck dim, M masked patches.
"""

from __future__ import annotations

import copy
import inspect
import math
import re
from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn

from tests.compat.lightly_networks import (
    GRID,
    IMAGES,
    IN_DIM,
    PROTOTYPES,
    Record,
    our_network,
    published,
    twin_of,
)
from tests.fuzz.statements.dino import follow
from tests.measure import relative_error, worst_error
from vmf_kernels.compat import lightly
from vmf_kernels.losses import stream
from vmf_kernels.ops.target_cross_entropy import target_cross_entropy

pytestmark = [
    pytest.mark.quick,
    pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning"),  # what lightly's heads are made with
]

BUDGET = {torch.float64: 1e-10, torch.float32: 1e-5}  # relative, in norm, of each tensor of each step
SEEN = 100  # a broken formula must be off by so many budgets
STEPS, CROPS = 6, 5
TEMPS: dict[str, Any] = {"warmup_teacher_temp": 0.04, "teacher_temp": 0.07, "warmup_teacher_temp_epochs": 4}
DTYPES = [pytest.param(torch.float64, id="fp64"), pytest.param(torch.float32, id="fp32")]
HEADS = ["our-head", "lightly-head"]

Step = Callable[[nn.Module, nn.Module, Tensor, int], Tensor]


def train(student: nn.Module, teacher: nn.Module, loss: nn.Module, step: Step) -> Record:
    """Steps of momentum SGD, the teacher following; every loss, gradient and centre by step."""
    batches = torch.Generator().manual_seed(1)
    optimizer = torch.optim.SGD([p for p in student.parameters() if p.requires_grad], lr=0.02, momentum=0.5)
    dtype = next(student.parameters()).dtype
    teacher.requires_grad_(False)
    record: Record = {}
    for i in range(STEPS):
        x = torch.randn(CROPS, IMAGES, math.prod(GRID), IN_DIM, generator=batches, dtype=torch.float64)
        x = x.float().to(dtype).requires_grad_()
        optimizer.zero_grad()
        value = step(student, teacher, x, i)
        value.backward()
        assert x.grad is not None
        (center,) = loss.state_dict().values()
        gradients = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
        measured = {"loss": value.detach(), "input": x.grad, "center": center.clone(), **gradients}
        record |= {f"step {i} {name}": tensor.clone() for name, tensor in measured.items()}
        optimizer.step()
        follow(teacher, student, 0.9)
    return record


def dino_step(loss: Any, given: str = "epoch") -> Step:
    """Crops of one token each, head by head as in lightly's examples."""

    def step(student: nn.Module, teacher: nn.Module, x: Tensor, i: int) -> Tensor:
        choices: dict[str, Any] = {"epoch": {"epoch": i}, "argument": {"teacher_temp": 0.03 + 0.01 * i}, "default": {}}
        teacher_out = [teacher(view.detach() + 0.1) for view in x[:2, :, 0]]
        student_out = [student(view) for view in x[:, :, 0]]
        return loss(teacher_out, student_out, **choices[given])  # type: ignore[no-any-return]

    return step


def masks(step: int) -> Tensor:
    """[B, H, W] of a step; the first image has none masked."""
    mask = torch.rand(2 * IMAGES, *GRID, generator=torch.Generator().manual_seed(step)) < 0.4
    mask[0] = False
    return mask


def patch_step(loss: Any) -> Step:
    def step(student: nn.Module, teacher: nn.Module, x: Tensor, i: int) -> Tensor:
        mask = masks(i)
        patches = x[:2].flatten(0, 1)[mask.flatten(1)]
        temperature = [None, 0.05][i % 2]
        return loss(teacher(patches.detach() + 0.1), student(patches), mask, temperature)  # type: ignore[no-any-return]

    return step


LOSSES: dict[str, tuple[Callable[..., Any], Callable[..., Step], dict[str, Any]]] = {
    "DINOLoss": (lightly.DINOLoss, dino_step, TEMPS),
    "IBOTPatchLoss": (lightly.IBOTPatchLoss, patch_step, {"teacher_temp": 0.07}),
}


def error_over_steps(name: str, head: str, dtype: torch.dtype, *given: str, **changed: Any) -> tuple[float, str]:
    """The worst error against lightly in fp64 from the same numbers; ``changed`` options are of our side only."""
    make, step, options = LOSSES[name]
    frozen = changed.pop("frozen", False)
    networks = our_network(dtype, frozen=frozen), our_network(dtype, frozen=frozen)
    oracle = getattr(published(), name)(PROTOTYPES, **options).double()
    student, teacher = (twin_of(network, torch.float64, norm_last_layer=frozen) for network in networks)
    expected = train(student, teacher, oracle, step(oracle, *given))
    ours = make(PROTOTYPES, **(options | changed)).to(dtype)
    if head == "our-head":
        return worst_error(train(*networks, ours, step(ours, *given)), expected)
    student, teacher = (twin_of(network, dtype, norm_last_layer=frozen) for network in networks)
    return worst_error(train(student, teacher, ours, step(ours, *given)), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", LOSSES)
def test_steps_equal_lightly_s(name: str, head: str, dtype: torch.dtype) -> None:
    error, quantity = error_over_steps(name, head, dtype)
    assert error <= BUDGET[dtype], f"{quantity}: relative error {error:.2e}, budget {BUDGET[dtype]:.0e}"


@pytest.mark.parametrize("given", ["argument", "default"])
def test_teacher_temperature_may_come_as_an_argument_or_from_the_constructor(given: str) -> None:
    error, quantity = error_over_steps("DINOLoss", "our-head", torch.float64, given)
    assert error <= 1e-10, f"{quantity}: relative error {error:.2e}, budget 1e-10"


@pytest.mark.parametrize("name", LOSSES)
def test_steps_with_frozen_norms_equal_lightly_s(name: str) -> None:
    error, quantity = error_over_steps(name, "our-head", torch.float64, frozen=True)
    assert error <= 1e-10, f"{quantity}: relative error {error:.2e}, budget 1e-10"


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("DINOLoss", {"center_momentum": 0.8}),
        ("DINOLoss", {"student_temp": 0.11}),
        ("DINOLoss", {"warmup_teacher_temp_epochs": 3}),
        ("IBOTPatchLoss", {"center_momentum": 0.8}),
        ("IBOTPatchLoss", {"teacher_temp": 0.06}),
    ],
    ids=["momentum", "student-temp", "warm-up", "patch-momentum", "patch-temp"],
)
def test_a_changed_option_is_seen(name: str, changed: dict[str, Any]) -> None:
    """Negative control of the comparisons above."""
    error, _ = error_over_steps(name, "our-head", torch.float32, **changed)
    assert error > SEEN * BUDGET[torch.float32], f"relative difference {error:.2e}"


@pytest.mark.parametrize("seen_views", [(1, 2), (2, 2), (3, 2), (2, 5)])
def test_any_number_of_views_on_either_side_is_averaged_as_there(seen_views: tuple[int, int]) -> None:
    teacher_out, student_out = ([torch.randn(IMAGES, 50).double() for _ in range(n)] for n in seen_views)
    error = relative_error(
        lightly.DINOLoss(50)(teacher_out, student_out), published().DINOLoss(50)(teacher_out, student_out)
    )
    assert error <= 1e-10, f"relative error {error:.2e}, budget 1e-10"


@pytest.mark.parametrize("head", HEADS)
def test_all_pairs_take_one_operator_call(head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Mock(side_effect=target_cross_entropy)
    monkeypatch.setattr(stream, "target_cross_entropy", counted)
    network: nn.Module = our_network(torch.float32)
    loss = lightly.DINOLoss(PROTOTYPES)
    if head == "lightly-head":
        network = twin_of(network, torch.float32)
    dino_step(loss)(network, network, torch.randn(CROPS, IMAGES, 1, IN_DIM), 0)
    assert counted.call_count == 1


def test_no_gradient_reaches_the_teacher() -> None:
    """Unlike lightly, which the second half shows."""
    for make, gets in ((lightly.DINOLoss, False), (published().DINOLoss, True)):
        teacher_out = [torch.randn(IMAGES, 50, requires_grad=True) for _ in range(2)]
        make(50)(teacher_out, [torch.randn(IMAGES, 50, requires_grad=True) for _ in range(2)]).backward()
        assert (teacher_out[0].grad is not None) == gets


@pytest.mark.parametrize("p", [1, 2, 3.5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_koleo_steps_equal_lightly_s(dtype: torch.dtype, p: float) -> None:
    records = []
    backbone = nn.Linear(6, 5)
    for loss, kind in ((lightly.KoLeoLoss(p), dtype), (published().KoLeoLoss(p), torch.float64)):
        model, random = copy.deepcopy(backbone).to(kind), torch.Generator().manual_seed(2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        record: Record = {}
        for i in range(STEPS):
            optimizer.zero_grad()
            value = loss(model(torch.randn(7, 6, generator=random).to(kind)))
            value.backward()
            optimizer.step()
            gradients = {name: q.grad.clone() for name, q in model.named_parameters() if q.grad is not None}
            record |= {f"step {i} {name}": t for name, t in {"loss": value.detach(), **gradients}.items()}
        records.append(record)
    error, quantity = worst_error(*records)
    assert error <= BUDGET[dtype], f"{quantity}: relative error {error:.2e}, budget {BUDGET[dtype]:.0e}"


def test_koleo_of_another_norm_is_another_loss() -> None:
    """Negative control."""
    x = torch.randn(7, 6)
    assert relative_error(lightly.KoLeoLoss(1)(x), published().KoLeoLoss(2)(x)) > 1e-2


@pytest.mark.parametrize("name", LOSSES)
def test_center_goes_both_ways(name: str) -> None:
    make, step, options = LOSSES[name]
    ours, theirs = make(PROTOTYPES, **options), getattr(published(), name)(PROTOTYPES, **options)
    network = our_network(torch.float32)
    x = torch.randn(CROPS, IMAGES, math.prod(GRID), IN_DIM)
    step(ours)(network, network, x, 0)
    theirs.load_state_dict(ours.state_dict())
    (key, moved), *more = theirs.state_dict().items()
    assert not more
    assert moved.ne(0).any(), "the centre has not moved"
    again = make(PROTOTYPES, **options)
    again.load_state_dict(theirs.state_dict())
    assert torch.equal(again.state_dict()[key], ours.state_dict()[key])
    assert again.state_dict()[key].shape == moved.shape


@pytest.mark.parametrize(
    "name", ["DINOLoss", "IBOTPatchLoss", "KoLeoLoss", "DINOProjectionHead", "DINOv2ProjectionHead"]
)
@pytest.mark.parametrize("method", ["__init__", "forward"])
def test_signature_starts_with_the_published_one(name: str, method: str) -> None:
    got, expected = (
        list(inspect.signature(getattr(getattr(package, name), method)).parameters.values())[1:]
        for package in (lightly, published())
    )
    if (name, method) == ("KoLeoLoss", "forward"):
        assert len(got) == len(expected) == 1  # its one argument has another name
        return
    assert [(p.name, p.default) for p in got[: len(expected)]] == [(p.name, p.default) for p in expected]
    assert all(p.kind in (p.KEYWORD_ONLY, p.VAR_KEYWORD) for p in got[len(expected) :])


def test_manual_update_moves_the_center_once() -> None:
    views = [torch.randn(IMAGES, 50) for _ in range(4)]
    manual, whole = lightly.DINOLoss(50, center_update="manual"), lightly.DINOLoss(50)
    for half in (views[:2], views[2:]):
        manual(half, half)
    assert manual.center.eq(0).all()
    manual.update_center()
    whole.update_center(torch.stack(views))
    torch.testing.assert_close(manual.center, whole.center)
    theirs = published().DINOLoss(50)
    theirs.update_center(torch.stack(views))
    torch.testing.assert_close(whole.center, theirs.center)


@pytest.mark.parametrize("given", [{"epoch": 1}, {"teacher_temp": 0.05}, {}], ids=["epoch", "argument", "default"])
def test_a_center_of_probabilities_moves_at_the_temperature_of_the_step(given: dict[str, Any]) -> None:
    """The last comparison is the negative control: the final temperature gives another centre."""
    views = [torch.randn(IMAGES, 50) for _ in range(2)]
    by_hand, in_step, final = (lightly.DINOLoss(50, **TEMPS, centering="probability") for _ in range(3))
    by_hand.update_center(torch.stack(views), **given)
    in_step(views, views, **given)
    assert torch.equal(by_hand.center, in_step.center)
    final.update_center(torch.stack(views))
    assert torch.equal(final.center, in_step.center) == (not given)


@pytest.mark.parametrize("output", ["unstored", "stored"])
def test_no_masked_patch_is_a_loss_of_zero(output: str) -> None:
    head, loss = our_network(torch.float32), lightly.IBOTPatchLoss(PROTOTYPES)
    rows = head(torch.randn(0, IN_DIM))
    rows = rows if output == "unstored" else rows.materialize()
    value = loss(rows.detach(), rows, torch.zeros(2, *GRID, dtype=torch.bool))
    value.backward()
    assert value == 0
    assert loss.state_dict()["center.center"].eq(0).all()
    theirs = published().IBOTPatchLoss(PROTOTYPES)
    theirs(torch.randn(0, PROTOTYPES), torch.randn(0, PROTOTYPES), torch.zeros(2, *GRID, dtype=torch.bool))
    assert theirs.center.value.isnan().all(), "the README says that lightly's centre turns NaN"
    assert head.last_layer.weight_v.grad is None or head.last_layer.weight_v.grad.eq(0).all()


LOGITS = [torch.zeros(2, 9)] * 2
MASK = torch.tensor([[[True, False], [True, True]]])


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: lightly.DINOLoss(9, center_mode="median"), "center_mode is 'median'; expected one of mean"),
        (lambda: lightly.DINOLoss(9, teacher_temp=0.0), "teacher_temp is 0.0; expected a number > 0"),
        (lambda: lightly.DINOLoss(9)(LOGITS, LOGITS, 0.0), "teacher_temp is 0.0; expected a number > 0"),
        (lambda: lightly.DINOLoss(9)(LOGITS, LOGITS, epoch=-1), "epoch is -1; expected an int >= 0"),
        (lambda: lightly.DINOLoss(9)([], LOGITS), "got 0 teacher views and 2 student views; expected some of each"),
        (lambda: lightly.DINOLoss(9)(LOGITS[:1], LOGITS[:1]), "leave no pair of different views"),
        (
            lambda: lightly.DINOLoss(9)(LOGITS, [torch.zeros(3, 9)] * 2),
            "(2, 9), (2, 9), (3, 9), (3, 9); expected [B, K]",
        ),
        (lambda: lightly.DINOLoss(8)(LOGITS, LOGITS), "teacher output has 9 prototypes; expected out_dim = 8"),
        (lambda: lightly.IBOTPatchLoss(9, center_mode="x"), "center_mode is 'x'; expected one of mean"),
        (
            lambda: lightly.IBOTPatchLoss(9)(*LOGITS, MASK),
            "shape (2, 9) but the mask 3 masked patches; expected [3, K]",
        ),
        (
            lambda: lightly.IBOTPatchLoss(9)(*LOGITS, MASK.int()),
            "mask is torch.int32 of shape (1, 2, 2); expected bool",
        ),
        (lambda: lightly.KoLeoLoss(p=0), "p is 0; expected a number > 0"),
        (lambda: lightly.KoLeoLoss()(torch.zeros(1, 3)), "expected [B, D] with B >= 2"),
        (lambda: lightly.DINOProjectionHead(3, 0, 4, 5), "are 3, 0, 4, 5; expected at least 1, 1, 2 and 1"),
    ],
)
def test_a_mistake_is_named(call: Callable[[], object], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        call()


def test_a_stored_side_against_an_unstored_one_is_refused() -> None:
    head = our_network(torch.float32)
    rows = head(torch.randn(3, IN_DIM))
    with pytest.raises(TypeError, match="student output is PrototypeLogits but teacher output Tensor"):
        lightly.IBOTPatchLoss(PROTOTYPES)(rows.materialize(), rows, MASK)
