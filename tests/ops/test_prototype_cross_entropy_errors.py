"""Bad input of the loss: one sentence with what was got and what was expected."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from vmf_kernels import (
    linear_prototypes,
    matched_prototype_cross_entropy,
    prototype_cross_entropy,
)

S, T, K, D = 6, 4, 17, 5


def arguments() -> dict[str, Any]:
    return {
        "student_features": torch.randn(S, D),
        "student_prototypes": linear_prototypes(torch.randn(K, D)),
        "teacher_features": torch.randn(T, D),
        "teacher_prototypes": linear_prototypes(torch.randn(K, D)),
        "pair_weights": torch.ones(2, 3),
    }


@pytest.mark.quick
def test_the_arguments_below_are_good_but_for_their_one_fault() -> None:
    assert prototype_cross_entropy(**arguments()).loss.isfinite()


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "student features not a matrix": (
        {"student_features": torch.randn(S)},
        r"student features are torch.float32 of shape \(6,\); expected a floating-point matrix",
    ),
    "teacher features of integers": (
        {"teacher_features": torch.ones(T, D, dtype=torch.int64)},
        r"teacher features are torch.int64 of shape \(4, 5\)",
    ),
    "student dim": (
        {"student_features": torch.randn(S, D + 1)},
        "student features have 6 columns but the student prototypes have 5",
    ),
    "teacher dim": (
        {"teacher_features": torch.randn(T, D - 1)},
        "teacher features have 4 columns but the teacher prototypes have 5",
    ),
    "other K": (
        {"teacher_prototypes": linear_prototypes(torch.randn(K + 1, D))},
        r"student prototypes are \[K, D\] = \[17, 5\] but teacher prototypes \[18, 5\]",
    ),
    "features and prototypes apart": (
        {"student_features": torch.randn(S, D, device="meta")},
        "student features are on meta but the student prototypes on cpu; expected one device",
    ),
    "student and teacher apart": (
        {
            "teacher_features": torch.randn(T, D, device="meta"),
            "teacher_prototypes": linear_prototypes(torch.randn(K, D, device="meta")),
        },
        "student features are on cpu but teacher features on meta; expected one device",
    ),
    "bias": ({"teacher_bias": torch.zeros(K - 1)}, "teacher_bias has 16 elements; expected one for each of the 17"),
    "student rows": ({"student_features": torch.randn(7, D)}, "student has 7 rows, not divisible by its 3 views"),
    "teacher rows": ({"teacher_features": torch.randn(3, D)}, "teacher has 3 rows, not divisible by its 2 views"),
    "images": ({"teacher_features": torch.randn(6, D)}, "expected the same number of images, got 3 and 2"),
    "pair weights": ({"pair_weights": torch.ones(3)}, r"pair weights have shape \(3,\); expected \[teacher views"),
    "image weights": ({"image_weights": torch.ones(3)}, r"row weights have shape \(3,\); expected \[2\]"),
    "student temperature": ({"student_temperature": 0.0}, "student_temperature is 0.0; expected a number > 0"),
    "teacher temperature": (
        {"teacher_temperature": torch.tensor(-1.0)},
        "teacher_temperature is -1.0; expected a number > 0",
    ),
    "temperature of nan": ({"teacher_temperature": float("nan")}, "teacher_temperature is nan; expected a number > 0"),
    "two temperatures": ({"student_temperature": torch.ones(2)}, "student_temperature has 2 elements; expected 1"),
    "backend": ({"backend": "fast"}, "unknown backend 'fast'; expected one of auto, reference, streaming"),
}


@pytest.mark.quick
@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_argument_is_named_with_what_was_expected(fault: str) -> None:
    changed, said = WRONG[fault]
    with pytest.raises(ValueError, match=said):
        prototype_cross_entropy(**(arguments() | changed))


@pytest.mark.quick
def test_matched_rows_must_be_as_many_as_their_weights() -> None:
    good = arguments()
    del good["pair_weights"]
    with pytest.raises(ValueError, match="expected the same number of images, got 4 and 6"):
        matched_prototype_cross_entropy(**good, row_weights=torch.ones(S))
    good["teacher_features"] = torch.randn(S, D)
    with pytest.raises(ValueError, match=r"row weights have shape \(4,\); expected \[6\], one a pair"):
        matched_prototype_cross_entropy(**good, row_weights=torch.ones(T))
    assert matched_prototype_cross_entropy(**good, row_weights=torch.ones(S)).loss.isfinite()


def test_a_compiled_step_refuses_wrong_shapes_too() -> None:
    bad = arguments() | {"teacher_prototypes": replace(arguments()["teacher_prototypes"], weight=torch.randn(K + 1, D))}
    with pytest.raises(Exception, match="both networks must have the same K"):
        torch.compile(lambda: prototype_cross_entropy(**bad), backend="aot_eager")()
