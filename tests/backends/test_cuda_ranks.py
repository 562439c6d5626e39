"""The CUDA backend, with stand-ins for its kernels, with prototypes over two gloo ranks: equal to the fp64 truth.

Legend: G / V teacher / student views, B images, K prototypes, D embedding dim.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.backends import quicker_interpreter
from tests.backends.cuda_stand_in import standing_in
from tests.backends.prototype_ranks import Place, as_one, budgeted, distance, outcome_of
from tests.on_ranks import Runs, run_cases
from vmf_kernels.testing import Outcome, Problem, assert_within_budget, random_problem

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on the GPU here"),
    # padding has weight 0, whose logarithm is meant to be -inf
    pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning", "ignore:invalid value:RuntimeWarning"),
]

SIZES = (12, 35)  # prototypes of each rank
BUDGET = 2e-3  # relative, in norm, between two ways to round probabilities to fp16


def problem_of(views: tuple[int, int]) -> Problem:
    torch.manual_seed(7)
    return random_problem(images=9, views=views, prototypes=sum(SIZES), dtype=torch.float16)


def several_views(place: Place) -> Outcome:
    with standing_in():
        return outcome_of(problem_of((2, 3)), place, "cuda")


def one_to_one(place: Place) -> Outcome:
    with standing_in():
        return outcome_of(problem_of((1, 1)), place, "cuda")


def place_of(rank: int | None) -> Place:
    quicker_interpreter.install()  # of what is not by the stand-in
    return Place() if rank is None else Place.of(rank, SIZES, torch.distributed.group.WORLD)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return run_cases(Path(tmp_path_factory.mktemp("ranks")), [several_views, one_to_one], place_of, "ignore")


def test_two_ranks_match_the_fp64_truth(runs: Runs) -> None:
    outcome = as_one([rank["several_views"] for rank in runs.ranks])
    assert_within_budget(budgeted(outcome), problem_of((2, 3)), torch.float16)


@pytest.mark.parametrize("name", ["several_views", "one_to_one"])
def test_two_ranks_equal_one(runs: Runs, name: str) -> None:
    error, quantity = distance(as_one([rank[name] for rank in runs.ranks]), runs.alone[name])
    assert error <= BUDGET, f"{quantity}: relative error {error:.1e}, budget {BUDGET:.0e}"


def test_a_rank_by_itself_is_something_else(runs: Runs) -> None:
    """Negative control: without the exchange, softmax would run over a rank's own prototypes."""
    place = Place.of(0, SIZES, None)
    apart, together = several_views(place), runs.ranks[0]["several_views"]
    error, quantity = distance(apart, together)
    assert error > 10 * BUDGET, f"{quantity}: a rank's own prototypes alone differ by {error:.1e} only"
