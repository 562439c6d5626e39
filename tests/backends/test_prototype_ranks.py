"""The loss with its prototypes over gloo ranks: equal to one process that has all of them.

Every case runs with the same code on the ranks and alone; all share one spawn of four ranks. Two ranks that share
prototypes out are the pairs (0, 1) and (2, 3) of the four, which take turns with the cases.

Legend: G / V teacher / student views, B images, K prototypes, D embedding dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from tests.backends.prototype_ranks import (
    ALONE_BUDGETS,
    OF_PROTOTYPES,
    Place,
    as_one,
    budgeted,
    distance,
    far_below,
    loss_of,
    outcome_of,
    results_in,
    start_rank,
)
from tests.on_ranks import start_ranks
from tests.ops.test_prototype_cross_entropy import HARD
from vmf_kernels import LogitCenter, matched_prototype_cross_entropy
from vmf_kernels.backends import streaming
from vmf_kernels.backends.native import chunks, module
from vmf_kernels.prototypes import KINDS
from vmf_kernels.ranks import gather_rows, log_sum_exp_over_ranks, name_of
from vmf_kernels.testing import Outcome, Problem, assert_within_budget, random_problem

RANKS = 4
SIZES = {2: (301, 699), 4: (1, 499, 37, 463)}  # prototypes of each rank
PROTOTYPES = 1000
DTYPES = {"fp64": torch.float64, "fp32": torch.float32}
BACKENDS = ["streaming", "in chunks", "reference"]
NATIVE = ["native", "native in chunks"]  # fp32 only
VIEWS = {"views": (5, (2, 4)), "rows": (1, (7, 9)), "matched": (33, (1, 1)), "no rows": (0, (2, 3))}
FAR_BELOW = {"first block far below": 0, "second block far below": 1}
ROWS = (4, 0, 3, 2)  # of each rank, where ranks have rows of their own
LOG_VALUES = [[0.0, -torch.inf, 1e5], [1.0, -torch.inf, -1e5], [-3.0, -torch.inf, 3.0], [2.0, -torch.inf, 0.0]]
OP = torch.ops.vmf_kernels.prototype_cross_entropy.default
Results = dict[str, Any]


class Ranks(NamedTuple):
    """The groups that this rank is in."""

    rank: int
    everyone: ProcessGroup
    pair: ProcessGroup
    single: ProcessGroup

    @classmethod
    def start(cls, rank: int) -> Ranks:
        pairs = [torch.distributed.new_group(members) for members in ([0, 1], [2, 3])]
        singles = [torch.distributed.new_group([member]) for member in range(RANKS)]
        everyone = torch.distributed.group.WORLD
        assert everyone is not None
        return cls(rank, everyone, pairs[rank // 2], singles[rank])

    def place(self, ranks: int) -> Place:
        """This rank's among two or four that share the prototypes out."""
        group = self.pair if ranks == 2 else self.everyone
        return Place.of(self.rank % ranks, SIZES[ranks], group)


@contextmanager
def backend_of(name: str) -> Iterator[str]:
    """The backend's name, in chunks of few rows for "in chunks", and plain torch's in blocks of 48 prototypes."""
    with ExitStack() as patches:
        if name == "native in chunks":
            sizes: dict[str, Any] = {"WORKSPACE_BYTES": 11 * PROTOTYPES * 4, "LEAST_WORKSPACE_BYTES": 0}
            patches.enter_context(mock.patch.multiple(chunks, **sizes, LEAST_ROWS=1))
        if name == "in chunks":
            sizes = {"BLOCK_PROTOTYPES": 48, "WORKSPACE_BYTES": 11 * PROTOTYPES * 4, "LEAST_WORKSPACE_BYTES": 0}
            for size, value in (sizes | {"LEAST_CHUNK_ROWS": 5}).items():
                patches.enter_context(mock.patch.object(streaming, size, value))
        yield {"in chunks": "streaming", "native in chunks": "native"}.get(name, name)


def problem_of(name: str, dtype: torch.dtype = torch.float64, kind: str = "weight_norm_vmf") -> Problem:
    """By the name of a configuration of views, a hard case, or a block far below."""
    torch.manual_seed(7)
    if name in FAR_BELOW:
        problem = random_problem(images=5, views=(2, 4), prototypes=PROTOTYPES, kind="linear", dtype=dtype)
        return far_below(problem, Place.of(FAR_BELOW[name], SIZES[2], None).block)
    if name in HARD:
        kind, harden = HARD[name]
        return harden(random_problem(images=3, views=(2, 5), prototypes=PROTOTYPES, kind=kind, dtype=dtype))
    images, views = VIEWS[name]
    return random_problem(images=images, views=views, prototypes=PROTOTYPES, kind=kind, dtype=dtype)


