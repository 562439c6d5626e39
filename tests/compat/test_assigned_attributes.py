"""What is assigned to a drop-in takes effect, as on the published classes: temperatures, centres, and what waits.

Legend: B images, K prototypes, D bottleneck dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.compat.lightly_networks import published
from tests.compat.test_attributes import (
    DIM,
    EPOCHS,
    IMAGES,
    K2,
    PATCHES,
    SMALL,
    TAU,
    K,
    make_dino,
    make_ibot,
    make_lightly,
    make_solo,
    part,
)
from vmf_kernels import DINOvMFLoss, PrototypeLogits, weight_norm_prototypes
from vmf_kernels.compat import dinov2, dinov3, ibot, lightly

pytestmark = pytest.mark.quick


def logits(rows: int, prototypes: int, seed: int) -> PrototypeLogits:
    random = torch.Generator().manual_seed(seed)
    features = nn.functional.normalize(torch.randn(rows, DIM, generator=random), dim=-1)
    random.manual_seed(99 + prototypes)
    g, v = 0.5 + torch.rand(prototypes, 1, generator=random), torch.randn(prototypes, DIM, generator=random)
    return PrototypeLogits(features, weight_norm_prototypes(g, v))


def views(count: int, seed: int, prototypes: int = K) -> Any:
    return logits(count * IMAGES, prototypes, seed)


def patches(seed: int) -> Any:
    return logits(2 * IMAGES * PATCHES, K2, seed).unflatten(0, (2 * IMAGES, PATCHES))


def masks() -> Tensor:
    return torch.arange(2 * IMAGES * PATCHES).reshape(2 * IMAGES, PATCHES) % 3 > 0


def step_ibot(loss: Any, epoch: int) -> Tensor:
    local = views(loss.nlcrops, 4 + epoch) if loss.nlcrops else None
    student, teacher = (views(2, 2 + epoch), patches(epoch)), (views(2, 3 + epoch), patches(5 + epoch))
    result: dict[str, Tensor] = loss(student, teacher, local, list(masks().chunk(2)), epoch)
    return result["loss"]


def step_solo(loss: Any, epoch: int) -> Tensor:
    loss.epoch = epoch
    return loss(views(loss.num_large_crops, epoch), views(2, 7 + epoch))  # type: ignore[no-any-return]


def step_lazy(loss: Any, epoch: int) -> Tensor:
    teacher = views(2, 7 + epoch)
    targets = loss.softmax_center_teacher(teacher, TAU)
    loss.update_center(teacher)
    if isinstance(loss, dinov3.DINOLoss):
        return loss(views(2, epoch)[None], targets[None])  # type: ignore[no-any-return]
    return loss([views(2, epoch)], [targets])  # type: ignore[no-any-return]


def step_lazy_patches(loss: Any, epoch: int) -> Tensor:
    mask, teacher = masks(), patches(7 + epoch)
    targets = loss.softmax_center_teacher(teacher[mask], TAU).squeeze(0)
    loss.update_center(teacher[mask][None])
    return loss.forward_masked(patches(epoch)[mask], targets, mask)  # type: ignore[no-any-return]


def step_lightly_patches(loss: Any, epoch: int) -> Tensor:
    mask = masks()
    rows = int(mask.sum())
    grid = mask.reshape(2 * IMAGES, 2, -1)
    return loss(logits(rows, K, epoch), logits(rows, K, 9 + epoch), grid)  # type: ignore[no-any-return]


def initialised(loss: Any) -> Any:
    loss.init_weights()
    return loss


class Loss(NamedTuple):
    """How to make one with options, a step of an epoch, and centres by published name."""

    make: Callable[..., Any]
    step: Callable[[Any, int], Tensor]
    centers: tuple[str, ...] = ("center",)


LOSSES = {
    "dino": Loss(make_dino, lambda loss, epoch: loss(views(loss.ncrops, epoch), views(2, 7 + epoch), epoch)),
    "ibot": Loss(make_ibot, step_ibot, ("center", "center2")),
    "solo": Loss(make_solo, step_solo),
    "dinov2": Loss(lambda **options: dinov2.DINOLoss(K, **options), step_lazy),
    "dinov2-patches": Loss(lambda **options: dinov2.iBOTPatchLoss(K2, **options), step_lazy_patches),
    "dinov3": Loss(lambda **options: initialised(dinov3.DINOLoss(K, **options)), step_lazy),
    "dinov3-patches": Loss(lambda **options: initialised(dinov3.iBOTPatchLoss(K2, **options)), step_lazy_patches),
    "lightly": Loss(
        make_lightly,
        lambda loss, epoch: loss(views(2, 7 + epoch).chunk(2), views(3, epoch).chunk(3), epoch=epoch),
    ),
    "lightly-patches": Loss(
        lambda **options: lightly.IBOTPatchLoss(K, **options), step_lightly_patches, ("center.center",)
    ),
}
EVERY = {"student_temp": (0.2, {"student_temp": 0.2}), "center_momentum": (0.3, {"center_momentum": 0.3})}
WARMER = np.array([0.05, 0.09, 0.09, 0.09])
TO_WARMER = {"warmup_teacher_temp": 0.05, "teacher_temp": 0.09}
EPOCH_SCHEDULES = {
    "teacher_temp_schedule": (WARMER, TO_WARMER),
    "teacher_temp_schedule-list": (WARMER.tolist(), TO_WARMER),
    "teacher_temp_schedule-tensor": (torch.from_numpy(WARMER), TO_WARMER),
}
# by attribute: what is assigned, and the constructor's options that say the same
ASSIGNED: dict[str, dict[str, tuple[Any, dict[str, Any]]]] = {
    "dino": EVERY | EPOCH_SCHEDULES | {"ncrops": (5, {"ncrops": 5})},
    "ibot": EVERY
    | EPOCH_SCHEDULES
    | {name: (0.4, {name: 0.4}) for name in ("center_momentum2", "lambda1", "lambda2")}
    | {
        "nlcrops": (3, {"nlcrops": 3}),
        "ncrops": (2, {"nlcrops": 0}),
        "teacher_temp2_schedule": (WARMER, {"warmup_teacher_temp2": 0.05, "teacher_temp2": 0.09}),
    },
    "solo": EVERY | EPOCH_SCHEDULES | {"num_large_crops": (3, {"num_large_crops": 3})},
    "dinov2": EVERY,
    "dinov2-patches": EVERY,
    "dinov3": EVERY,
    "dinov3-patches": EVERY,
    "lightly": EVERY
    | {
        "teacher_temp_schedule": (torch.tensor([0.05, 0.09]), {"warmup_teacher_temp": 0.05, "teacher_temp": 0.09}),
        "warmup_teacher_temp_epochs": (0, {"warmup_teacher_temp_epochs": 0}),
    },
    "lightly-patches": {
        "teacher_temp": (0.08, {"teacher_temp": 0.08}),
        "student_temp": (0.2, {"student_temp": 0.2}),
        "center.momentum": (0.3, {"center_momentum": 0.3}),
        "center_momentum": (0.3, {"center_momentum": 0.3}),
    },
}


def run(name: str, loss: Any) -> list[Tensor]:
    """Two steps' losses, and the centres they leave."""
    of = LOSSES[name]
    return [of.step(loss, 0), of.step(loss, 1), *(value.clone() for value in loss.state_dict().values())]


