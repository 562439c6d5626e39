"""The vMF normaliser against mpmath: values, slopes, edges, and the errors that callers see.

Truth is computed at the kappa that was passed: the grids are rounded to float32, so that both dtypes share one truth.
"""

import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import cache
from typing import NamedTuple

import mpmath as mp
import pytest
import torch
from torch import Tensor

from vmf_kernels import bessel
from vmf_kernels._debye import DEBYE_LOG_COEFFICIENTS
from vmf_kernels.bessel import log_vmf_constant, vmf_mean_resultant_length

DIGITS = 40
BUDGET = {torch.float32: 5e-7, torch.float64: 1e-12}
SMALL_DIM_BUDGET = {torch.float32: 2e-6, torch.float64: 1e-12}  # dim < 64, where up to 31 steps of recurrence add up
# the slope's recurrence cancels at large kappa: float64 is left with 8e-13 at dim 2, and float32 passes through float64
SLOPE_BUDGET = {torch.float32: 1e-6, torch.float64: 5e-12}
DTYPES = [pytest.param(torch.float32, id="fp32"), pytest.param(torch.float64, id="fp64")]

EMBEDDING_DIMS = (64, 128, 256, 384, 768, 1024)
LARGEST_DIM = 1024
# one for each kind: integer and half-integer order, many and few steps of recurrence, the last with steps, none
DIMS_OF_EACH_KIND = (2, 3, 16, 63, 64, 256)


class Truth(NamedTuple):
    """One value per kappa of the grid."""

    log_constant: list[mp.mpf]
    length: list[mp.mpf]
    slope: list[mp.mpf]


def kappa_grid(points: int) -> Tensor:
    """[points] float32, log-spaced from 1e-6 to 1e6."""
    return torch.logspace(-6, 6, points, dtype=torch.float64).float()


def bessel_pair(order: mp.mpf, kappa: mp.mpf) -> tuple[mp.mpf, mp.mpf]:
    """log C - log C(0) and A at ``order`` = dim/2 - 1, from the Bessel functions themselves."""
    lower, upper = mp.besseli(order, kappa), mp.besseli(order + 1, kappa)
    return order * mp.log(kappa / 2) - mp.loggamma(order + 1) - mp.log(lower), upper / lower


@cache
def direct_truth(dim: int, points: int) -> Truth:
    """Truth for one dim, without any recurrence."""
    truth = Truth([], [], [])
    with mp.workdps(DIGITS):
        order = mp.mpf(dim) / 2 - 1
        for kappa in map(mp.mpf, kappa_grid(points).tolist()):
            log_constant, length = bessel_pair(order, kappa)
            truth.log_constant.append(log_constant)
            truth.length.append(length)
            truth.slope.append(1 - length**2 - (dim - 1) * length / kappa)
    return truth


@cache
def truth_of_all_dims(points: int) -> dict[int, Truth]:
    """Truth for every dim of 2..1024: Bessel functions at the two largest, then I_{n-1} = I_{n+1} + 2 n I_n / kappa."""
    truths = {dim: Truth([], [], []) for dim in range(2, LARGEST_DIM + 1)}
    with mp.workdps(DIGITS):
        for top in (LARGEST_DIM, LARGEST_DIM - 1):
            for kappa in map(mp.mpf, kappa_grid(points).tolist()):
                order = mp.mpf(top) / 2 - 1
                log_constant, length = bessel_pair(order, kappa)
                for dim in range(top, 1, -2):
                    truths[dim].log_constant.append(log_constant)
                    truths[dim].length.append(length)
                    truths[dim].slope.append(1 - length**2 - (dim - 1) * length / kappa)
                    if dim > 3:
                        log_constant -= mp.log1p(kappa * length / (2 * order))
                        length, order = kappa / (2 * order + kappa * length), order - 1
    return truths


