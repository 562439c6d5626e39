"""One image of many views, whose pairs the native backend folds as a product.

Legend: G / V teacher / student views, K prototypes, D embedding dim.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch

from tests.backends.native_calls import check
from vmf_kernels.backends.native import module, operator
from vmf_kernels.backends.native.chunks import MOST_ROWS, MOST_ROWS_OF_AN_IMAGE, Chunk, chunks_of
from vmf_kernels.testing import library_outcome, random_problem

pytestmark = pytest.mark.skipif(module.native() is None, reason="vmf_kernels._native was not built")

# either side of the number of views from which a product is taken, and of its tiles and pieces
VIEWS = ((7, 9), (8, 9), (9, 8), (65, 33), (130, 7))


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("views", VIEWS, ids=str)
def test_pairs_match_the_fp64_truth(
    views: tuple[int, int], dtype: torch.dtype, isa: str, uninitialised_memory_is_nan: None
) -> None:
    check(random_problem(views=views, prototypes=307, dim=24, dtype=dtype), isa)


def test_pairs_of_other_views_fail_the_budget(isa: str) -> None:
    """Negative control."""
    pairs = operator._Step._pairs

    def rolled(step: operator._Step, chunk: Chunk) -> Any:
        made = pairs(step, chunk)
        return made._replace(by_view=made.by_view.roll(1, 0))

    with mock.patch.object(operator._Step, "_pairs", rolled), pytest.raises(AssertionError, match=r"error .*, budget"):
        check(random_problem(views=(9, 8), prototypes=307, dim=24, dtype=torch.float32), isa)


def test_any_number_of_threads_gives_the_same_bits(isa: str) -> None:
    problem, outcomes = random_problem(views=(33, 20), prototypes=4099, dim=24, dtype=torch.float32), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        outcomes.append(library_outcome(problem, "native"))
    assert all(torch.equal(outcomes[0][name], other[name]) for other in outcomes for name in other)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("views", "prototypes", "count"),
    [
        ((400, 400), 1024, 1),  # more rows than a chunk of several images has
        ((100, 100), 65_536, 1),  # more than half of the batch's logits
        ((600, 600), 1024, 4),
        ((400, 400), 65_536, 9),  # more than the workspace
    ],
)
def test_an_image_is_cut_only_if_it_does_not_fit(views: tuple[int, int], prototypes: int, count: int) -> None:
    assert len(chunks_of(views, 1, prototypes)) == count
    assert MOST_ROWS < MOST_ROWS_OF_AN_IMAGE
