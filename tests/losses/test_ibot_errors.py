"""The errors that callers of iBOT's losses see: one sentence with what was got and what was expected."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.losses.ibot_steps import (
    DIM,
    GLOBAL,
    IMAGES,
    PATCHES,
    PROTOTYPES,
    STEPS,
    heads,
    make_batch,
    our_step,
    schedule,
)
from vmf_kernels import PrototypeLogits, linear_prototypes, weight_norm_prototypes
from vmf_kernels.losses.ibot import IBOTLoss, IBOTPatchLoss, IBOTvMFLoss, IBOTvMFPatchLoss

pytestmark = pytest.mark.quick

NAMES = (
    *("out_dim", "patch_out_dim", "ngcrops", "nlcrops", "warmup_teacher_temp", "teacher_temp"),
    *("warmup_teacher_temp2", "teacher_temp2", "warmup_teacher_temp_epochs", "nepochs"),
)
ROWS = GLOBAL * IMAGES
OPTIONS = [
    pytest.param({"student_temp": 0.0}, "student_temp is 0.0; expected a number > 0", id="student_temp"),
    pytest.param({"teacher_temp2": -1.0}, "^teacher_temp2 is -1.0; expected a number > 0", id="teacher_temp2"),
    pytest.param({"nepochs": 2}, "nepochs is 2 and warmup_teacher_temp_epochs 3", id="nepochs"),
    pytest.param({"mim_start_epoch": 3}, "epochs 3, from epoch 3 on; expected nepochs", id="mim_start_epoch"),
    pytest.param({"ngcrops": 0}, "ngcrops is 0 and nlcrops 2; expected a global crop and another one", id="ngcrops"),
    pytest.param({"ngcrops": 1, "nlcrops": 0}, "ngcrops is 1 and nlcrops 0; expected a global crop", id="one-crop"),
    pytest.param({"center_momentum2": 1.0}, r"center momentum is 1.0; expected a number in \[0, 1\)", id="momentum2"),
    pytest.param({"center_tokens": "x"}, "center_tokens is 'x'; expected one of all, masked", id="center_tokens"),
    pytest.param({"centering": "x"}, "centering is 'x'; expected one of logit", id="centering"),
    pytest.param({"backend": "x"}, "unknown backend 'x'; expected one of auto", id="backend"),
]


@pytest.mark.parametrize(("change", "message"), OPTIONS)
@pytest.mark.parametrize("loss_class", [IBOTLoss, IBOTvMFLoss])
def test_wrong_options_are_refused(loss_class: type[IBOTLoss], change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loss_class(**(dict(zip(NAMES, schedule(), strict=True)) | change))


def outputs() -> list[Any]:
    """Arguments of the loss that fit."""
    student, teacher = heads()
    batch = make_batch(0)
    return [student(batch.crops), teacher(batch.views), student(batch.local)[0], batch.masks, 0]


def changed(position: int, change: Any) -> list[Any]:
    given = outputs()
    given[position] = change(given[position])
    return given


BATCHES = [
    pytest.param(0, lambda s: (s[0][:5], s[1]), "student class tokens have 5 rows of global crops", id="student-rows"),
    pytest.param(1, lambda t: (t[0][:5], t[1]), "teacher class tokens have 5 rows; expected a multiple", id="teacher"),
    pytest.param(
        2, lambda _: None, "0 of local ones; expected 6 and 6, of 2 and 2 crops of the 3 images", id="no-local"
    ),
    pytest.param(2, lambda local: local[:5], "5 of local ones; expected 6 and 6", id="local-rows"),
    pytest.param(3, lambda masks: masks[:1], "expected one of .* for each of 2 global crops", id="one-mask"),
    pytest.param(
        3, lambda masks: [m.flatten() for m in masks], r"masks of shapes \[\(27,\), \(27,\)\]", id="flat-masks"
    ),
    pytest.param(3, lambda masks: [m.float() for m in masks], r"mask is torch.float32 .* expected bool", id="float"),
    pytest.param(3, lambda masks: [m[:, :2] for m in masks], r"but the mask \(6, 6\); expected", id="mask-shape"),
    pytest.param(0, lambda s: (s[0], s[1][:, 1:]), rf"student patches have shape \(6, {PATCHES - 1}, ", id="patches"),
    pytest.param(1, lambda t: (t[0], t[1][0]), "teacher patches have shape", id="teacher-patches"),
    pytest.param(1, lambda t: (t[0], heads()[0](make_batch(0).views)[0][:, None]), "teacher patches have", id="kinds"),
    pytest.param(4, lambda _: STEPS, f"epoch is {STEPS}; expected 0 to {STEPS - 1}", id="epoch"),
]


@pytest.mark.parametrize(("position", "change", "message"), BATCHES)
def test_what_does_not_fit_is_refused_and_no_center_moves(position: int, change: Any, message: str) -> None:
    loss = IBOTLoss(*schedule())
    with pytest.raises(ValueError, match=message):
        loss(*changed(position, change))
    loss.update_center()
    assert loss.center.eq(0).all()
    assert loss.center2.eq(0).all()


def test_arguments_that_fit_are_taken() -> None:
    """Negative control of the one above."""
    loss = IBOTLoss(*schedule())
    assert loss(*outputs())["loss"] > 0
    assert loss.center.ne(0).any()


def other_patches(given: Any) -> Any:
    """The same patches with one prototype fewer."""
    cls, patches = given
    return cls, PrototypeLogits(patches.features, linear_prototypes(torch.randn(patches.shape[-1] - 1, DIM)))


UNSTARTED = [
    pytest.param(1, lambda t: (t[0], t[1].unflatten(0, (1, -1))), "teacher patches have shape", id="patches"),
    pytest.param(0, other_patches, r"student has \d+ prototypes but the teacher \d+", id="patches-K"),
    pytest.param(0, lambda s: (s[0], s[1].materialize()[..., 1:]), "PrototypeLogits", id="patches-kind"),
    pytest.param(3, lambda masks: [m[:, :2] for m in masks], r"but the mask \(6, 6\); expected", id="mask"),
]


@pytest.mark.parametrize(("position", "change", "message"), UNSTARTED)
def test_an_error_in_the_patches_starts_neither_center(position: int, change: Any, message: str) -> None:
    loss = IBOTLoss(*schedule(), center_start="first_batch")
    with pytest.raises((ValueError, TypeError), match=message):
        loss(*changed(position, change))
    assert loss.center.isnan().all()
    assert loss.center2.isnan().all()
    loss(*outputs())
    assert loss.center.isfinite().all()
    assert loss.center2.isfinite().all()


@pytest.mark.parametrize("part", [0, 1], ids=["cls", "patch"])
@pytest.mark.parametrize("side", [0, 1], ids=["student", "teacher"])
def test_one_stored_side_is_refused(side: int, part: int) -> None:
    given = outputs()
    if (side, part) == (0, 0):
        given[2] = given[2].materialize()
    given[side] = tuple(logits.materialize() if i == part else logits for i, logits in enumerate(given[side]))
    with pytest.raises(TypeError, match="expected both heads to return PrototypeLogits, or both plain logits"):
        IBOTLoss(*schedule())(*given)


def test_local_class_tokens_of_another_kind_are_refused() -> None:
    with pytest.raises(TypeError, match="expected one kind"):
        IBOTLoss(*schedule())(*changed(2, lambda local: local.materialize()))


def test_local_class_tokens_of_another_head_are_refused() -> None:
    student = heads(prototypes=(7, 7))[0]
    with pytest.raises(ValueError, match=f"has 7 prototypes but the global crops' class tokens {PROTOTYPES[0]}"):
        IBOTLoss(*schedule())(*changed(2, lambda _: student(make_batch(0).local)[0]))


def test_local_class_tokens_of_a_like_head_are_refused() -> None:
    """As many prototypes of the same kind and dim."""
    loss = IBOTLoss(*schedule())
    with pytest.raises(ValueError, match="student_local_cls has other prototypes than the global crops' class tokens"):
        loss(*changed(2, lambda _: heads()[0](make_batch(0).local)[0]))
    assert loss.center.eq(0).all()


def test_local_class_tokens_of_one_kind_and_detachment_are_expected() -> None:
    for change in (PrototypeLogits.detach, with_vmf):
        with pytest.raises(ValueError, match="expected those of one head, both detached or neither"):
            IBOTLoss(*schedule())(*changed(2, change))


def test_local_class_tokens_may_come_with_copies_of_the_prototypes() -> None:
    """As FSDP2 units return them, whose memory differs by call."""
    given = outputs()
    copied = [*given[:2], with_copied_prototypes(given[2]), *given[3:]]
    assert IBOTLoss(*schedule())(*given)["cls"] == IBOTLoss(*schedule())(*copied)["cls"]


def with_vmf(logits: PrototypeLogits) -> PrototypeLogits:
    return PrototypeLogits(logits.features, logits.prototypes.with_vmf())


def with_copied_prototypes(logits: PrototypeLogits) -> PrototypeLogits:
    stored = logits.prototypes
    assert stored.magnitude is not None
    return PrototypeLogits(logits.features, weight_norm_prototypes(stored.magnitude.clone(), stored.weight.clone()))


@pytest.mark.parametrize("swapped", [0, 1], ids=["cls", "patch"])
def test_another_number_of_prototypes_than_the_center_is_refused(swapped: int) -> None:
    counts = (PROTOTYPES[0] + 1, PROTOTYPES[1]) if swapped == 0 else (PROTOTYPES[0], PROTOTYPES[1] + 1)
    with pytest.raises(ValueError, match=f"expected out_dim = {counts[swapped]}"):
        IBOTLoss(*schedule(counts))(*outputs())


def test_plain_logits_are_refused_by_ibot_vmf() -> None:
    with pytest.raises(TypeError, match=r"without the prototypes' norms .* expected heads that return PrototypeLogits"):
        our_step(IBOTvMFLoss(*schedule()), "stored")(*heads(), make_batch(0), 0)


def test_a_teacher_temperature_that_is_not_positive_is_refused() -> None:
    given = outputs()
    mask = torch.cat([mask.flatten(1) for mask in given[3]])
    for loss in (IBOTPatchLoss(PROTOTYPES[1]), IBOTvMFPatchLoss(PROTOTYPES[1])):
        with pytest.raises(ValueError, match=r"temperature is 0\.0; expected a number > 0"):
            loss(given[0][1], given[1][1], mask, 0.0)


def test_masks_that_are_missing_are_named() -> None:
    with pytest.raises(ValueError, match=r"student_mask is None; expected a bool mask"):
        IBOTLoss(5, 5, 2, 0, 0.04, 0.04, 0.04, 0.04, 0, 1)(
            (torch.randn(4, 5), torch.randn(4, 3, 5)),
            (torch.randn(4, 5), torch.randn(4, 3, 5)),
            None,
            None,
            0,
        )


def test_a_tuple_for_the_local_class_tokens_is_refused() -> None:
    cls, patch = torch.randn(4, 5), torch.randn(4, 3, 5)
    with pytest.raises(TypeError, match=r"student output is tuple; expected PrototypeLogits"):
        IBOTLoss(5, 5, 2, 1, 0.04, 0.04, 0.04, 0.04, 0, 1)((cls, patch), (cls, patch), (cls, patch), [], 0)