def worst_relative_error(measured: Tensor, truth: list[mp.mpf]) -> float:
    """Largest error relative to the value itself, by a truth rounded to 1e-16; infinite if any value is not finite."""
    assert len(measured) == len(truth)
    if not measured.isfinite().all():
        return float("inf")
    exact = torch.tensor([float(value) for value in truth], dtype=torch.float64)
    return (measured.detach().double() / exact - 1).abs().max().item()


def budget(dim: int, dtype: torch.dtype) -> float:
    """Relative error that the docstrings promise."""
    return (BUDGET if dim >= 64 else SMALL_DIM_BUDGET)[dtype]


def slope_of(function: Callable[[Tensor, int], Tensor], kappa: Tensor, dim: int) -> Tensor:
    """Derivative of ``function`` at each ``kappa``, by autograd."""
    kappa = kappa.clone().requires_grad_()
    (slope,) = torch.autograd.grad(function(kappa, dim).sum(), kappa)
    return slope


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [*EMBEDDING_DIMS, 2, 3, 17, 63])
def test_log_constant_matches_bessel_functions(dim: int, dtype: torch.dtype) -> None:
    log_constant = log_vmf_constant(kappa_grid(49).to(dtype), dim)
    error = worst_relative_error(log_constant, direct_truth(dim, 49).log_constant)
    assert log_constant.dtype == dtype
    assert error <= budget(dim, dtype), f"relative error {error:.2e}, budget {budget(dim, dtype):.0e}"


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [*EMBEDDING_DIMS, 2, 3, 17, 63])
def test_mean_resultant_length_matches_bessel_functions(dim: int, dtype: torch.dtype) -> None:
    length = vmf_mean_resultant_length(kappa_grid(49).to(dtype), dim)
    error = worst_relative_error(length, direct_truth(dim, 49).length)
    assert length.dtype == dtype
    assert error <= budget(dim, dtype), f"relative error {error:.2e}, budget {budget(dim, dtype):.0e}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("first", "last"), [(2, 63), (64, 255), (256, 511), (512, 1024)])
def test_every_dim_is_within_budget(first: int, last: int, dtype: torch.dtype) -> None:
    kappa, truths = kappa_grid(25).to(dtype), truth_of_all_dims(25)
    worst, dim, name = max(
        (worst_relative_error(function(kappa, dim), getattr(truths[dim], name)), dim, name)
        for dim in range(first, last + 1)
        for function, name in ((log_vmf_constant, "log_constant"), (vmf_mean_resultant_length, "length"))
    )
    allowed = budget(first, dtype)
    assert worst <= allowed, f"{name} at dim {dim}: relative error {worst:.2e}, budget {allowed:.0e}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [*DIMS_OF_EACH_KIND, 1024])