@pytest.mark.parametrize(("name", "attribute"), [(name, a) for name, table in ASSIGNED.items() for a in table])
def test_what_is_assigned_takes_effect(name: str, attribute: str) -> None:
    value, options = ASSIGNED[name][attribute]
    built, assigned, as_before = (LOSSES[name].make(**given) for given in (options, {}, {}))
    *path, last = attribute.split("-")[0].split(".")
    setattr(part(assigned, ".".join(path)) if path else assigned, last, value)
    got, expected = run(name, assigned), run(name, built)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)
    before = run(name, as_before)
    assert any((one - other).abs().max() > 1e-4 for one, other in zip(got, before, strict=True)), "no effect at all"


def test_a_schedule_of_lightly_is_written_to() -> None:
    loss, other = make_lightly(), make_lightly(warmup_teacher_temp=0.05)
    loss.teacher_temp_schedule[0] = 0.05
    assert LOSSES["lightly"].step(loss, 0) == LOSSES["lightly"].step(other, 0)


@pytest.mark.parametrize("make", [make_dino, make_ibot, make_solo])
def test_a_schedule_that_is_not_one_is_refused(make: Callable[..., Any]) -> None:
    loss = make()
    with pytest.raises(ValueError, match="read-only"):
        loss.teacher_temp_schedule[0] = 0.1
    for wrong in ([], [0.1, 0.0], [[0.1]]):
        with pytest.raises(
            ValueError, match=r"teacher_temp_schedule is assigned .* expected one number > 0 for each epoch"
        ):
            loss.teacher_temp_schedule = wrong
    with pytest.raises(ValueError, match="student_temp is 0; expected a number > 0"):
        loss.student_temp = 0
    with pytest.raises(ValueError, match=r"center_momentum is 1; expected a number in \[0, 1\)"):
        loss.center_momentum = 1