# ranks, backend, kind or "", problem, dtype
CASES = [
    *((4, backend, kind, "views", "fp32") for backend in ("streaming", "native") for kind in KINDS),
    *(
        (ranks, backend, "weight_norm_vmf", "views", dtype)
        for ranks in SIZES
        for backend in BACKENDS
        for dtype in DTYPES
    ),
    *((2, backend, "weight_norm_vmf", views, "fp32") for backend in (*BACKENDS, *NATIVE) for views in VIEWS),
    *((4, "streaming", "", hard, "fp32") for hard in HARD),
    *((2, "in chunks", "", hard, "fp32") for hard in HARD),
    *((4, "native", "", hard, "fp32") for hard in HARD),
    *((2, backend, "", far, "fp32") for backend in (*BACKENDS, *NATIVE) for far in FAR_BELOW),
]
# in blocks of 48 the masses of a row are rounded so often that one process alone is off by more than the budget
CASES = [case for case in dict.fromkeys(CASES) if case[1::2] != ("in chunks", "logits + 500")]
# the ranks run these
RUNNABLE = [case for case in CASES if case[1] not in NATIVE or module.native() is not None]


def case_name(case: tuple[object, ...]) -> str:
    return "-".join(str(part) for part in case if part != "")


def ranks_of(case: tuple[int, str, str, str, str]) -> range:
    """Who runs a case: all, or one of the pairs."""
    first = 0 if case[0] == RANKS else 2 * (RUNNABLE.index(case) % 2)
    return range(first, first + case[0])


def run_case(case: tuple[int, str, str, str, str], place: Place) -> Outcome:
    _, backend, kind, name, dtype = case
    with backend_of(backend) as chosen:
        return outcome_of(problem_of(name, DTYPES[dtype], kind or KINDS[0]), place, chosen)


def matched_outcome(place: Place) -> Outcome:
    problem = place.problem(problem_of("matched"))
    features, prototypes = problem.student_leaves()
    assert problem.image_weights is not None
    loss, statistics = matched_prototype_cross_entropy(
        features,
        prototypes,
        problem.teacher_features,
        problem.teacher_prototypes,
        problem.image_weights,
        teacher_bias=problem.teacher_bias,
        prototype_group=place.group,
    )
    weight, rows = torch.autograd.grad(loss, [prototypes.weight, features])
    return {"loss": loss.detach(), "usage": statistics.usage, "weight_gradient": weight, "feature_gradient": rows}


def repeats(place: Place) -> list[str]:
    """What differs, in any bit, between two runs, in fp32 and in chunks."""
    changed = []
    for chunked in ("in chunks", "native in chunks") if module.native() is not None else ("in chunks",):
        with backend_of(chunked) as backend:
            first, second = (outcome_of(problem_of("views", torch.float32), place, backend) for _ in range(2))
        changed += [f"{chunked}: {name}" for name in first if not torch.equal(first[name], second[name])]
    return changed


def autograd_case(place: Place, compiles: bool) -> Results:
    """Compiled whole, a second backward pass, the checks of torch on the op, and no gradient wanted.

    One rank compiles, which takes seconds, and the other runs the same uncompiled: they exchange the same.
    """
    problem = place.problem(problem_of("views", torch.float32))
    features, prototypes = problem.student_leaves()
    assert prototypes.magnitude is not None
    leaves = [features, prototypes.weight, prototypes.magnitude]

    def run(x: Tensor, weight: Tensor, magnitude: Tensor) -> tuple[Tensor, Tensor]:
        loss, statistics = loss_of(problem, place, x, replace(prototypes, weight=weight, magnitude=magnitude))
        return loss, statistics.mutual_information

    eager, information = run(*leaves)
    gradients = torch.autograd.grad(eager, leaves, retain_graph=True)
    again = torch.autograd.grad(2 * eager, leaves)
    whole = torch.compile(run, fullgraph=True, backend="aot_eager") if compiles else run
    compiled, compiled_information = whole(*leaves)
    compiled_gradients = torch.autograd.grad(compiled, leaves)
    with torch.no_grad():
        unneeded, _ = run(*leaves)
    torch.library.opcheck(OP, op_arguments(problem, place), test_utils=("test_schema", "test_faketensor"))
    return {
        "compiled": torch.equal(eager, compiled) and torch.equal(information, compiled_information),
        "compiled gradients": all(map(torch.equal, gradients, compiled_gradients)),
        "second backward": all(torch.equal(2 * a, b) for a, b in zip(gradients, again, strict=True)),
        "without gradients": float((unneeded - eager.detach()).abs() / eager.detach().abs()) <= 1e-6,
    }


