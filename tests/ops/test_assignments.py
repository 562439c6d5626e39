"""The choice of a backend, and the forward-only operators: usage, and log-sum-exp over prototypes or rows."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from torch import Tensor

from tests.backends.conformance import dense_assignment
from vmf_kernels import Prototypes, linear_prototypes, prototype_usage
from vmf_kernels.arguments import temperature_tensor
from vmf_kernels.backends import choice
from vmf_kernels.backends.choice import choose_backend
from vmf_kernels.backends.contract import Backend
from vmf_kernels.ops.assignments import column_log_sum_exp, row_log_sum_exp
from vmf_kernels.ops.operators import without_autocast
from vmf_kernels.prototypes import KINDS, prepare_keys
from vmf_kernels.testing import random_problem

BACKENDS = ["streaming", "reference"]
TEMPERATURE = 0.07
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ROUNDINGS = 4  # of the largest logit in the accumulation dtype, for every logarithm


def rows_and_prototypes(kind: str, dtype: torch.dtype, rows: int = 65) -> tuple[Tensor, Prototypes]:
    problem = random_problem(views=(1, rows), prototypes=1000, kind=kind, dtype=dtype)
    return problem.student_features, problem.student_prototypes


def dense(features: Tensor, prototypes: Prototypes, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """[R] log-sum-exp and [R, K] probabilities in fp64."""
    temperature = torch.tensor(TEMPERATURE, dtype=torch.float64)
    assignment, p_RK = dense_assignment(features, prepare_keys(prototypes, temperature, bias, torch.float64))
    return assignment.log_sum_exp, p_RK


@pytest.mark.quick
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_usage_and_log_sums_match_the_dense_formula(kind: str, dtype: torch.dtype, backend: str) -> None:
    features, prototypes = rows_and_prototypes(kind, dtype)
    bias = torch.randn(1000).to(dtype)
    lse_R, p_RK = dense(features, prototypes)
    usage = prototype_usage(features, prototypes, TEMPERATURE, bias, backend=backend)
    rows = row_log_sum_exp(features, prototypes, TEMPERATURE, backend=backend)
    columns = column_log_sum_exp(features, prototypes, TEMPERATURE, rows, backend=backend)
    accumulated = torch.float64 if dtype == torch.float64 else torch.float32
    assert {usage.dtype, rows.dtype, columns.dtype} == {accumulated}
    exact = (dense(features, prototypes, bias)[1].mean(dim=0).log(), lse_R, p_RK.sum(dim=0).log())
    errors = [(got - e).abs().max().item() for got, e in zip((usage.double().log(), rows, columns), exact, strict=True)]
    budget = ROUNDINGS * torch.finfo(accumulated).eps * prototypes.norms().max().item() / TEMPERATURE
    assert max(errors) <= budget, f"log usage, rows, columns are off by {errors} nats, budget {budget:.1e}"


@pytest.mark.quick
def test_bfloat16_rows_fail_the_budget() -> None:
    """Negative control of the one above: the same measurement, one rounding of the rows to half precision."""
    features, prototypes = rows_and_prototypes("linear", torch.float32)
    error = (row_log_sum_exp(features.bfloat16(), prototypes, TEMPERATURE) - dense(features, prototypes)[0]).abs().max()
    budget = ROUNDINGS * torch.finfo(torch.float32).eps * prototypes.norms().max() / TEMPERATURE
    assert error > 100 * budget, f"off by {error:.1e} nats, budget {budget:.1e}"


@pytest.mark.quick
@pytest.mark.parametrize("backend", BACKENDS)
def test_usage_sums_to_one_and_a_bias_moves_it(backend: str) -> None:
    features, prototypes = rows_and_prototypes("weight_norm_vmf", torch.float32)
    bias = torch.zeros(1000)
    bias[3] = 50
    usage = prototype_usage(features, prototypes, TEMPERATURE, bias, backend=backend)
    assert usage.sum().item() == pytest.approx(1, abs=1e-5)
    assert usage[3].item() == pytest.approx(1, abs=1e-5), "a bias of 50 nats did not take all the mass"


@pytest.mark.quick
@pytest.mark.parametrize("backend", BACKENDS)
def test_row_sums_take_a_bias(backend: str) -> None:
    features, prototypes = rows_and_prototypes("weight_norm_vmf", torch.float64)
    bias = torch.randn(1000, dtype=torch.float64)
    usage = prototype_usage(features[:1], prototypes, TEMPERATURE, bias, backend=backend)
    lse = row_log_sum_exp(features[:1], prototypes, TEMPERATURE, bias, backend=backend)
    column = column_log_sum_exp(features[:1], prototypes, TEMPERATURE, lse, backend=backend)
    error = (usage.log() - (column + bias)).abs().max()
    assert error < 1e-10, f"off by {error:.1e} nats"


@pytest.mark.quick
@pytest.mark.parametrize("backend", BACKENDS)
def test_log_of_a_column_does_not_underflow(backend: str) -> None:
    """A prototype no row is near has probability exp(-1000), 0 in any dtype; its logarithm is what a centre needs."""
    features, weight = torch.ones(3, 2), torch.tensor([[0.0, 0.0], [-500.0, -500.0]])
    rows = row_log_sum_exp(features, linear_prototypes(weight), 1.0, backend=backend)
    columns = column_log_sum_exp(features, linear_prototypes(weight), 1.0, rows, backend=backend)
    assert columns[1].item() == pytest.approx(-1000 + torch.tensor(3.0).log().item(), rel=1e-6)


@pytest.mark.quick
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows_give_no_row_sums_and_empty_column_sums(backend: str) -> None:
    features, prototypes = rows_and_prototypes("linear", torch.float32, rows=0)
    rows = row_log_sum_exp(features, prototypes, TEMPERATURE, backend=backend)
    columns = column_log_sum_exp(features, prototypes, TEMPERATURE, rows, backend=backend)
    assert rows.shape == (0,)
    assert columns.tolist() == [-torch.inf] * 1000


def each_op(features: Tensor, prototypes: Prototypes, bias: Tensor, backend: str = "auto") -> tuple[Tensor, ...]:
    rows = row_log_sum_exp(features, prototypes, TEMPERATURE, backend=backend)
    return (
        prototype_usage(features, prototypes, TEMPERATURE, bias, backend=backend),
        rows,
        column_log_sum_exp(features, prototypes, TEMPERATURE, rows, backend=backend),
    )


@pytest.mark.quick
@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_changes_nothing(backend: str) -> None:
    features, prototypes = rows_and_prototypes("weight_norm_vmf", torch.float32)
    bias = torch.randn(1000)
    outside = each_op(features, prototypes, bias, backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = each_op(features, prototypes, bias, backend)
    assert all(torch.equal(a, b) for a, b in zip(outside, inside, strict=True)), "autocast changes a result"


@pytest.mark.quick
def test_autocast_would_change_an_op_not_shielded_from_it() -> None:
    """Negative control: the same product with and without the shield."""
    x = torch.randn(9, 9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.mm(x, x).dtype == torch.bfloat16
        assert without_autocast(torch.mm)(x, x).dtype == torch.float32


@pytest.mark.quick
def test_results_have_no_graph_whatever_asks_for_one() -> None:
    features, prototypes = rows_and_prototypes("linear", torch.float32)
    features.requires_grad_()
    prototypes.weight.requires_grad_()
    assert not any(result.requires_grad for result in each_op(features, prototypes, torch.zeros(1000).requires_grad_()))
    offset = torch.zeros(65, requires_grad=True)
    assert not column_log_sum_exp(features, prototypes, TEMPERATURE, offset).requires_grad


@pytest.mark.parametrize("kind", ["linear", "weight_norm_vmf"])
@pytest.mark.parametrize("op", ["prototype_usage", "row_log_sum_exp", "column_log_sum_exp"])
def test_ops_pass_opcheck(op: str, kind: str) -> None:
    problem = random_problem(views=(1, 9), prototypes=17, dim=6, kind=kind, dtype=torch.float32)
    stored, tau = problem.student_prototypes, torch.tensor(0.1, dtype=torch.float64)
    head = (problem.student_features, stored.weight, stored.magnitude, kind)
    tails: dict[str, tuple[object, ...]] = {
        "prototype_usage": (torch.zeros(17), tau, "streaming"),
        "row_log_sum_exp": (torch.randn(17), tau, "streaming"),
        "column_log_sum_exp": (None, tau, "streaming", "", torch.zeros(9)),
    }
    overload = getattr(torch.ops.vmf_kernels, op).default
    torch.library.opcheck(overload, (*head, *tails[op]))


def test_compiled_in_one_graph_they_equal_eager() -> None:
    features, prototypes = rows_and_prototypes("weight_norm_vmf", torch.float32)
    bias = torch.randn(1000)
    torch.compiler.reset()
    compiled = torch.compile(each_op, fullgraph=True, backend="aot_eager")(features, prototypes, bias)
    assert all(torch.equal(a, b) for a, b in zip(compiled, each_op(features, prototypes, bias), strict=True))


@pytest.mark.quick
def test_auto_takes_the_first_backend_that_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 3)
    able = cast(Backend, SimpleNamespace(unsupported=lambda rows, weight: None))
    unable = cast(Backend, SimpleNamespace(unsupported=lambda rows, weight: "no such processor"))
    monkeypatch.setattr(choice, "BACKENDS", {"unable": unable, "able": able})
    monkeypatch.setattr(choice, "PREFERENCE", {"cpu": ("unable", "able")})
    assert choose_backend("auto", x, x) is able


@pytest.mark.quick
def test_auto_means_streaming_for_fp64_and_a_name_means_that_backend() -> None:
    x = torch.randn(2, 3, dtype=torch.float64)
    assert choose_backend("auto", x, x) is choice.BACKENDS["streaming"]
    assert choose_backend("streaming", x, x) is choice.BACKENDS["streaming"]
    assert choose_backend("reference", x, x) is choice.BACKENDS["reference"]


@pytest.mark.quick
def test_a_backend_asked_for_by_name_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 3)
    unable = cast(Backend, SimpleNamespace(unsupported=lambda rows, weight: "no such processor"))
    monkeypatch.setitem(choice.BACKENDS, "streaming", unable)
    with pytest.raises(RuntimeError, match="backend 'streaming' cannot run here: no such processor"):
        choose_backend("streaming", x, x)


Op = Callable[[Tensor, Prototypes, float], Tensor]
OPS: dict[str, Op] = {
    "usage": prototype_usage,
    "rows": row_log_sum_exp,
    "columns": lambda x, p, tau: column_log_sum_exp(x, p, tau, x.new_zeros(len(x))),
}


@pytest.mark.quick
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("features", "temperature", "said"),
    [
        (torch.randn(3), 0.1, r"given features are torch.float32 of shape \(3,\); expected a floating-point matrix"),
        (torch.ones(3, 4, dtype=torch.int32), 0.1, "given features are torch.int32"),
        (torch.randn(3, 5), 0.1, "given features have 5 columns but the given prototypes have 4; both must be"),
        (
            torch.randn(3, 4, device="meta"),
            0.1,
            "given features are on meta but the given prototypes on cpu; expected one device",
        ),
        (torch.randn(3, 4), 0.0, "temperature is 0.0; expected a number > 0"),
        (torch.randn(3, 4), -0.1, "temperature is -0.1; expected a number > 0"),
    ],
)
def test_wrong_arguments_are_named(op: str, features: Tensor, temperature: float, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        OPS[op](features, linear_prototypes(torch.randn(7, 4)), temperature)


@pytest.mark.quick
def test_what_only_one_op_needs_is_checked_too() -> None:
    prototypes = linear_prototypes(torch.randn(7, 4))
    with pytest.raises(ValueError, match="features has 0 rows; expected at least one to take a mean over"):
        prototype_usage(torch.randn(0, 4), prototypes, 0.1)
    with pytest.raises(ValueError, match="bias has 6 elements; expected one for each of the 7 prototypes"):
        prototype_usage(torch.randn(3, 4), prototypes, 0.1, torch.zeros(6))
    with pytest.raises(ValueError, match=r"offset has shape \(1,\); expected \[3\], one for each row"):
        column_log_sum_exp(torch.randn(3, 4), prototypes, 0.1, torch.zeros(1))
    with pytest.raises(ValueError, match="unknown backend 'gpu'; expected one of auto, reference, streaming, native"):
        prototype_usage(torch.randn(3, 4), prototypes, 0.1, backend="gpu")


@pytest.mark.quick
def test_temperature_becomes_one_fp64_number_without_a_graph() -> None:
    for value in (
        0.1,
        torch.tensor(0.1, dtype=torch.float64),
        torch.tensor([[0.1]], dtype=torch.float64).requires_grad_(),
    ):
        tau = temperature_tensor(value, "temperature", torch.device("cpu"))
        assert (tau.shape, tau.dtype, tau.item(), tau.requires_grad) == ((), torch.float64, 0.1, False)
    with pytest.raises(ValueError, match="temperature has 2 elements; expected 1"):
        temperature_tensor(torch.ones(2), "temperature", torch.device("cpu"))
    with pytest.raises(ValueError, match="temperature is nan; expected a number > 0"):
        temperature_tensor(torch.tensor(torch.nan), "temperature", torch.device("cpu"))


@pytest.mark.quick
def test_more_than_2_to_the_31_logits_have_their_shapes() -> None:
    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, device="meta")

    rows, count, dim = 2**17, 2**16, 2**15
    shapes = [r.shape for r in each_op(empty(rows, dim), linear_prototypes(empty(count, dim)), empty(count))]
    assert shapes == [(count,), (rows,), (count,)]


@pytest.mark.quick
def test_bare_weight_instead_of_prototypes_is_named() -> None:
    with pytest.raises(ValueError, match=r"prototypes are a Tensor; expected Prototypes, .*linear_prototypes"):
        prototype_usage(torch.randn(3, 4), torch.randn(7, 4), 0.1)  # type: ignore[arg-type]