@pytest.mark.parametrize("shape", ["row", "vector", "published"])
@pytest.mark.parametrize("name", LOSSES)
def test_a_center_is_assigned_by_its_values(name: str, shape: str) -> None:
    of = LOSSES[name]
    loss, loaded = of.make(), of.make()
    of.step(loss, 0)  # a batch before, which the centre forgets, or which waits
    of.step(loaded, 0)
    state = loaded.state_dict()
    loss.state_dict()  # what waits moves the centre, as it does in the one that is saved and loaded
    for number, center in enumerate(of.centers):
        value = torch.linspace(-0.3, 0.2 + number, state[center].numel(), dtype=torch.float64)
        state[center] = value.reshape(state[center].shape).float()
        *path, last = center.split(".")
        given = {"row": value[None], "vector": value, "published": state[center].half().double()}[shape]
        if shape == "published":
            state[center] = given.float()
        setattr(part(loss, ".".join(path)) if path else loss, last, given)
    loaded.load_state_dict(state)
    now = loss.state_dict()
    assert list(now) == list(state)
    for key, value in now.items():
        assert (value.dtype, value.shape) == (torch.float32, state[key].shape)
        assert torch.equal(value, state[key])
    assert of.step(loss, 1) == of.step(loaded, 1)


@pytest.mark.parametrize("name", LOSSES)
def test_a_center_of_another_kind_is_refused(name: str) -> None:
    loss = LOSSES[name].make()
    k = next(iter(loss.state_dict().values())).numel()
    for wrong in (
        torch.zeros(k + 1),
        torch.zeros(k, 1),
        torch.zeros(2, k),
        torch.zeros(k, dtype=torch.int64),
        None,
        0.0,
    ):
        with pytest.raises(
            ValueError, match=r"center is assigned .*; expected a floating-point tensor \[.*\], or \[K\]"
        ):
            loss.center = wrong


@pytest.mark.parametrize("name", ["dino", "ibot", "solo", "lightly", "lightly-patches"])
def test_without_a_center_none_is_assigned(name: str) -> None:
    loss = LOSSES[name].make(centering="sinkhorn_knopp")
    for attribute, value in (("center", torch.zeros(1, K)), ("center_momentum", 0.5)):
        with pytest.raises(
            ValueError, match="SinkhornKnopp keeps no centre; expected centering='logit' or 'probability'"
        ):
            setattr(loss, attribute, value)
    if name != "lightly-patches":  # whose ``center`` is the rule
        assert not hasattr(loss, "center")


STORED = {"unstored": lambda x: x, "stored": lambda x: x.materialize()}