def op_arguments(problem: Problem, place: Place) -> tuple[object, ...]:
    student, teacher = problem.student_prototypes, problem.teacher_prototypes
    weights = [None if w is None else w.to(torch.float32) for w in (problem.pair_weights, problem.image_weights)]
    temperatures = [torch.tensor(t, dtype=torch.float64) for t in (0.1, 0.04)]
    return (
        *(problem.student_features, student.weight, student.magnitude, student.kind),
        *(problem.teacher_features, teacher.weight, teacher.magnitude, teacher.kind),
        *(problem.teacher_bias, *weights, *temperatures, True, True, "streaming", name_of(place.group)),
    )


def refusal() -> str:
    """What a centre says of two ranks among four, and no word on the rows of the others."""
    try:
        LogitCenter(5, prototype_group=torch.distributed.new_group([0, 1]))
    except ValueError as error:
        return str(error)
    return "nothing"


def spoilt_block(place: Place, rank: int) -> dict[str, float]:
    """The loss of each backend where one prototype, of rank 1, is NaN."""
    problem = place.problem(problem_of("views", torch.float32))
    features, prototypes = problem.student_leaves()
    if rank == 1:
        prototypes.weight.data[0] = torch.nan
    names = ("streaming", "reference", "native") if module.native() is not None else ("streaming", "reference")
    return {name: loss_of(problem, place, features, prototypes, name).loss.item() for name in names}


def other_rows(place: Place, rank: int) -> str:
    """What the loss says where rank 1 holds rows of its own."""
    problem = place.problem(problem_of("views"))
    features, prototypes = problem.student_leaves()
    if rank == 1:
        features = features.detach().flip(1)
    try:
        loss_of(problem, place, features, prototypes)
    except ValueError as error:
        return str(error)
    return "nothing"


def collective_case(rank: int | None) -> Results:
    """Rows gathered from ranks of which one has none, their gradient, and log-sums of which one is -inf."""
    torch.manual_seed(2)
    rows, values = torch.randn(9, 3, dtype=torch.float64), torch.tensor(LOG_VALUES, dtype=torch.float64)
    mine = (rows if rank is None else rows[Place.of(rank, ROWS, None).block]).clone().requires_grad_()
    gathered, first = gather_rows(mine)
    share = sum(range(1, RANKS + 1)) if rank is None else rank + 1  # each rank's loss has a weight of its own
    (gradient,) = torch.autograd.grad((share * torch.arange(27.0).reshape(9, 3) * gathered).sum(), mine)
    total = values.logsumexp(dim=0) if rank is None else log_sum_exp_over_ranks(values[rank])
    return {"rows": gathered.detach(), "first": first, "gradient": gradient, "total": total}


def run_rank(rank: int, folder: str) -> None:
    start_rank(rank, folder, RANKS)
    ranks = Ranks.start(rank)
    alone = Place(ranks.single)
    torch.save(
        {
            "cases": {
                case_name(case): run_case(case, ranks.place(case[0])) for case in RUNNABLE if rank in ranks_of(case)
            },
            "matched": matched_outcome(ranks.place(2)),
            "repeats": {str(size): repeats(ranks.place(size)) for size in SIZES},
            "autograd": autograd_case(ranks.place(2), compiles=rank == 0) if rank < 2 else {},
            "one rank": outcome_of(problem_of("views"), alone),
            "refusal": refusal(),
            "spoilt": spoilt_block(ranks.place(4), rank),
            "other rows": other_rows(ranks.place(4), rank),
            "collectives": collective_case(rank),
        },
        f"{folder}/{rank}.pt",
    )
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Results]:
    folder = tmp_path_factory.mktemp("ranks")
    start_ranks(run_rank, (str(folder),), RANKS)
    return results_in(Path(folder), RANKS)


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_ranks_that_share_the_prototypes_out_equal_one(
    ranks: list[Results], case: tuple[int, str, str, str, str]
) -> None:
    if case not in RUNNABLE:
        pytest.skip("vmf_kernels._native was not built")
    outcome = as_one([ranks[rank]["cases"][case_name(case)] for rank in ranks_of(case)])
    _, _, kind, name, dtype = case
    problem = problem_of(name, DTYPES[dtype], kind or KINDS[0])
    assert_within_budget(budgeted(outcome), problem)
    error, quantity = distance(outcome, run_case(case, Place()))
    budget = hard_budget(name, DTYPES[dtype])
    assert error <= budget, f"{quantity}: relative error {error:.1e} against one rank, budget {budget:.0e}"


