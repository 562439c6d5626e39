"""What ``compat.dinov2`` and ``compat.dinov3`` refuse, and that their sections of the README run."""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.compat.test_dinov2_parts import PROTOTYPES, TAU, logits, made
from vmf_kernels.compat import dinov2, dinov3
from vmf_kernels.targets import TeacherTargets

README = (Path(dinov2.__file__).parent / "README.md").read_text()

REFUSED: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: dinov2.DINOLoss(5, student_temp=0.0), ValueError, "student_temp is 0.0; expected a number > 0"),
    (
        lambda: dinov2.DINOLoss(5, center_momentum=1.0),
        ValueError,
        r"center_momentum is 1.0; expected a number in \[0, 1\)",
    ),
    (lambda: dinov3.iBOTPatchLoss(0), ValueError, "the number of prototypes is 0"),
    (lambda: dinov2.DINOLoss(5, backend="cuda"), ValueError, "unknown backend 'cuda'"),
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
        lambda: made(dinov2.iBOTPatchLoss).forward_masked(logits(4), TeacherTargets(logits(3), TAU), torch.ones(1, 3)),
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
        "loss_group_size is 4 but this rank has 6 of 6",
    ),
]


@pytest.mark.parametrize("number", range(len(REFUSED)))
def test_bad_input_is_named(number: int) -> None:
    attempt, error, message = REFUSED[number]
    with pytest.raises(error, match=message):
        attempt()


@pytest.mark.parametrize("name", ["dinov2", "dinov3"])
def test_readme_blocks_run_and_its_diff_names_what_exists(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    section = README.split(f"\n## facebookresearch/{name}\n")[1].split("\n## ")[0]
    blocks = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    assert len(blocks) == 1
    exec(compile(blocks[0], f"compat/README.md, {name}", "exec"), {})
    printed = capsys.readouterr().out
    assert printed.strip()
    assert "nan" not in printed
    imported = re.findall(rf"^\+from vmf_kernels\.compat\.{name} import (.+)$", section, flags=re.MULTILINE)
    assert imported, "the diff is gone"
    names = [part.strip() for line in imported for part in line.split(",")]
    missing = [
        part for part in names if not isinstance(getattr({"dinov2": dinov2, "dinov3": dinov3}[name], part, None), type)
    ]
    assert not missing, f"the diff imports {missing}, which the drop-in lacks"
    assert issubclass(dinov3.SinkhornKnoppTeacher, nn.Module)
