"""Log-sums of one batch over logits that the native backend stores once, as Sinkhorn-Knopp takes them.

Legend: R rows, K prototypes, D embedding dim.
"""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import Tensor

from tests.backends.native_calls import ROUNDINGS
from vmf_kernels import PrototypeLogits, SinkhornKnopp
from vmf_kernels.backends.native import chunks, module, stored_sums
from vmf_kernels.centering.log_sums import LogSums
from vmf_kernels.ops.assignments import stored_sums as stored_sums_of
from vmf_kernels.prototypes import Prototypes
from vmf_kernels.testing import random_problem

pytestmark = pytest.mark.skipif(module.native() is None, reason="vmf_kernels._native was not built")

TAU = 0.07


def batch(
    rows: int, prototypes: int, dim: int, kind: str = "weight_norm_vmf"
) -> tuple[Tensor, Prototypes, Tensor, Tensor]:
    """Features [R, D], prototypes, a bias [K] and offsets [R]."""
    problem = random_problem(views=(rows, 1), prototypes=prototypes, dim=dim, kind=kind, dtype=torch.float32)
    assert problem.teacher_bias is not None
    return problem.teacher_features, problem.teacher_prototypes, problem.teacher_bias, 30 * torch.randn(rows)


def logits_of(features: Tensor, prototypes: Prototypes) -> Tensor:
    """[R, K] fp64."""
    logits = features.double() @ prototypes.effective_weight().double().T / TAU
    return logits + prototypes.log_normalizer(TAU, torch.float64) if prototypes.has_normalizer else logits


def sums_of(features: Tensor, prototypes: Prototypes, bias: Tensor, offset: Tensor) -> dict[str, Tensor]:
    """Every kind of sum."""
    stored = stored_sums_of(features, prototypes, TAU, backend="native")
    assert stored is not None
    rows, biased = stored.over_prototypes(None), stored.over_prototypes(bias)
    return {"rows": rows, "biased rows": biased, "columns": stored.over_rows(offset)}


def check(features: Tensor, prototypes: Prototypes, bias: Tensor, offset: Tensor) -> None:
    """Raise AssertionError unless the sums are as near the fp64 truth as the roundings of their logits allow."""
    l_RK = logits_of(features, prototypes)
    truth = {
        "rows": l_RK.logsumexp(dim=1),
        "biased rows": (l_RK + bias.double()).logsumexp(dim=1),
        "columns": (l_RK - offset.double()[:, None]).logsumexp(dim=0),
    }
    largest = l_RK.abs().max().item() + bias.abs().max().item() + offset.abs().max().item()
    budget = ROUNDINGS * torch.finfo(torch.float32).eps * largest
    for name, got in sums_of(features, prototypes, bias, offset).items():
        error = (got.double() - truth[name]).abs().max().item()
        assert error <= budget, f"{name}: error {error:.1e} nats, budget {budget:.1e}"


@pytest.mark.quick
@pytest.mark.parametrize(
    ("rows", "prototypes", "dim", "kind"),
    [(1, 1, 2, "linear"), (17, 4099, 24, "weight_norm_vmf"), (65, 127, 100, "normalized")],
)
def test_sums_match_the_fp64_truth(
    rows: int, prototypes: int, dim: int, kind: str, isa: str, uninitialised_memory_is_nan: None
) -> None:
    check(*batch(rows, prototypes, dim, kind))


@pytest.mark.parametrize("name", ["sum_over_prototypes", "sum_over_rows"])
def test_sums_without_bias_or_offset_fail_the_budget(name: str, isa: str) -> None:
    """Negative control."""
    run = stored_sums.NativeStoredSums._run

    def damaged(self: stored_sums.NativeStoredSums, called: str, argument: Tensor | None, result: Tensor) -> None:
        run(self, called, argument if argument is None or called != name else torch.zeros_like(argument), result)

    with (
        mock.patch.object(stored_sums.NativeStoredSums, "_run", damaged),
        pytest.raises(AssertionError, match=r"error .*, budget"),
    ):
        check(*batch(17, 1000, 24))


def test_any_number_of_threads_gives_the_same_bits(isa: str) -> None:
    inputs, outcomes = batch(17, 4099, 24), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        outcomes.append(sums_of(*inputs))
    assert all(torch.equal(outcomes[0][name], other[name]) for other in outcomes for name in other)


def test_logits_that_do_not_fit_are_not_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    features, prototypes, _, _ = batch(17, 1000, 24)
    assert stored_sums_of(features, prototypes, TAU, backend="native") is not None
    assert stored_sums_of(features, prototypes, TAU, backend="streaming") is None
    assert stored_sums_of(features[:0], prototypes, TAU, backend="native") is None
    monkeypatch.setattr(stored_sums, "WORKSPACE_BYTES", 4 * chunks.padded(17) * 1000 - 1)
    assert stored_sums_of(features, prototypes, TAU, backend="native") is None


@pytest.mark.quick
def test_sinkhorn_knopp_is_that_of_five_passes() -> None:
    features, prototypes, _, _ = batch(17, 301, 24)
    teacher, rule = PrototypeLogits(features, prototypes), SinkhornKnopp(3, backend="native")
    stored = rule(teacher, TAU)
    with mock.patch.object(stored_sums, "WORKSPACE_BYTES", 0):
        passes = rule(teacher, TAU)
    torch.testing.assert_close(stored, passes, rtol=1e-5, atol=1e-5)
    assert stored.std() > 0.1


def test_logits_are_freed_with_the_call() -> None:
    features, prototypes, _, offset = batch(17, 301, 24)
    with LogSums(PrototypeLogits(features, prototypes), TAU, backend="native") as sums:
        assert sums.kept is not None
        sums.over_rows(offset)
    assert sums.kept is None