def test_slope_of_mean_resultant_length_does_not_cancel(dim: int, dtype: torch.dtype) -> None:
    slope = slope_of(vmf_mean_resultant_length, kappa_grid(25).to(dtype), dim)
    error = worst_relative_error(slope, truth_of_all_dims(25)[dim].slope)
    assert error <= SLOPE_BUDGET[dtype], f"relative error {error:.2e}, budget {SLOPE_BUDGET[dtype]:.0e}"


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES)
def test_expansion_cut_after_one_term_fails_the_budget(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: the shorter expansion, everything else equal."""
    monkeypatch.setitem(bessel.DEBYE_TERMS, dtype, 1)
    kappa, truth = kappa_grid(49).to(dtype), direct_truth(128, 49)
    for function, exact in ((log_vmf_constant, truth.log_constant), (vmf_mean_resultant_length, truth.length)):
        error = worst_relative_error(function(kappa, 128), exact)
        assert error > BUDGET[dtype], f"{function.__name__} with one term passes: error {error:.2e}"


@pytest.mark.quick
def test_large_argument_form_fails_the_budget() -> None:
    """Negative control: Hankel's ``log I ~ kappa - log(2 pi kappa)/2``, in float64, is not for moderate kappa."""
    dim, kappa = 256, kappa_grid(49).double()
    log_bessel = kappa - torch.log(2 * torch.pi * kappa) / 2
    order = dim / 2 - 1
    log_constant = order * torch.log(kappa / 2) - math.lgamma(order + 1) - log_bessel
    error = worst_relative_error(log_constant, direct_truth(dim, 49).log_constant)
    assert error > BUDGET[torch.float32], f"the large-argument form passes: error {error:.2e}"


@pytest.mark.quick
def test_a_value_that_is_not_finite_fails_the_budget() -> None:
    """Negative control: NaN compares false with everything, and must not slip through a maximum."""
    assert worst_relative_error(torch.tensor([1.0, float("nan")]), [mp.mpf(1), mp.mpf(1)]) == float("inf")


@pytest.mark.quick
def test_coefficients_solve_the_riccati_equation() -> None:
    def multiply(a: list[Fraction], b: list[Fraction]) -> list[Fraction]:
        product = [Fraction(0)] * (len(a) + len(b) - 1)
        for i, x in enumerate(a):
            for j, y in enumerate(b):
                product[i + j] += x * y
        return product

    w = [Fraction(0), Fraction(0), Fraction(1), Fraction(0), Fraction(-1)]
    slopes = [[Fraction(1, 8), Fraction(0), Fraction(-5, 8)]]
    while len(slopes) < len(DEBYE_LOG_COEFFICIENTS):
        doubled = [power * c for power, c in enumerate(multiply(w, slopes[-1]))][1:]
        for a in range(len(slopes) - 1):
            for power, c in enumerate(multiply(w, multiply(slopes[a], slopes[-2 - a]))):
                doubled[power] += c
        slopes.append([c / 2 for c in doubled])
    for j, (slope, debye) in enumerate(zip(slopes, DEBYE_LOG_COEFFICIENTS, strict=True), start=1):
        derived = {power: float(c / power) for power, c in enumerate(slope, start=1) if c}
        assert derived == dict(zip(range(j, 3 * j + 1, 2), debye, strict=True)), f"D_{j} differs"


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", DIMS_OF_EACH_KIND)
def test_no_concentration_means_the_uniform_density(dim: int, dtype: torch.dtype) -> None:
    zero = torch.zeros((), dtype=dtype)
    assert log_vmf_constant(zero, dim).item() == 0
    assert vmf_mean_resultant_length(zero, dim).item() == 0
    assert slope_of(log_vmf_constant, zero, dim).item() == 0
    slope = slope_of(vmf_mean_resultant_length, zero, dim).item()
    assert slope == pytest.approx(1 / dim, rel=budget(dim, dtype)), f"slope at 0 is {slope}, expected 1/{dim}"


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", DIMS_OF_EACH_KIND)
def test_tiny_concentration_follows_the_first_term_of_the_series(dim: int, dtype: torch.dtype) -> None:
    kappa = torch.tensor([1e-15, 1e-12], dtype=dtype)  # the square of 1e-17 would be subnormal in float32
    square = kappa.double() ** 2
    torch.testing.assert_close(
        log_vmf_constant(kappa, dim).double(), -square / (2 * dim), rtol=budget(dim, dtype), atol=0.0
    )
    tiny = torch.tensor([1e-30, 1e-15], dtype=dtype)
    torch.testing.assert_close(
        vmf_mean_resultant_length(tiny, dim).double(), tiny.double() / dim, rtol=budget(dim, dtype), atol=0.0
    )


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", DIMS_OF_EACH_KIND)
def test_subnormal_concentration_is_finite(dim: int, dtype: torch.dtype) -> None:
    kappa = torch.tensor([torch.finfo(dtype).tiny / 8, torch.finfo(dtype).smallest_normal], dtype=dtype)
    log_constant, length = log_vmf_constant(kappa, dim), vmf_mean_resultant_length(kappa, dim)
    assert log_constant.tolist() == [0, 0]
    assert ((length >= 0) & (length <= kappa)).all(), f"mean resultant length {length.tolist()}"
    assert slope_of(vmf_mean_resultant_length, kappa, dim).isfinite().all()


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", DIMS_OF_EACH_KIND)
def test_huge_concentration_does_not_overflow(dim: int, dtype: torch.dtype) -> None:
    # log C = -kappa + (dim - 1)/2 log kappa + O(1): from 1e20 on, the first term alone is exact in either dtype
    kappa = torch.tensor([1e20, 1e30, 1e38], dtype=dtype)
    torch.testing.assert_close(log_vmf_constant(kappa, dim), -kappa, rtol=budget(dim, dtype), atol=0.0)
    torch.testing.assert_close(
        vmf_mean_resultant_length(kappa, dim), torch.ones_like(kappa), rtol=budget(dim, dtype), atol=0.0
    )
    slope = slope_of(vmf_mean_resultant_length, kappa, dim)
    assert ((slope >= 0) & (slope < 1e-30)).all(), f"slope {slope.tolist()}"


@pytest.mark.quick
@pytest.mark.parametrize("dim", DIMS_OF_EACH_KIND)
def test_nan_in_is_nan_out(dim: int) -> None:
    kappa = torch.tensor([1.0, float("nan")])
    assert log_vmf_constant(kappa, dim).isnan().tolist() == [False, True]
    assert vmf_mean_resultant_length(kappa, dim).isnan().tolist() == [False, True]


@pytest.mark.quick
@pytest.mark.parametrize("dim", [*DIMS_OF_EACH_KIND, 1024])
def test_values_are_monotone_and_inside_the_amos_bracket(dim: int) -> None:
    kappa = torch.logspace(-3, 4, 4001, dtype=torch.float64)
    log_constant, length = log_vmf_constant(kappa, dim), vmf_mean_resultant_length(kappa, dim)
    half = (dim - 1) / 2
    lower = kappa / (half + torch.hypot(kappa, torch.full_like(kappa, half + 1)))
    upper = kappa / (half + torch.hypot(kappa, torch.full_like(kappa, half)))
    assert (log_constant.diff() < 0).all(), "log C rises somewhere"
    assert (length.diff() > 0).all(), "A falls somewhere"
    excess = torch.maximum(lower / length, length / upper).max().item() - 1  # the bracket closes at both ends of kappa
    assert excess <= BUDGET[torch.float64], f"outside by {excess:.2e} of A, budget {BUDGET[torch.float64]:.0e}"


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", range(58, 70))
def test_neighbouring_orders_agree_across_the_switch_to_recurrence(dim: int, dtype: torch.dtype) -> None:
    """Below 64 the library uses this identity, from 64 on it does not: no jump between the two."""
    kappa = kappa_grid(49).to(dtype)
    step = torch.log1p(kappa * vmf_mean_resultant_length(kappa, dim + 2) / dim)
    from_above = log_vmf_constant(kappa, dim + 2) - step
    error = (log_vmf_constant(kappa, dim) / from_above - 1).abs().max().item()
    allowed = 2 * budget(dim, dtype)  # each side has its own error
    assert error <= allowed, f"relative jump {error:.2e}, budget {allowed:.0e}"


@pytest.mark.quick
@pytest.mark.parametrize("dim", [*DIMS_OF_EACH_KIND, 1024])
def test_first_and_second_derivatives_match_finite_differences(dim: int) -> None:
    kappa = torch.tensor([0.0, 1e-8, 1e-3, 0.5, 3.0, 50.0, 400.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda k: log_vmf_constant(k, dim), (kappa,), rtol=1e-6, atol=2e-7)
    assert torch.autograd.gradgradcheck(lambda k: log_vmf_constant(k, dim), (kappa,), rtol=1e-6, atol=2e-7)
    assert torch.autograd.gradgradcheck(lambda k: vmf_mean_resultant_length(k, dim), (kappa,), rtol=1e-6, atol=2e-7)


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", DIMS_OF_EACH_KIND)
def test_gradient_is_minus_the_mean_resultant_length(dim: int, dtype: torch.dtype) -> None:
    kappa = torch.cat([torch.zeros(1), kappa_grid(25)]).to(dtype)
    assert torch.equal(slope_of(log_vmf_constant, kappa, dim), -vmf_mean_resultant_length(kappa, dim))


@pytest.mark.quick
@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 0, 3), (2, 3)], ids=str)
@pytest.mark.parametrize("function", [log_vmf_constant, vmf_mean_resultant_length])
def test_shape_is_kept(function: Callable[[Tensor, int], Tensor], shape: tuple[int, ...]) -> None:
    for dim in DIMS_OF_EACH_KIND:
        kappa = torch.ones(shape, requires_grad=True)
        function(kappa, dim).sum().backward()
        assert function(kappa, dim).shape == shape
        assert kappa.grad is not None
        assert kappa.grad.shape == shape


