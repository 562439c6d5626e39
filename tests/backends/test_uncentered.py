"""The sums of a centre of probabilities that the native backend forms in the loss's own pass over the teacher.

Legend: G / V teacher / student views, B images, T teacher rows, K prototypes, D embedding dim.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from bench.workloads import TOY, Inputs
from tests.backends.native_calls import ROUNDINGS, Damage, damaged
from tests.backends.test_native import problem_of
from tests.backends.test_native_chunks import workspace_of
from vmf_kernels import DINOvMFLoss, ProbabilityCenter, prototype_cross_entropy
from vmf_kernels.backends.native import module
from vmf_kernels.backends.uncentered import MOST_BIAS, answer_about, ask_for_sums
from vmf_kernels.centering.log_sums import LogSums
from vmf_kernels.prototypes import KINDS
from vmf_kernels.testing import Outcome, Problem, library_outcome, random_problem

pytestmark = pytest.mark.skipif(module.native() is None, reason="vmf_kernels._native was not built")

TAU = 0.04
SCHEDULE = (TAU, TAU, 0, 1)


def answered(problem: Problem, backend: str = "native") -> Tensor | None:
    """What a loss's backend says of the problem's teacher without its bias."""
    teacher = SimpleNamespace(features=problem.teacher_features)
    bias = problem.teacher_bias
    assert bias is not None
    features, prototypes = problem.student_leaves()
    prototype_cross_entropy(
        features,
        prototypes,
        problem.teacher_features,
        problem.teacher_prototypes,
        problem.pair_weights,
        teacher_temperature=TAU,
        teacher_bias=ask_for_sums(bias, teacher, TAU),
        image_weights=problem.image_weights,
        backend=backend,
    ).loss.backward()
    return answer_about(teacher, TAU)


def uncentered_logits(problem: Problem) -> Tensor:
    """[T, K] fp64, over temperature."""
    teacher = problem.teacher_prototypes
    logits = problem.teacher_features.double() @ teacher.effective_weight().double().T / TAU
    return logits + teacher.log_normalizer(TAU, torch.float64) if teacher.has_normalizer else logits


def check(problem: Problem) -> None:
    """Raise AssertionError unless the answer is as near the fp64 truth as the roundings of its logits allow."""
    logits, bias = uncentered_logits(problem), problem.teacher_bias
    assert bias is not None
    total = answered(problem)
    assert total is not None, "nobody answered"
    error = (total.double() - logits.log_softmax(dim=1).logsumexp(dim=0)).abs().max().item()
    largest = logits.abs().max().item() + bias.abs().max().item()
    budget = ROUNDINGS * torch.finfo(torch.float32).eps * largest
    assert error <= budget, f"error {error:.1e} nats, budget {budget:.1e}"


SHAPES = ("T1-S1-K1-D2", "T63-S65-K4099-D24", "B17-G2-V3-K1000-D100", "B257-G1-V1-K127-D2")


@pytest.mark.quick
@pytest.mark.parametrize("shape", SHAPES)
def test_sums_match_the_fp64_truth_at_every_shape(shape: str, isa: str, uninitialised_memory_is_nan: None) -> None:
    check(problem_of(shape, torch.float32))


@pytest.mark.parametrize("kind", KINDS)
def test_sums_match_for_every_kind_of_prototypes(kind: str, isa: str) -> None:
    check(random_problem(images=7, views=(2, 4), prototypes=301, dim=40, kind=kind, dtype=torch.float32))


@pytest.mark.parametrize(("images", "views", "rows"), [(23, (2, 4), 54), (2, (9, 33), 11)], ids=["images", "views"])
def test_each_row_counts_once_in_several_chunks(images: int, views: tuple[int, int], rows: int, isa: str) -> None:
    """Of images, and of an image's views, where a teacher row is in the chunks of several student views."""
    with workspace_of(rows):
        check(random_problem(images=images, views=views, prototypes=1000, dim=24, dtype=torch.float32))


def test_prototypes_far_from_every_row_have_finite_sums(isa: str) -> None:
    """Their probabilities are 0 in fp64 as well: hundreds of nats below the nearest."""
    problem = random_problem(images=4, views=(2, 3), prototypes=127, dim=24, kind="linear", dtype=torch.float32)
    problem.teacher_features.copy_(torch.nn.functional.normalize(problem.teacher_features, dim=1))
    problem.teacher_prototypes.weight.mul_(torch.linspace(1, 300, 127)[:, None])
    assert (uncentered_logits(problem).softmax(dim=1).sum(dim=0) == 0).any()
    check(problem)