@pytest.mark.parametrize("kind", STORED)
@pytest.mark.parametrize("name", ["dino", "solo", "ibot"])
def test_update_center_moves_the_center_by_its_batch(name: str, kind: str) -> None:
    loss = LOSSES[name].make(center_momentum=0.8)
    expected = {"center": torch.zeros(1, K), "center2": torch.zeros(1, 1, K2)}
    for seed in range(2):
        teacher, of_patches = STORED[kind](views(2, seed)), STORED[kind](patches(seed))
        loss.update_center(*([teacher, of_patches] if name == "ibot" else [teacher]))
        for center, rows, m in (("center", views(2, seed), 0.8), ("center2", patches(seed), 0.9)):
            mean = rows.materialize().flatten(0, -2).mean(0)
            expected[center] = m * expected[center] + (1 - m) * mean
    for center in LOSSES[name].centers:
        torch.testing.assert_close(getattr(loss, center), expected[center])


@pytest.mark.parametrize("kind", STORED)
def test_update_center_does_what_a_call_of_the_loss_does(kind: str) -> None:
    called, moved = make_dino(), make_dino()
    called(STORED[kind](views(3, 0)), STORED[kind](views(2, 1)), 1)
    moved.update_center(STORED[kind](views(2, 1)))
    assert torch.equal(called.center, moved.center)


def test_a_center_of_probabilities_moves_at_its_temperature() -> None:
    called, moved = (DINOvMFLoss(K, 3, 0.04, 0.07, 2, EPOCHS) for _ in range(2))
    called(views(3, 0), views(2, 1), 1)
    moved.update_center(views(2, 1), 1)
    torch.testing.assert_close(called.center, moved.center)  # a sum of the loss's pass, and one of its own
    with pytest.raises(ValueError, match="depend on the teacher's temperature; expected the epoch"):
        moved.update_center(views(2, 1))
    with pytest.raises(ValueError, match="without the prototypes' norms"):
        moved.update_center(views(2, 1).materialize(), 1)


def test_update_center_takes_what_waits_along() -> None:
    loss, other = make_dino(center_update="manual"), make_dino()
    loss(views(3, 0), views(2, 1), 1)
    assert loss.center.eq(0).all()
    loss.update_center()
    other.update_center(views(2, 1))
    assert torch.equal(loss.center, other.center)


def test_lightly_s_center_moves_by_itself() -> None:
    loss = lightly.IBOTPatchLoss(K)
    theirs = published().IBOTPatchLoss(K)
    assert isinstance(loss.center, lightly.RankMeanCenter)
    for center, rows in ((loss.center, views(2, 0)), (theirs.center, views(2, 0).materialize())):
        center.update(rows)
    torch.testing.assert_close(loss.center.value, theirs.center.value)


@pytest.mark.parametrize("name", ["dinov2", "dinov2-patches"])
def test_what_waits_can_be_looked_at(name: str) -> None:
    loss = LOSSES[name].make()
    LOSSES[name].step(loss, 0)
    rows = views(2, 7) if name == "dinov2" else patches(7)[masks()]
    length = loss.len_teacher_output if name == "dinov2" else loss.len_teacher_patch_tokens
    mean = rows.materialize().mean(0).reshape(loss.center.shape)
    assert not loss.updated
    torch.testing.assert_close((loss.async_batch_center / length).to(mean), mean)


@pytest.mark.parametrize("distributed", [False, True])
def test_nearest_rows_are_those_of_dot_products(distributed: bool) -> None:
    rows = nn.functional.normalize(torch.randn(6, 4), dim=-1)
    similarity = (rows @ rows.T).fill_diagonal_(-2)
    if distributed:
        got = dinov3.KoLeoLossDistributed(topk=2).pairwise_NNs_inner(rows[2:4], rows, 1)
        assert torch.equal(got, similarity[2:4].topk(2, dim=1).indices)
    else:
        assert torch.equal(dinov2.KoLeoLoss().pairwise_NNs_inner(rows), similarity.argmax(1))


def test_a_normalisation_over_logits_is_not_passed_over() -> None:
    head = ibot.iBOTHead(3, K, patch_out_dim=K, **SMALL)
    head.last_norm = nn.BatchNorm1d(K, affine=False)
    with pytest.raises(ValueError, match="last_norm is set"):
        head(torch.randn(4, 3))