@pytest.mark.quick
@pytest.mark.parametrize("dim", DIMS_OF_EACH_KIND)
def test_strided_input_gives_the_values_of_its_copy(dim: int) -> None:
    kappa = torch.rand(6, 4).mul(100).T[::2]
    assert torch.equal(log_vmf_constant(kappa, dim), log_vmf_constant(kappa.contiguous(), dim))


@pytest.mark.quick
@pytest.mark.parametrize("dim", DIMS_OF_EACH_KIND)
def test_no_value_is_read_by_the_host(dim: int) -> None:
    """A meta tensor has no values, so any branch or check on them would raise."""
    kappa = torch.empty(7, device="meta", requires_grad=True)
    log_constant = log_vmf_constant(kappa, dim)
    (gradient,) = torch.autograd.grad(log_constant.sum(), kappa, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), kappa)
    assert (log_constant.shape, gradient.shape, second.shape) == ((7,), (7,), (7,))


@pytest.mark.quick
def test_no_grad_gives_the_same_values_without_a_graph() -> None:
    kappa = kappa_grid(25).requires_grad_()
    with torch.no_grad():
        log_constant = log_vmf_constant(kappa, 256)
    assert not log_constant.requires_grad
    assert torch.equal(log_constant, log_vmf_constant(kappa, 256))


