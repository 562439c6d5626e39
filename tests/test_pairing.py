"""Pairings: masses and sums over partners equal those of the [T, S] matrix of pair weights, which is never built."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from vmf_kernels import multi_crop_weights
from vmf_kernels.pairing import FEW, Pairing, check_pairing, check_weights

pytestmark = pytest.mark.quick

BUDGET = 1e-14


def pair_matrix(pairing: Pairing, images: int) -> Tensor:
    """[T, S] the weight of every pair of rows."""
    image_weights = torch.ones(images).double() if pairing.image_weights is None else pairing.image_weights
    return torch.kron(pairing.view_weights, torch.diag(image_weights))


@pytest.mark.parametrize("weighted", [False, True], ids=["all images alike", "image weights"])
@pytest.mark.parametrize(("images", "views"), [(1, (5, 7)), (4, (1, 1)), (4, (2, 3)), (0, (2, 3))])
def test_pairing_acts_as_its_matrix(images: int, views: tuple[int, int], weighted: bool) -> None:
    image_weights = torch.rand(images, dtype=torch.float64) if weighted else None
    pairing = Pairing(torch.rand(views, dtype=torch.float64), image_weights)
    dense = pair_matrix(pairing, images)
    student, teacher = torch.randn(dense.shape[1], 6).double(), torch.randn(dense.shape[0], 6).double()
    assert check_pairing(pairing, len(teacher), len(student)) == images
    for got, expected in (
        (pairing.student_mass(images), dense.sum(dim=0)),
        (pairing.teacher_mass(images), dense.sum(dim=1)),
        (pairing.to_students(teacher), dense.T @ teacher),
        (pairing.to_teachers(student), dense @ student),
    ):
        torch.testing.assert_close(got, expected, rtol=0, atol=BUDGET)


@pytest.mark.parametrize(("teacher_views", "student_views"), [(1, 2), (2, 2), (2, 10), (3, 2)])
def test_multi_crop_weights_are_the_mean_over_pairs_of_different_views(teacher_views: int, student_views: int) -> None:
    weights = multi_crop_weights(teacher_views, student_views)
    pairs = [(g, v) for g in range(teacher_views) for v in range(student_views) if g != v]
    expected = torch.zeros(teacher_views, student_views).double()
    for pair in pairs:
        expected[pair] = 1 / len(pairs)
    torch.testing.assert_close(weights, expected, rtol=0, atol=BUDGET)


def test_dino_has_eighteen_pairs() -> None:
    assert torch.unique(multi_crop_weights(2, 10)).tolist() == [0, 1 / 18]


def test_one_view_on_either_side_leaves_no_pair() -> None:
    with pytest.raises(ValueError, match=r"1 teacher view\(s\) and 1 student view\(s\) leave no pair"):
        multi_crop_weights(1, 1)


@pytest.mark.parametrize(
    ("view_weights", "image_weights", "rows", "said"),
    [
        (torch.ones(3), None, (3, 3), r"pair weights have shape \(3,\); expected \[teacher views, student views\]"),
        (torch.ones(2, 3), None, (5, 6), r"teacher has 5 rows, not divisible by its 2 views"),
        (torch.ones(2, 3), None, (4, 7), r"student has 7 rows, not divisible by its 3 views"),
        (torch.ones(0, 3), None, (0, 3), r"teacher has 0 rows, not divisible by its 0 views"),
        (torch.ones(2, 3), None, (4, 9), r"expected the same number of images, got 2 and 3"),
        (torch.ones(2, 3), torch.ones(3), (4, 6), r"row weights have shape \(3,\); expected \[2\]"),
        (torch.ones(2, 3), torch.ones(2, 1), (4, 6), r"row weights have shape \(2, 1\); expected \[2\]"),
    ],
)
def test_a_pairing_that_does_not_fit_the_rows_is_refused(
    view_weights: Tensor, image_weights: Tensor | None, rows: tuple[int, int], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        check_pairing(Pairing(view_weights, image_weights), *rows)


@pytest.mark.parametrize("count", [3, FEW + 1], ids=["few", "many"])
@pytest.mark.parametrize("side", ["pair weights", "image or row weights"])
@pytest.mark.parametrize("bad", [-0.5, math.nan, math.inf])
def test_weights_that_are_negative_or_not_finite_are_refused(bad: float, side: str, count: int) -> None:
    good, weights = torch.ones(1, 1), torch.zeros(count)
    weights[1] = bad
    pairing = Pairing(weights[None], None) if side == "pair weights" else Pairing(good, weights)
    with pytest.raises(ValueError, match=rf"{side} go from .*; expected finite numbers >= 0"):
        check_weights(pairing)


@pytest.mark.parametrize("count", [0, 3, FEW + 1])
def test_weights_of_zero_are_taken(count: int) -> None:
    """Negative control."""
    check_weights(Pairing(torch.zeros(1, count), torch.zeros(count)))
