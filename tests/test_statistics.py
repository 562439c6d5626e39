"""Statistics: entropies in nats, and a mutual information near 0 for a collapsed head."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from vmf_kernels import AssignmentStatistics
from vmf_kernels.statistics import entropy

pytestmark = pytest.mark.quick

K = 16


def statistics_of(q_TK: Tensor) -> AssignmentStatistics:
    teacher_entropy = torch.stack([entropy(q) for q in q_TK]).mean()
    return AssignmentStatistics(teacher_entropy, teacher_entropy, torch.zeros(()), q_TK.mean(dim=0))


def test_entropy_of_the_uniform_distribution_is_log_k() -> None:
    assert entropy(torch.full((K,), 1 / K, dtype=torch.float64)).item() == pytest.approx(math.log(K), abs=1e-14)


def test_entropy_of_a_certain_choice_is_zero_and_not_nan() -> None:
    assert entropy(torch.eye(K)[3]).item() == 0


@pytest.mark.parametrize(
    "q_TK", [torch.eye(K)[[2] * 8], torch.full((8, K), 1 / K)], ids=["all rows to one prototype", "every row to all"]
)
def test_a_dead_head_has_no_mutual_information(q_TK: Tensor) -> None:
    information = statistics_of(q_TK.double()).mutual_information.item()
    assert information == pytest.approx(0, abs=1e-12), f"mutual information {information}"


def test_rows_told_apart_by_their_prototypes_have_log_of_their_number() -> None:
    information = statistics_of(torch.eye(K).double()[:8]).mutual_information.item()
    assert information == pytest.approx(math.log(8), abs=1e-12), f"mutual information {information}"
