"""Errors of ``compat.dinov2`` and ``compat.dinov3``, and that their sections of the README run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.compat.test_dinov2_parts import PROTOTYPES, TAU, logits, made
from vmf_kernels.compat import dinov2, dinov3
from vmf_kernels.unstored.teacher_targets import TeacherTargets

pytestmark = pytest.mark.quick

README = (Path(dinov2.__file__).parent / "README.md").read_text()

REFUSED: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: dinov2.DINOLoss(5, student_temp=0.0), ValueError, "student_temp is 0.0; expected a number > 0"),
    (
        lambda: dinov2.DINOLoss(5, center_momentum=1.0),
        ValueError,
        r"center_momentum is 1.0; expected a number in \[0, 1\)",
    ),
    (lambda: dinov3.iBOTPatchLoss(0), ValueError, "num_prototypes is 0; expected at least 1"),
    (lambda: dinov2.DINOLoss(5, backend="numpy"), ValueError, "unknown backend 'numpy'"),
    (lambda: dinov2.DINOHead(4, 0), ValueError, "in_dim, out_dim, hidden_dim, bottleneck_dim are 4, 0, 2048, 256"),
    (
        lambda: made(dinov2.DINOLoss, 5).softmax_center_teacher(logits(3), TAU),
        ValueError,
        "expected rows of the 5 proto",
    ),
    (lambda: made(dinov2.DINOLoss, 5).update_center(logits(3)), ValueError, "expected rows of the 5 prototypes"),
    (lambda: made(dinov2.DINOLoss).softmax_center_teacher(logits(3), 0.0), ValueError, "teacher_temp is 0.0"),
    (
        lambda: made(dinov2.DINOLoss)([logits(3)], [TeacherTargets(logits(4), TAU)]),
        *(ValueError, r"entries have \[3, 4\] rows; expected as many rows in each"),
    ),
    (
        lambda: made(dinov2.DINOLoss)([logits(3)], [torch.rand(3, PROTOTYPES)]),
        *(TypeError, "student is PrototypeLogits but targets are a tensor of probabilities"),
    ),
    (
        lambda: made(dinov2.iBOTPatchLoss).forward_masked(
            logits(4), TeacherTargets(logits(3), TAU), torch.ones(1, 3) > 0
        ),
        *(ValueError, "student, teacher and weights have 4, 3 and 3 masked patches"),
    ),
    (
        lambda: made(dinov2.iBOTPatchLoss)(logits(2, 4), TeacherTargets(logits(2, 4), TAU), torch.ones(2, 3)),
        *(ValueError, r"student_patch_tokens has shape \(2, 4, 61\) and student_masks_flat \(2, 3\)"),
    ),
    (
        lambda: made(dinov3.DINOLoss)(logits(6), TeacherTargets(logits(2, 3), TAU)),
        *(ValueError, r"student_logits have shape \(6, 61\) and teacher_probs \(2, 3, 61\); expected \[S, B, K\]"),
    ),
    (
        lambda: made(dinov3.DINOLoss)(logits(1, 3), TeacherTargets(logits(1, 3), TAU), True),
        *(ValueError, "leave no pair of different views"),
    ),
    (
        lambda: dinov3.DINOLoss(PROTOTYPES).softmax_center_teacher(logits(3), TAU),
        *(RuntimeError, r"center is NaN; expected init_weights\(\) or load_state_dict\(\)"),
    ),
    (lambda: dinov3.KoLeoLossDistributed(0), ValueError, "topk is 0"),
    (lambda: dinov3.KoLeoLossDistributed(1, 0), ValueError, "loss_group_size is 0"),
    (
        lambda: dinov3.KoLeoLossDistributed(1, 4)(torch.randn(6, 3)),
        ValueError,
        r"loss_group_size is 4 but the ranks have \[6\] rows",
    ),
]


@pytest.mark.parametrize("number", range(len(REFUSED)))
def test_bad_input_is_named(number: int) -> None:
    attempt, error, message = REFUSED[number]
    with pytest.raises(error, match=message):
        attempt()


def refusals_of_targets() -> list[Callable[[], Any]]:
    """Raw logits, stored and not, in the place of targets, and targets in the place of logits."""
    loss, patches, v3 = dinov2.DINOLoss(PROTOTYPES), dinov2.iBOTPatchLoss(PROTOTYPES), dinov3.DINOLoss(PROTOTYPES)
    rows, mask = logits(4), torch.ones(2, 2, dtype=torch.bool)
    stacked = torch.stack([rows, rows])  # type: ignore[list-item]
    return [
        lambda: loss([rows], [rows]),
        lambda: patches.forward_masked(rows, rows, mask),  # type: ignore[arg-type]
        lambda: v3(stacked, stacked),
        lambda: loss.update_center(TeacherTargets(rows, TAU)),  # type: ignore[arg-type]
    ]


@pytest.mark.parametrize("number", range(len(refusals_of_targets())))
def test_logits_and_targets_are_not_taken_for_each_other(number: int) -> None:
    with pytest.raises(TypeError, match=r"targets are PrototypeLogits; expected what softmax|output is TeacherTargets"):
        refusals_of_targets()[number]()


def test_stored_logits_are_no_probabilities() -> None:
    rows = logits(4).materialize()
    with pytest.raises(ValueError, match=r"targets go down to -.*; expected probabilities"):
        dinov2.DINOLoss(PROTOTYPES)([rows], [rows])


@pytest.mark.parametrize(
    "mask", [torch.ones(4, dtype=torch.bool), torch.ones(2, 2), None], ids=["flat", "float", "none"]
)
def test_masks_of_another_kind_are_refused(mask: Any) -> None:
    rows = logits(4)
    with pytest.raises(ValueError, match=r"student_masks_flat is .*expected bool"):
        dinov2.iBOTPatchLoss(PROTOTYPES).forward_masked(rows, TeacherTargets(rows, TAU), mask)


def test_the_sinkhorn_of_v3_is_a_module() -> None:
    assert issubclass(dinov3.SinkhornKnoppTeacher, nn.Module)
