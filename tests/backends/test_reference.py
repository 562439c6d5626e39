"""The dense backend against the contract, written out in fp64."""

from __future__ import annotations

import pytest
import torch

from tests.backends.conformance import Case, column_error, random_case, worst_error
from vmf_kernels.backends import reference
from vmf_kernels.backends.contract import Query

pytestmark = pytest.mark.quick

BUDGET = {torch.float64: 1e-12, torch.float32: 5e-6}
ROWS = [(1,), (0,), (63, 65), (0, 7), (7, 0)]


@pytest.mark.parametrize("dtype", BUDGET, ids=str)
@pytest.mark.parametrize("biased", [True, False], ids=["gain and bias", "plain"])
@pytest.mark.parametrize("rows", ROWS, ids=str)
@pytest.mark.parametrize(("prototypes", "dim"), [(1, 2), (127, 24), (1000, 256)])
def test_assignment_and_sums_follow_the_contract(
    prototypes: int, dim: int, rows: tuple[int, ...], biased: bool, dtype: torch.dtype
) -> None:
    case = random_case(rows, prototypes, dim, dtype, biased=biased)
    error = worst_error(reference, case)
    assert error <= BUDGET[dtype], f"relative error {error:.1e}, budget {BUDGET[dtype]:.0e}"


@pytest.mark.parametrize("dtype", BUDGET, ids=str)
@pytest.mark.parametrize("rows", ROWS, ids=str)
def test_column_sums_follow_the_contract(rows: tuple[int, ...], dtype: torch.dtype) -> None:
    error = column_error(reference, random_case(rows, 127, 24, dtype))
    assert error <= 4 * BUDGET[dtype], f"error {error:.1e} nats, budget {4 * BUDGET[dtype]:.0e}"


def test_only_what_is_asked_for_is_given() -> None:
    full = random_case((7,), 127, 24)
    bare = Case([Query(full.queries[0].rows, full.queries[0].keys)], None, None)
    (assignment,) = reference.assign(*bare)
    assert assignment.barycentre is None
    assert worst_error(reference, bare) <= BUDGET[torch.float64]
