"""Empty inputs: without rows the loss is 0, without prototypes there is an error that says so."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, empty

from vmf_kernels import (
    DINOLoss,
    IBOTPatchLoss,
    PrototypeLogits,
    TeacherTargets,
    linear_prototypes,
    logit_cross_entropy,
    matched_prototype_cross_entropy,
    multi_crop_weights,
    prototype_cross_entropy,
    target_cross_entropy,
    unique_prototypes,
)

PROTOTYPES = linear_prototypes(torch.ones(7, 5))
ONE = torch.ones(1, 1)
NO_ROWS = PrototypeLogits(empty(0, 5), PROTOTYPES)
NO_MASK = torch.zeros(0, 3, dtype=torch.bool)

ERRORS: dict[str, tuple[Callable[[], object], str]] = {
    "stored logits of no prototypes": (
        lambda: logit_cross_entropy(empty(2, 0), empty(2, 0), ONE),
        r"student logits are torch.float32 of shape \(2, 0\); expected a floating-point matrix \[rows, K\] with K >= 1",
    ),
    "probabilities of no prototypes": (lambda: target_cross_entropy(empty(2, 0), empty(2, 0), ONE), "with K >= 1"),
    "targets of no prototypes": (
        lambda: TeacherTargets(empty(2, 0), 0.1),
        r"teacher logits are .* of shape \(2, 0\); expected floating point \[\.\.\., K\] with K >= 1",
    ),
    "prototypes of none": (lambda: linear_prototypes(empty(0, 5)), "with K >= 1"),
    "a loss of none": (lambda: DINOLoss(0, 2, 0.04, 0.04, 0, 1), "out_dim is 0; expected at least 1"),
    "a loss of none without centre": (
        lambda: DINOLoss(0, 2, 0.04, 0.04, 0, 1, centering="sinkhorn_knopp"),
        "out_dim is 0; expected at least 1",
    ),
    "no dim of rows": (
        lambda: DINOLoss(4, 2, 0.04, 0.04, 0, 1)(torch.ones(()), torch.ones(()), 0),
        r"student output has shape \(\); expected raw logits \[rows, K\]",
    ),
    "no view of the teacher": (
        lambda: logit_cross_entropy(empty(0, 4), empty(0, 4), empty(0, 1)),
        "teacher has 0 rows, not divisible by its 0 views",
    ),
    "no view of the student": (
        lambda: prototype_cross_entropy(empty(0, 5), PROTOTYPES, empty(0, 5), PROTOTYPES, empty(1, 0)),
        "student has 0 rows, not divisible by its 0 views",
    ),
    "no pair of views": (lambda: multi_crop_weights(0, 2), "leave no pair of different views"),
    "no prototypes to count": (lambda: unique_prototypes(empty(0, 5)), "with K >= 1"),
}
ZERO: dict[str, Callable[[], Tensor]] = {
    "stored": lambda: logit_cross_entropy(empty(0, 4), empty(0, 4), ONE).loss,
    "unstored": lambda: prototype_cross_entropy(empty(0, 5), PROTOTYPES, empty(0, 5), PROTOTYPES, ONE).loss,
    "matched": lambda: matched_prototype_cross_entropy(empty(0, 5), PROTOTYPES, empty(0, 5), PROTOTYPES, empty(0)).loss,
    "probabilities": lambda: target_cross_entropy(empty(0, 4), empty(0, 4), ONE).loss,
    "targets": lambda: target_cross_entropy(NO_ROWS, TeacherTargets(NO_ROWS, 0.1), ONE).loss,
    "DINOLoss": lambda: DINOLoss(7, 2, 0.04, 0.04, 0, 1)(NO_ROWS, NO_ROWS, 0),
    "IBOTPatchLoss": lambda: IBOTPatchLoss(4)(empty(0, 3, 4), empty(0, 3, 4), NO_MASK, 0.1),
    "nothing masked": lambda: IBOTPatchLoss(4)(torch.ones(2, 3, 4), torch.ones(2, 3, 4), torch.zeros(2, 3).bool(), 0.1),
}


@pytest.mark.parametrize("what", ERRORS)
def test_nothing_where_something_must_be_is_named(what: str) -> None:
    call, said = ERRORS[what]
    with pytest.raises(ValueError, match=said):
        call()


@pytest.mark.parametrize("what", ZERO)
def test_no_rows_are_no_loss(what: str) -> None:
    assert ZERO[what]().item() == 0.0
