"""First light's reports on wrong tensors: broken copies of a result, and the words that must describe them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from bench.light.differences import Difference, compared, in_words, ranges, verdict
from bench.light.exact import Exact
from bench.light.inputs import Array, integers

SHAPE = (2, 128, 192)  # splits, rows, columns
RIGHT = integers(SHAPE, 1, 1000, 3)
EXACT = Exact(RIGHT, np.full(SHAPE, 0.25), ("split", "row", "column"))


def second_group_off(got: Array) -> None:
    got[:, 64:] += 1


def second_half_off(got: Array) -> None:
    got.reshape(2, 8, 2, 8, 192)[:, :, 1] += 1


def third_box_off(got: Array) -> None:
    got[:, :, 128:] += 1


def odd_columns_off(got: Array) -> None:
    got[:, :, 1::2] += 1


def neighbours_swapped(got: Array) -> None:
    got[...] = got.reshape(2, 128, 24, 2, 4)[:, :, :, ::-1].reshape(SHAPE)


def rows_shifted(got: Array) -> None:
    got[...] = np.roll(got, 8, axis=1)


def one_split_halved(got: Array) -> None:
    got[1] /= 2


def never_written(got: Array) -> None:
    got[...] = np.nan


def one_column_in_eight_off(got: Array) -> None:
    got[:, :, 3::8] += 1


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (second_group_off, "only rows of warpgroup 1"),
        (second_half_off, "only rows 8-15 of 16"),
        (third_box_off, "only 64-column boxes 2"),
        (odd_columns_off, "only odd columns: halves of a pair"),
        (neighbours_swapped, "columns hold what belongs to others: 0<-4 1<-5 2<-6 3<-7 4<-0"),
        (rows_shifted, "rows hold what belongs to others: 0<-120"),
        (one_split_halved, "only split 1 of 2 | every wrong element is 0.5 times the exact one"),
        (never_written, "never written"),
        (one_column_in_eight_off, "column mod 8: 3, column mod 16: 3 11"),
    ],
)
def test_a_pattern_is_named(damage: Callable[[Array], None], words: str) -> None:
    assert words in in_words(broken(damage).report)


def broken(damage: Callable[[Array], None]) -> Difference:
    got = RIGHT.copy()
    damage(got)
    found = compared("a case", "barycentre", got, EXACT)
    assert found is not None, "the damage shows"
    return found


def test_what_is_right_or_rounded_is_not_named() -> None:
    """Negative control."""
    assert compared("a case", "barycentre", RIGHT.copy(), EXACT) is None
    assert compared("a case", "barycentre", RIGHT + 0.2, EXACT) is None
    infinite = Exact(np.array([np.inf, 1.0]), np.zeros(2), ("row",))
    assert compared("a case", "offset", np.array([np.inf, 1.0]), infinite) is None
    assert compared("a case", "offset", np.array([-np.inf, 1.0]), infinite) is not None


def test_scattered_errors_have_no_pattern() -> None:
    """Negative control."""
    report = broken(
        lambda got: np.add.at(got.reshape(-1), np.flatnonzero(integers((got.size,), 0, 3, 9) == 0), 1)
    ).report
    assert not report["hints"], report["hints"]
    assert not report["classes"], report["classes"]


def test_the_first_mismatches_and_the_numbers_are_reported() -> None:
    def two(got: Array) -> None:
        got[0, 5, 7], got[1, 0, 0] = np.nan, RIGHT[1, 0, 0] + 3

    found = broken(two)
    assert found.wrong.tolist() == [5 * 192 + 7, 128 * 192]
    assert (found.report["wrong"], found.report["nan"], found.report["largest_error"]) == (2, 1, 3.0)
    assert found.report["first"][1] == {"at": [1, 0, 0], "got": RIGHT[1, 0, 0] + 3, "expected": RIGHT[1, 0, 0]}


def test_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"barycentre has shape \(2, 3\); expected \(2, 128, 192\)"):
        compared("a case", "barycentre", np.zeros((2, 3)), EXACT)


def test_the_verdict_names_the_half_of_a_pass() -> None:
    tensors = {"statistics", "barycentre"}
    assert "second product" in verdict(tensors, {"barycentre"})
    assert "first product" in verdict(tensors, tensors)
    assert verdict({"usage"}, {"usage"}) == ""
    assert verdict(tensors, set()) == ""


def test_runs_of_numbers_are_shortened() -> None:
    assert ranges(np.array([0, 1, 2, 5, 7, 8])) == "0-2 5 7-8"
    assert ranges(np.array([], dtype=int)) == ""