def hard_budget(name: str, dtype: torch.dtype) -> float:
    """Of the relative difference between the ranks and one: logits of hundreds are known to fewer digits."""
    return ALONE_BUDGETS[dtype] * (1 if name in VIEWS else 10)


def test_both_pairs_of_ranks_get_the_same(ranks: list[Results]) -> None:
    first, second = (as_one([rank["matched"] for rank in pair]) for pair in (ranks[:2], ranks[2:]))
    changed = [name for name in first if not torch.equal(first[name], second[name])]
    assert not changed, f"the pairs disagree on {changed}"


def test_matched_rows_over_ranks_equal_one(ranks: list[Results]) -> None:
    error, name = distance(as_one([rank["matched"] for rank in ranks[:2]]), matched_outcome(Place()))
    assert error <= 1e-12, f"{name}: relative error {error:.1e}, budget 1e-12"


def test_without_the_group_the_results_are_others() -> None:
    """Negative control: each rank's own softmax, over its block."""
    whole = outcome_of(problem_of("views"), Place())
    for rank in range(2):
        place = Place.of(rank, SIZES[2], None)
        own = outcome_of(problem_of("views"), place)
        for name in ("loss", "feature_gradient", "weight_gradient", "usage", "row_log_sum_exp", "prototype_usage"):
            expected = whole[name][place.block] if name in OF_PROTOTYPES else whole[name]
            error, _ = distance({name: own[name]}, {name: expected})
            assert error > 1e-3, f"{name} differs by {error:.1e} only"


def test_a_group_of_one_rank_is_no_group(ranks: list[Results]) -> None:
    expected = outcome_of(problem_of("views"), Place())
    for rank in ranks:
        changed = [name for name in expected if not torch.equal(rank["one rank"][name], expected[name])]
        assert not changed, f"{changed} are not bitwise those without a group"


@pytest.mark.parametrize("size", [str(size) for size in SIZES])
def test_a_repeat_is_bitwise_equal(ranks: list[Results], size: str) -> None:
    for rank in ranks:
        assert not rank["repeats"][size], f"{rank['repeats'][size]} differ on repeat"


@pytest.mark.parametrize("what", ["compiled", "compiled gradients", "second backward", "without gradients"])
def test_the_op_with_a_group_is_one_of_torch(ranks: list[Results], what: str) -> None:
    assert all(rank["autograd"][what] for rank in ranks[:2])


def test_a_prototype_group_of_some_ranks_needs_a_row_group(ranks: list[Results]) -> None:
    for rank in ranks[:2]:
        assert "prototype_group has 2 of 4 ranks and row_group is None; expected row_group=" in rank["refusal"]


def test_a_block_with_nan_gives_every_rank_a_loss_of_nan(ranks: list[Results]) -> None:
    finite = [
        (index, name) for index, rank in enumerate(ranks) for name, loss in rank["spoilt"].items() if loss == loss
    ]
    assert not finite, f"the loss is not NaN for {finite}"


def test_every_rank_refuses_rows_that_are_not_the_same(ranks: list[Results]) -> None:
    for rank in ranks:
        assert rank["other rows"].startswith("ranks of the prototype group hold different rows"), rank["other rows"]


def test_collectives_serve_a_rank_without_rows(ranks: list[Results]) -> None:
    alone = collective_case(None)
    for index, rank in enumerate(ranks):
        got, own = rank["collectives"], Place.of(index, ROWS, None).block
        assert torch.equal(got["rows"], alone["rows"])
        assert got["first"] == own.start
        torch.testing.assert_close(got["gradient"], alone["gradient"][own])
        torch.testing.assert_close(got["total"], alone["total"])