def no_other_bias(name: str, arguments: dict[str, Any]) -> None:
    if name == "Score" and arguments["other_bias"] is not None:
        arguments["other_bias"] = arguments["bias"]


def one_row_less(name: str, arguments: dict[str, Any]) -> None:
    if name == "Gather":  # of one image
        arguments["view_weights"] = arguments["view_weights"][1:]


@pytest.mark.parametrize("damage", [no_other_bias, one_row_less], ids=lambda damage: damage.__name__)
def test_damaged_sums_fail_the_budget(damage: Damage, isa: str) -> None:
    """Negative control."""
    problem = random_problem(views=(5, 4), prototypes=127, dim=24, dtype=torch.float32)
    with damaged(damage), pytest.raises(AssertionError, match=r"error .*, budget"):
        check(problem)


def changed(one: Outcome, other: Outcome) -> list[str]:
    return [name for name in one if not torch.equal(one[name], other[name])]


def test_asking_changes_no_bit_of_the_loss(isa: str) -> None:
    problem = random_problem(images=5, views=(2, 4), prototypes=1000, dim=24, dtype=torch.float32)
    plain = library_outcome(problem, "native")
    asked = library_outcome(_asking(problem), "native")
    assert not changed(plain, asked)


def _asking(problem: Problem) -> Problem:
    assert problem.teacher_bias is not None
    teacher = SimpleNamespace(features=problem.teacher_features)
    return replace(problem, teacher_bias=ask_for_sums(problem.teacher_bias, teacher, TAU))


def test_any_number_of_threads_gives_the_same_sums(isa: str) -> None:
    problem = random_problem(images=9, views=(2, 5), prototypes=4099, dim=24, dtype=torch.float32)
    sums = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        sums.append(answered(problem))
    assert sums[0] is not None
    assert all(other is not None and torch.equal(sums[0], other) for other in sums)


@pytest.mark.parametrize("case", ["another backend", "a large bias", "NaN", "another temperature", "asked twice"])
def test_where_nobody_answers_the_centre_takes_its_own_passes(case: str) -> None:
    problem = random_problem(images=3, views=(2, 3), prototypes=40, dim=16, dtype=torch.float32)
    assert problem.teacher_bias is not None
    if case in ("a large bias", "NaN"):
        problem.teacher_bias[3] = 2 * MOST_BIAS if case == "a large bias" else torch.nan
    if case in ("another temperature", "asked twice"):
        teacher = SimpleNamespace(features=problem.teacher_features)
        question = vars(ask_for_sums(problem.teacher_bias, teacher, TAU))
        next(iter(question.values())).total = torch.zeros(40)
        first = answer_about(teacher, TAU if case == "asked twice" else 2 * TAU)
        assert (first is None) == (case == "another temperature")
        assert answer_about(teacher, TAU) is None
        return
    assert answered(problem, "streaming" if case == "another backend" else "native") is None


class CountingCenter(ProbabilityCenter):
    """Records batches in its own way."""

    seen = 0

    def accumulate(self, *batch: Any) -> None:
        self.seen += 1
        super().accumulate(*batch)


@pytest.mark.quick
@pytest.mark.parametrize("average", ["log_probability", "probability"])
def test_the_centre_of_a_loss_is_that_of_its_own_passes(average: str) -> None:
    def moved(centering: Any) -> tuple[Tensor, int]:
        """The centre after three steps, and how often it took a pass of its own over the teacher."""
        inputs = Inputs.of(TOY)
        loss = DINOvMFLoss(TOY.prototypes, TOY.crops, *SCHEDULE, centering=centering, center_average=average)
        student, teacher = inputs.layers
        with mock.patch.object(LogSums, "over_rows", autospec=True, side_effect=LogSums.over_rows) as own_pass:
            for _ in range(3):
                loss(student(inputs.student_features), teacher(inputs.teacher_features), 0)
        return loss.center, own_pass.call_count

    own = CountingCenter(TOY.prototypes, average=average)
    (fused, none), (by_itself, three) = moved("probability"), moved(own)
    assert (none, three, own.seen) == (0, 3, 3)
    torch.testing.assert_close(fused, by_itself, rtol=1e-5, atol=1e-6)
    assert fused.std() > 0.1, "the centre has not moved"