def test_compiled_without_graph_breaks_is_bitwise_equal() -> None:
    compiled = torch.compile(log_vmf_constant, fullgraph=True, backend="aot_eager")
    for dim in (256, 64, 61):  # a changed dim is traced anew, as a symbolic number; the last recurs, briefly
        eager_kappa, kappa = kappa_grid(25).requires_grad_(), kappa_grid(25).requires_grad_()
        eager, traced = log_vmf_constant(eager_kappa, dim), compiled(kappa, dim)
        eager.sum().backward()
        traced.sum().backward()
        assert torch.equal(traced, eager), f"values differ at dim {dim}"
        assert kappa.grad is not None
        assert eager_kappa.grad is not None
        assert torch.equal(kappa.grad, eager_kappa.grad), f"gradients differ at dim {dim}"


@pytest.mark.quick
@pytest.mark.parametrize("function", [log_vmf_constant, vmf_mean_resultant_length])
def test_wrong_arguments_are_named(function: Callable[..., Tensor]) -> None:
    kappa = torch.ones(3)
    with pytest.raises(
        TypeError, match=r"kappa has dtype torch\.bfloat16; it must be torch\.float32 or torch\.float64"
    ):
        function(kappa.bfloat16(), 256)
    with pytest.raises(TypeError, match=r"kappa has dtype torch\.int64"):
        function(kappa.long(), 256)
    with pytest.raises(TypeError, match=r"dim is 256\.0 of type float; it must be an int"):
        function(kappa, 256.0)
    with pytest.raises(TypeError, match="dim is True of type bool"):
        function(kappa, True)
    with pytest.raises(ValueError, match="dim is 1; it must be at least 2"):
        function(kappa, 1)
