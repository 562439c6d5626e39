"""The errors that callers of the losses see: one sentence with what was got and what was expected."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.steps import (
    CROPS,
    DIM,
    IN_DIM,
    OUTPUTS,
    SCHEDULE,
    STEPS,
    networks,
    our_step,
    outputs,
)
from vmf_kernels import (
    DINOLoss,
    DINOvMFLoss,
    LogitCenter,
    PrototypeLogits,
    linear_prototypes,
    normalized_prototypes,
)

pytestmark = pytest.mark.quick

ARGUMENTS = [
    pytest.param({"student_temp": 0.0}, "student_temp is 0.0; expected a number > 0", id="student_temp"),
    pytest.param({"teacher_temp": -1.0}, "teacher_temp is -1.0; expected a number > 0", id="teacher_temp"),
    pytest.param({"warmup_teacher_temp": float("nan")}, "warmup_teacher_temp is nan", id="warmup_teacher_temp"),
    pytest.param({"ncrops": 1}, "ncrops is 1; expected at least 2", id="ncrops"),
    pytest.param({"ncrops": 2.0}, r"ncrops is 2\.0; expected at least 2, as an int", id="ncrops-float"),
    pytest.param({"out_dim": "50"}, "out_dim is '50'; expected at least 1 prototype, as an int", id="out_dim-str"),
    pytest.param({"nepochs": 2}, "nepochs is 2 and warmup_teacher_temp_epochs 3", id="nepochs"),
    pytest.param({"nepochs": 0, "warmup_teacher_temp_epochs": 0}, "expected nepochs of at least 1", id="no-epochs"),
    pytest.param({"center_momentum": 1.0}, r"center momentum is 1.0; expected a number in \[0, 1\)", id="momentum"),
    pytest.param({"center_start": "x"}, "start is 'x'; expected one of zero, first_batch", id="start"),
    pytest.param({"center_update": "x"}, "center_update is 'x'; expected one of forward, manual", id="update"),
]


@pytest.mark.parametrize(("change", "message"), ARGUMENTS)
@pytest.mark.parametrize("loss_class", [DINOLoss, DINOvMFLoss])
def test_wrong_options_are_refused(loss_class: type[DINOLoss], change: dict[str, Any], message: str) -> None:
    names = ("out_dim", "ncrops", "warmup_teacher_temp", "teacher_temp", "warmup_teacher_temp_epochs", "nepochs")
    with pytest.raises(ValueError, match=message):
        loss_class(**(dict(zip(names, (50, *SCHEDULE), strict=True)) | change))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"centering": "x"}, "centering is 'x'; expected one of logit, probability, sinkhorn_knopp"),
        ({"center_average": "x"}, "average is 'x'; expected one of log_probability, probability"),
    ],
    ids=["centering", "average"],
)
def test_wrong_vmf_options_are_refused(option: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DINOvMFLoss(50, *SCHEDULE, **option)


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ((14, 6), "student output has 14 rows; expected a multiple of its 5 crops"),
        ((15, 5), "teacher output has 5 rows; expected a multiple of its 2 crops"),
        ((15, 4), "expected the same number of images, got 2 and 3"),
    ],
    ids=["student", "teacher", "images"],
)
def test_rows_that_do_not_fit_are_refused(rows: tuple[int, int], message: str, output: str) -> None:
    student, teacher = networks(50, torch.float32)
    with pytest.raises(ValueError, match=message):
        our_step(DINOLoss(50, *SCHEDULE), output)(
            student, teacher, torch.randn(rows[0], IN_DIM), torch.randn(rows[1], IN_DIM), 0
        )


@pytest.mark.parametrize("epoch", [-1, STEPS])
def test_an_epoch_out_of_range_is_refused(epoch: int) -> None:
    with pytest.raises(ValueError, match=f"epoch is {epoch}; expected 0 to {STEPS - 1}"):
        DINOLoss(50, *SCHEDULE)(*outputs(), epoch)


@pytest.mark.parametrize("loss_class", [DINOLoss, DINOvMFLoss])
@pytest.mark.parametrize("stored_side", ["student", "teacher"])
def test_one_stored_side_is_refused(loss_class: type[DINOLoss], stored_side: str) -> None:
    student, teacher = outputs()
    pair = (student.materialize(), teacher) if stored_side == "student" else (student, teacher.materialize())
    with pytest.raises(TypeError, match="expected both heads to return PrototypeLogits, or both plain logits"):
        loss_class(50, *SCHEDULE)(*pair, 0)


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("start", ["zero", "first_batch"])
@pytest.mark.parametrize("loss_class", [DINOLoss, DINOvMFLoss])
def test_another_number_of_prototypes_than_the_center_is_refused(
    loss_class: type[DINOLoss], start: str, output: str
) -> None:
    student, teacher = networks(50, torch.float32)
    loss = loss_class(51, *SCHEDULE, center_start=start)
    with pytest.raises(ValueError, match="50 prototypes; expected out_dim = 51"):
        our_step(loss, output)(student, teacher, torch.randn(15, IN_DIM), torch.randn(6, IN_DIM), 0)


@pytest.mark.parametrize("output", OUTPUTS)
def test_different_numbers_of_prototypes_are_refused(output: str) -> None:
    student, teacher = networks(49, torch.float32)[0], networks(50, torch.float32)[1]
    with pytest.raises(ValueError, match=r"49.*50.*both networks must have the same"):
        our_step(DINOLoss(50, *SCHEDULE), output)(student, teacher, torch.randn(15, IN_DIM), torch.randn(6, IN_DIM), 0)


def test_plain_logits_without_norms_are_refused_by_dino_vmf() -> None:
    student, teacher = (output.materialize() for output in outputs())
    with pytest.raises(ValueError, match=r"expected student_prototypes=.*weight_norm_prototypes"):
        DINOvMFLoss(50, *SCHEDULE)(student, teacher, 0)


def test_prototypes_that_do_not_fit_the_plain_logits_are_refused_by_dino_vmf() -> None:
    student, teacher = outputs()
    other = linear_prototypes(torch.randn(49, DIM))
    with pytest.raises(ValueError, match="49"):
        DINOvMFLoss(50, *SCHEDULE)(
            student.materialize(),
            teacher.materialize(),
            0,
            student_prototypes=student.prototypes,
            teacher_prototypes=other,
        )


@pytest.mark.parametrize("output", OUTPUTS)
def test_normalized_prototypes_are_refused_by_dino_vmf(output: str) -> None:
    student = PrototypeLogits(torch.randn(15, DIM), normalized_prototypes(torch.randn(50, DIM)))
    teacher = student[:6]
    loss = DINOvMFLoss(50, *SCHEDULE)
    with pytest.raises(ValueError, match="normalized prototypes all have norm 1"):
        our_step(loss, output)(nn.Identity(), nn.Identity(), student, teacher, 0)  # type: ignore[arg-type]


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown backend 'x'; expected one of auto"):
        DINOLoss(50, *SCHEDULE, backend="x")(*outputs(), 0)


def test_an_error_leaves_the_center_alone() -> None:
    student, teacher = outputs()
    loss = DINOLoss(50, *SCHEDULE)
    with pytest.raises(ValueError, match="rows"):
        loss(student[:14], teacher, 0)
    loss.update_center()
    assert loss.center.eq(0).all()
    assert isinstance(loss.centering, LogitCenter)


def unlike(what: str) -> tuple[PrototypeLogits, PrototypeLogits]:
    """A student's and a teacher's output that differ in K or D or the number of images, or in nothing."""
    prototypes, dim, images = {"K": (49, DIM, 3), "images": (50, DIM, 2)}.get(what, (50, DIM, 3))
    student = PrototypeLogits(torch.randn(images * CROPS, dim), linear_prototypes(torch.randn(prototypes, dim)))
    return student, PrototypeLogits(torch.randn(6, DIM), linear_prototypes(torch.randn(50, DIM)))


@pytest.mark.parametrize(
    ("what", "output"),
    [("K", "unstored"), ("K", "stored"), ("images", "unstored"), ("images", "stored")],
)
@pytest.mark.parametrize("centering", ["logit", "probability"])
def test_an_error_starts_no_center(centering: str, what: str, output: str) -> None:
    loss = DINOLoss(50, *SCHEDULE, centering=centering, center_start="first_batch")
    pair = unlike(what)
    with pytest.raises(ValueError, match="the same"):
        loss(*(pair if output == "unstored" else [side.materialize() for side in pair]), 0)
    assert loss.center.isnan().all()


@pytest.mark.parametrize("centering", ["logit", "probability"])
def test_outputs_that_fit_start_the_center(centering: str) -> None:
    """Negative control of the one above."""
    loss = DINOLoss(50, *SCHEDULE, centering=centering, center_start="first_batch")
    loss(*unlike("nothing"), 0)
    assert loss.center.isfinite().all()


@pytest.mark.parametrize("make", [DINOLoss, DINOvMFLoss])
def test_backend_is_known_when_the_loss_is_made(make: type[DINOLoss]) -> None:
    with pytest.raises(ValueError, match="unknown backend 'fast'; expected one of auto, reference, streaming, native"):
        make(7, 2, 0.04, 0.04, 0, 1, backend="fast")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda loss: loss([torch.randn(3, 50)] * 5, torch.randn(6, 50), 0),
            "student output is list; expected .*torch.cat",
        ),
        (lambda loss: loss(torch.randn(15, 50), {"x": 1}, 0), "teacher output is dict; expected PrototypeLogits or"),
    ],
    ids=["list of crops", "dict"],
)
def test_outputs_that_are_no_logits_are_refused(call: Callable[[DINOLoss], Tensor], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        call(DINOLoss(50, *SCHEDULE))


def test_an_unknown_option_is_refused_with_the_known_ones() -> None:
    with pytest.raises(TypeError, match=r"unknown option centring; expected one of centering, center_average"):
        DINOLoss(50, *SCHEDULE, centring="logit")  # type: ignore[call-arg]


def test_an_epoch_that_is_no_int_is_refused() -> None:
    with pytest.raises(ValueError, match=r"epoch is 1.0; expected an int"):
        DINOLoss(50, *SCHEDULE)(torch.randn(15, 50), torch.randn(6, 50), 1.0)
