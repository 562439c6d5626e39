"""Shared parts of the tests of prototypes over ranks: a rank's block of a problem, its results, and their combination.

Legend: K prototypes (of all ranks), R rows, D embedding dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import functional

from tests.measure import relative_error
from vmf_kernels import CrossEntropy, Prototypes, prototype_cross_entropy, prototype_usage
from vmf_kernels.ops.assignments import row_log_sum_exp
from vmf_kernels.testing import GRADIENTS, Outcome, Problem

OF_PROTOTYPES = ("usage", "weight_gradient", "magnitude_gradient", "prototype_usage")  # a rank has its own only
ALONE_BUDGETS = {torch.float64: 1e-12, torch.float32: 5e-6}  # relative, in norm, against one process


class Place(NamedTuple):
    """Which prototypes a process has, and with whom it shares them out; all of them and no group when it is alone."""

    group: ProcessGroup | None = None
    block: slice = slice(None)

    @classmethod
    def of(cls, rank: int, sizes: Sequence[int], group: ProcessGroup | None) -> Place:
        """Of a rank among blocks of these sizes."""
        return cls(group, slice(sum(sizes[:rank]), sum(sizes[: rank + 1])))

    def prototypes(self, all_of_them: Prototypes) -> Prototypes:
        """This process's block, in memory of its own."""
        magnitude = all_of_them.magnitude
        own = None if magnitude is None else magnitude[self.block].clone()
        return replace(all_of_them, weight=all_of_them.weight[self.block].clone(), magnitude=own)

    def problem(self, whole: Problem) -> Problem:
        """The problem with this process's prototypes only."""
        return replace(
            whole,
            student_prototypes=self.prototypes(whole.student_prototypes),
            teacher_prototypes=self.prototypes(whole.teacher_prototypes),
            teacher_bias=None if whole.teacher_bias is None else whole.teacher_bias[self.block],
        )


def loss_of(
    problem: Problem, place: Place, features: Tensor, prototypes: Prototypes, backend: str = "streaming"
) -> CrossEntropy:
    """The loss of a problem that already is this process's."""
    return prototype_cross_entropy(
        features,
        prototypes,
        problem.teacher_features,
        problem.teacher_prototypes,
        problem.pair_weights,
        student_temperature=problem.student_temperature,
        teacher_temperature=problem.teacher_temperature,
        teacher_bias=problem.teacher_bias,
        image_weights=problem.image_weights,
        backend=backend,
        prototype_group=place.group,
    )


def outcome_of(whole: Problem, place: Place, backend: str = "streaming") -> Outcome:
    """As ``library_outcome``, with mutual information, and the usage and log-sum-exp that are functions of their own."""
    problem = place.problem(whole)
    features, prototypes = problem.student_leaves()
    loss, statistics = loss_of(problem, place, features, prototypes, backend)
    leaves = dict(zip(GRADIENTS, (features, prototypes.weight, prototypes.magnitude), strict=True))
    wanted = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    gradients = torch.autograd.grad(loss, list(wanted.values()))
    teacher = problem.teacher_features, problem.teacher_prototypes, problem.teacher_temperature, problem.teacher_bias
    options: dict[str, Any] = {"backend": backend, "prototype_group": place.group}
    kept = {name: value for name, value in vars(statistics).items() if name != "usage_entropy"}
    outcome = {"loss": loss.detach(), "mutual_information": statistics.mutual_information} | kept
    outcome |= dict(zip(wanted, gradients, strict=True)) | {"row_log_sum_exp": row_log_sum_exp(*teacher, **options)}
    return outcome | ({"prototype_usage": prototype_usage(*teacher, **options)} if len(teacher[0]) else {})


def as_one(ranks: Sequence[Outcome], of_prototypes: Sequence[str] = OF_PROTOTYPES) -> Outcome:
    """The ranks' outcomes as that of one process.

    Raises:
        AssertionError: ranks disagree, in any bit, on what each has whole.
    """
    outcome = {}
    for name, first in ranks[0].items():
        if name in of_prototypes:
            outcome[name] = torch.cat([rank[name] for rank in ranks])
            continue
        outcome[name] = first
        assert all(torch.equal(first, rank[name]) for rank in ranks), f"the ranks disagree on {name}"
    return outcome


def budgeted(outcome: Outcome) -> Outcome:
    """The part that ``assert_within_budget`` has a truth for."""
    return {
        name: value
        for name, value in outcome.items()
        if name not in ("mutual_information", "row_log_sum_exp", "prototype_usage")
    }


def distance(actual: Outcome, expected: Outcome) -> tuple[float, str]:
    """The largest relative error, and the quantity it is of; of a number near 0, a mean over pairs, the absolute one."""
    assert actual.keys() == expected.keys(), f"got {sorted(actual)}, expected {sorted(expected)}"
    errors = []
    for name, exact in expected.items():
        if exact.ndim == 0 and actual[name].isfinite():
            errors.append((float((actual[name] - exact).abs() / (1 + exact.abs())), name))
        elif exact.any() or not actual[name].isfinite().all():
            errors.append((relative_error(actual[name], exact), name))
        else:  # all zero: by how much it is not
            errors.append((float(actual[name].abs().sum()), name))
    return max(errors)


def far_below(problem: Problem, block: slice) -> Problem:
    """Linear prototypes of which one block lies hundreds of thousands of nats below the others, for every row."""
    shared = functional.normalize(torch.ones_like(problem.student_features[:1]), dim=1)
    for prototypes in (problem.student_prototypes, problem.teacher_prototypes):
        prototypes.weight[block] = -1e3 * shared
    rows = [functional.normalize(x + 3 * shared, dim=1) for x in (problem.student_features, problem.teacher_features)]
    cold = {"student_temperature": 0.01, "teacher_temperature": 0.01}
    return replace(problem, student_features=rows[0], teacher_features=rows[1], **cold)  # type: ignore[arg-type]


def start_rank(rank: int, folder: str, ranks: int) -> None:
    """Make this process one of ``ranks`` that meet in ``folder``."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)


def results_in(folder: Path, ranks: int) -> list[Any]:
    """What each rank saved."""
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(ranks)]
