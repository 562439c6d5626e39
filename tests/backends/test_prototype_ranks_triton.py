"""The Triton backend with its prototypes over two gloo ranks, under the interpreter: equal to one process.

Every case runs with the same code on the ranks and alone; all share one spawn.

Legend: G / V teacher / student views, B images, K prototypes, D embedding dim.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.backends import quicker_interpreter
from tests.backends.interpreted import correct_bf16
from tests.backends.prototype_ranks import (
    ALONE_BUDGETS,
    Place,
    as_one,
    budgeted,
    distance,
    far_below,
    outcome_of,
    results_in,
    start_rank,
)
from tests.measure import relative_error
from tests.on_ranks import start_ranks
from tests.ops.test_prototype_cross_entropy import HARD
from vmf_kernels import ProbabilityCenter, PrototypeLogits
from vmf_kernels.centering.sinkhorn import SinkhornKnopp
from vmf_kernels.testing import Outcome, Problem, assert_within_budget, random_problem

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on the GPU here"),
    # padding has weight 0, whose logarithm is meant to be -inf
    pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning", "ignore:invalid value:RuntimeWarning"),
]

RANKS = 2
SIZES = (12, 35)  # prototypes of each rank: less than one tile, and more than two
PROTOTYPES = sum(SIZES)
VIEWS = {"views": (2, (2, 3)), "rows": (1, (5, 3)), "matched": (9, (1, 1)), "no rows": (0, (2, 3))}
HARD_NAMES = ("temperature 0.01", "norms of 1e3, vmf", "bias -inf")
FAR_BELOW = "first block far below"
# problem, kind or "", dtype
CASES = [
    ("views", "linear", "fp32"),
    *((views, "weight_norm_vmf", "fp32") for views in VIEWS),
    *((hard, "", "fp32") for hard in (*HARD_NAMES, FAR_BELOW)),
    ("views", "weight_norm_vmf", "bf16"),
    ("matched", "weight_norm_vmf", "fp16"),
]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CASES = list(dict.fromkeys(CASES))


def problem_of(case: tuple[str, str, str]) -> Problem:
    name, kind, dtype = case
    torch.manual_seed(7)
    if name == FAR_BELOW:
        problem = random_problem(images=2, prototypes=PROTOTYPES, kind="linear", dtype=DTYPES[dtype])
        return far_below(problem, Place.of(0, SIZES, None).block)
    if name in HARD:
        kind, harden = HARD[name]
        return harden(random_problem(images=2, prototypes=PROTOTYPES, kind=kind, dtype=DTYPES[dtype]))
    images, views = VIEWS[name]
    return random_problem(images=images, views=views, prototypes=PROTOTYPES, kind=kind, dtype=DTYPES[dtype])


def run_case(case: tuple[str, str, str], place: Place) -> Outcome:
    with correct_bf16():
        return outcome_of(problem_of(case), place, "triton")


def bias_cases(place: Place) -> dict[str, Tensor]:
    """A centre and a dual vector whose passes run on the kernels."""
    problem = problem_of(("views", "weight_norm_vmf", "fp32"))
    teacher = PrototypeLogits(problem.teacher_features, place.prototypes(problem.teacher_prototypes))
    center = ProbabilityCenter(teacher.shape[-1], average="probability", backend="triton", prototype_group=place.group)
    center.update(teacher, 0.04)
    sinkhorn = SinkhornKnopp(backend="triton", prototype_group=place.group)
    return {"center": center.center[0], "dual": sinkhorn.target_bias(teacher, 0.04)}


def run_rank(rank: int, folder: str) -> None:
    start_rank(rank, folder, RANKS)
    quicker_interpreter.install()
    place = Place.of(rank, SIZES, torch.distributed.group.WORLD)
    cases = {str(case): run_case(case, place) for case in CASES}
    repeated = run_case(CASES[0], place)
    changed = [name for name, value in cases[str(CASES[0])].items() if not torch.equal(repeated[name], value)]
    torch.save({"cases": cases, "biases": bias_cases(place), "repeats": changed}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    start_ranks(run_rank, (str(folder),), RANKS)
    return results_in(Path(folder), RANKS)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(part for part in case if part))
def test_two_ranks_equal_the_fp64_truth(ranks: list[dict[str, Any]], case: tuple[str, str, str]) -> None:
    outcome = as_one([rank["cases"][str(case)] for rank in ranks])
    products = None if case[2] == "fp32" else DTYPES[case[2]]
    assert_within_budget(budgeted(outcome), problem_of(case), products)


@pytest.mark.parametrize("views", ["views", "matched"])
def test_two_ranks_equal_one(ranks: list[dict[str, Any]], views: str) -> None:
    case, budget = (views, "weight_norm_vmf", "fp32"), ALONE_BUDGETS[torch.float32]
    error, name = distance(as_one([rank["cases"][str(case)] for rank in ranks]), run_case(case, Place()))
    assert error <= budget, f"{name}: relative error {error:.1e}, budget {budget:.0e}"


def test_biases_equal_those_of_one(ranks: list[dict[str, Any]]) -> None:
    place, budget = Place.of(0, SIZES, None), 1e-5
    apart = bias_cases(place)
    for name, whole in bias_cases(Place()).items():
        error = relative_error(torch.cat([rank["biases"][name] for rank in ranks]), whole)
        assert error <= budget, f"{name}: relative error {error:.1e}, budget {budget:.0e}"
        difference = relative_error(apart[name], whole[place.block])
        assert difference > 100 * budget, f"{name}: a rank's own prototypes alone differ by {difference:.1e} only"


def test_a_repeat_is_bitwise_equal(ranks: list[dict[str, Any]]) -> None:
    assert not any(rank["repeats"] for rank in ranks)
