"""Prototypes: keys, norms and gradients of the stored tensors agree with the plain formulas."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.fuzz.statements.prototypes import effective
from vmf_kernels import (
    Prototypes,
    linear_prototypes,
    log_vmf_constant,
    normalized_prototypes,
    prototypes,
    vmf_prototypes,
    weight_norm_prototypes,
    weight_norm_vmf_prototypes,
)
from vmf_kernels.prototypes import KINDS, prepare_keys, pull_back_to_stored

pytestmark = pytest.mark.quick

COUNT, DIM = 127, 24
TEMPERATURE = 0.07
BUDGET = 1e-10  # fp64, relative to the largest element


def stored(kind: str, dtype: torch.dtype = torch.float64) -> Prototypes:
    """Prototypes with a zero row, and under weight norm with a negative and a zero magnitude."""
    weight = torch.randn(COUNT, DIM, dtype=torch.float64)
    weight[5] = 0
    magnitude = torch.randn(COUNT, 1, dtype=torch.float64)
    magnitude[7] = 0
    under_weight_norm = kind.startswith("weight_norm")
    return Prototypes(weight.to(dtype), magnitude.to(dtype) if under_weight_norm else None, kind)


def plain_weight_and_norms(stored: Prototypes) -> tuple[Tensor, Tensor]:
    """[K, D] effective prototypes and [K] norms, in fp64."""
    return effective(
        stored.weight.double(), None if stored.magnitude is None else stored.magnitude.double(), stored.kind
    )


def relative_error(actual: Tensor, exact: Tensor) -> float:
    return ((actual.double() - exact).abs().max() / exact.abs().max()).nan_to_num(nan=torch.inf).item()


@pytest.mark.parametrize("kind", KINDS)
def test_effective_weight_and_norms_are_those_of_the_plain_formula(kind: str) -> None:
    ours = stored(kind)
    weight, norms = plain_weight_and_norms(ours)
    error = max(relative_error(ours.effective_weight(), weight), relative_error(ours.norms(), norms))
    assert error <= BUDGET, f"relative error {error:.1e}, budget {BUDGET:.0e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_norms_of_half_precision_weights_are_formed_in_fp32(kind: str, dtype: torch.dtype) -> None:
    ours = stored(kind, dtype)
    error = relative_error(ours.norms(), plain_weight_and_norms(ours)[1])
    assert (ours.norms().dtype, ours.effective_weight().dtype) == (torch.float32, dtype)
    assert error <= 4e-7, f"relative error {error:.1e}, budget 4e-7"


@pytest.mark.parametrize("kind", KINDS)
def test_keys_give_the_logits_of_the_plain_formula(kind: str) -> None:
    ours, extra = stored(kind), torch.randn(1, COUNT, dtype=torch.float64)
    x = torch.randn(9, DIM, dtype=torch.float64)
    weight, norms = plain_weight_and_norms(ours)
    logits = x @ weight.T / TEMPERATURE + extra
    if kind.endswith("_vmf"):
        logits = logits + log_vmf_constant(norms / TEMPERATURE, DIM)
    keys = prepare_keys(ours, torch.tensor(TEMPERATURE, dtype=torch.float64), extra, torch.float64)
    gain = torch.ones(COUNT, dtype=torch.float64) if keys.gain is None else keys.gain
    assert keys.bias is not None
    error = relative_error(keys.scale * (x @ keys.weight.T) * gain + keys.bias, logits)
    assert error <= BUDGET, f"relative error {error:.1e}, budget {BUDGET:.0e}"


@pytest.mark.parametrize("kind", KINDS)
def test_keys_share_the_memory_of_the_weight_and_need_no_bias_without_a_reason(kind: str) -> None:
    ours = stored(kind)
    keys = prepare_keys(ours, torch.tensor(TEMPERATURE), None, torch.float32)
    assert keys.weight.data_ptr() == ours.weight.data_ptr(), "the [K, D] weight was copied"
    assert (keys.bias is None) == (not kind.endswith("_vmf")), f"bias is {keys.bias}"


def test_a_bias_of_minus_infinity_becomes_the_lowest_finite_one() -> None:
    extra = torch.zeros(COUNT)
    extra[3] = -torch.inf
    bias = prepare_keys(stored("linear_vmf"), torch.tensor(TEMPERATURE), extra, torch.float32).bias
    assert bias is not None
    assert bias[3].item() == torch.finfo(torch.float32).min, f"bias is {bias[3].item()}"


@pytest.mark.parametrize("block", [50, prototypes.PULL_BACK_BLOCK])
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_pulled_back_is_that_of_autograd(kind: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prototypes, "PULL_BACK_BLOCK", block)
    ours = stored(kind)
    gradient, bias_gradient = torch.randn(COUNT, DIM, dtype=torch.float64), torch.randn(COUNT, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (ours.weight, ours.magnitude) if t is not None]
    weight, norms = plain_weight_and_norms(ours)
    product = (gradient * weight).sum()
    if kind.endswith("_vmf"):
        product = product + bias_gradient @ log_vmf_constant(norms / TEMPERATURE, DIM)
    exact = torch.autograd.grad(product, leaves)
    temperature = torch.tensor(TEMPERATURE, dtype=torch.float64)
    at_magnitude = pull_back_to_stored(ours, temperature, gradient, bias_gradient)
    actual = [gradient] if at_magnitude is None else [gradient, at_magnitude[:, None]]
    error = max(relative_error(a, e) for a, e in zip(actual, exact, strict=True))
    assert error <= BUDGET, f"relative error {error:.1e}, budget {BUDGET:.0e}"


def test_gradient_without_the_normaliser_fails_the_budget() -> None:
    """Negative control: the slope of log C left out."""
    ours, gradient = stored("linear_vmf"), torch.zeros(COUNT, DIM, dtype=torch.float64)
    weight = ours.weight.requires_grad_()
    normalizer = log_vmf_constant(torch.linalg.vector_norm(weight, dim=1) / TEMPERATURE, DIM)
    (exact,) = torch.autograd.grad(normalizer.sum(), weight)
    pull_back_to_stored(ours, torch.tensor(TEMPERATURE), gradient, None)
    error = relative_error(gradient, exact)
    assert error > BUDGET, f"a gradient without log C passes: relative error {error:.1e}"


@pytest.mark.parametrize("kind", KINDS)
def test_a_zero_row_of_the_weight_gets_gradient_zero(kind: str) -> None:
    ours, gradient = stored(kind), torch.randn(COUNT, DIM, dtype=torch.float64)
    before = gradient[5].clone()
    pull_back_to_stored(ours, torch.tensor(TEMPERATURE), gradient, torch.randn(COUNT, dtype=torch.float64))
    expected = before if kind.startswith("linear") else torch.zeros_like(before)  # linear: w is its own parameter
    assert torch.equal(gradient[5], expected), f"gradient of the zero row is {gradient[5].tolist()}"
    assert gradient.isfinite().all(), "a gradient is not finite"


@pytest.mark.parametrize("kind", KINDS)
def test_effective_weight_and_norms_are_differentiable_at_zero_rows(kind: str) -> None:
    ours = stored(kind)
    weight = ours.weight.requires_grad_()
    (gradient,) = torch.autograd.grad(ours.effective_weight().sum() + 0 * weight.sum() + ours.norms().sum(), weight)
    assert gradient.isfinite().all(), "a gradient is not finite"


def test_magnitude_may_be_a_column_or_a_vector() -> None:
    column = stored("weight_norm_vmf")
    assert column.magnitude is not None
    vector = weight_norm_vmf_prototypes(column.magnitude[:, 0], column.weight)
    assert torch.equal(vector.effective_weight(), column.effective_weight())
    assert torch.equal(vector.norms(), column.norms())


def test_every_constructor_makes_its_kind() -> None:
    weight, magnitude = torch.randn(COUNT, DIM), torch.randn(COUNT)
    made = [
        linear_prototypes(weight),
        normalized_prototypes(weight),
        weight_norm_prototypes(magnitude, weight),
        vmf_prototypes(weight),
        weight_norm_vmf_prototypes(magnitude, weight),
    ]
    assert tuple(p.kind for p in made) == KINDS
    assert {(p.count, p.dim) for p in made} == {(COUNT, DIM)}
    assert [p.has_normalizer for p in made] == [False, False, False, True, True]


@pytest.mark.parametrize("kind", ["linear", "weight_norm"])
def test_vmf_can_be_put_on_and_taken_off(kind: str) -> None:
    ours = stored(kind)
    assert ours.with_vmf().kind == ours.with_vmf().with_vmf().kind == kind + "_vmf"
    assert ours.with_vmf().without_vmf().kind == ours.without_vmf().kind == kind


def test_detached_prototypes_share_memory_but_no_graph() -> None:
    ours = stored("weight_norm")
    assert ours.magnitude is not None
    ours.weight.requires_grad_()
    ours.magnitude.requires_grad_()
    cut = ours.detach()
    assert cut.magnitude is not None
    assert [cut.weight.requires_grad, cut.magnitude.requires_grad] == [False, False]
    assert cut.weight.data_ptr() == ours.weight.data_ptr()


def test_normalized_prototypes_refuse_the_vmf_normaliser() -> None:
    with pytest.raises(ValueError, match=r"normalized prototypes all have norm 1.*expected linear or weight-norm"):
        stored("normalized").with_vmf()


@pytest.mark.parametrize(
    ("weight", "said"),
    [
        (torch.randn(3), r"weight is torch.float32 of shape \(3,\)"),
        (torch.randn(0, 4), r"shape \(0, 4\); expected a floating-point matrix \[K, D\] with K >= 1"),
        (torch.randn(4, 1), r"shape \(4, 1\); .* dim D >= 2"),
        (torch.ones(4, 4, dtype=torch.int64), r"weight is torch.int64"),
    ],
)
@pytest.mark.parametrize("constructor", [linear_prototypes, normalized_prototypes, vmf_prototypes])
def test_a_weight_that_is_no_matrix_of_prototypes_is_refused(
    constructor: Callable[[Tensor], Prototypes], weight: Tensor, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        constructor(weight)


@pytest.mark.parametrize("constructor", [weight_norm_prototypes, weight_norm_vmf_prototypes])
def test_a_magnitude_that_does_not_fit_is_refused(constructor: Callable[[Tensor, Tensor], Prototypes]) -> None:
    with pytest.raises(ValueError, match=r"magnitude has shape \(3, 1\); expected \[K, 1\] or \[K\] with K = 4"):
        constructor(torch.ones(3, 1), torch.randn(4, 2))
    with pytest.raises(ValueError, match=r"direction is torch.float32 of shape \(4,\)"):
        constructor(torch.ones(4), torch.randn(4))


@pytest.mark.parametrize("kind", ["linear_vmf", "weight_norm_vmf"])
def test_the_normalizer_is_that_of_the_density_and_has_its_slope(kind: str) -> None:
    given, tau = stored(kind), torch.tensor(TEMPERATURE, dtype=torch.float64)
    norms = plain_weight_and_norms(given)[1]
    got = given.log_normalizer(tau, torch.float64)
    assert (got - log_vmf_constant(norms / tau, DIM)).abs().max() <= BUDGET * got.abs().max()
    keys = prepare_keys(given, tau, None, torch.float64)
    assert keys.bias is not None
    assert (keys.bias - got).abs().max() <= BUDGET * got.abs().max(), "the operator has another normaliser"


def test_prototypes_without_a_normalizer_say_so() -> None:
    with pytest.raises(ValueError, match=r"linear prototypes have no vMF normaliser; expected prototypes.with_vmf\(\)"):
        stored("linear").log_normalizer(torch.tensor(0.1))
