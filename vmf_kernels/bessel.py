"""The normaliser of the von Mises-Fisher density, without evaluating a Bessel function.

Legend: D is ``dim``, nu = D/2 - 1 the order of the Bessel functions, kappa the concentration,
z = kappa/nu, s = sqrt(1 + z^2), d = s - 1, t = 1/s, and r_nu = I_{nu+1}(kappa)/I_nu(kappa) the ratio of neighbours.
"""

import math
from typing import Any

import torch
from torch import Tensor

from vmf_kernels._debye import DEBYE_LOG_COEFFICIENTS

# From this order up, the uniform expansion is used directly; smaller orders are reached from above by recurrence.
MIN_DEBYE_ORDER = 31

# Terms of the expansion. The truncation error is largest at MIN_DEBYE_ORDER: over all kappa, 3.5e-8 of log C after three
# terms and 2.4e-16 after nine (against mpmath), which is below the rounding of the dtype.
DEBYE_TERMS = {torch.float32: 3, torch.float64: 9}


def log_vmf_constant(kappa: Tensor, dim: int) -> Tensor:
    """Log coefficient of the von Mises-Fisher density on the unit sphere in R^dim, relative to the uniform density.

    Equals ``log C_dim(kappa) - log C_dim(0)`` for ``p(x) = C exp(kappa mu.x)``: <= 0, and 0 at kappa = 0.
    This is minus the log-partition (TFP ``_log_normalization`` and torch ``_log_normalizer`` have the other sign).
    Exact at kappa = 0. Relative error for kappa in 1e-6..1e6 and ``dim`` up to 1024: at most 5e-7 in float32 (2e-6 for
    ``dim < 64``) and 1e-12 in float64.

    Args:
        kappa: [...] concentration, float32 or float64, must be >= 0 and finite. This is not checked, because a check would
            wait for the device: a negative kappa gives the value at ``abs(kappa)``; NaN and infinity give NaN.
        dim: dimension of the embedding, >= 2.

    Returns:
        [...] nats, dtype of ``kappa``; differentiable, slope is minus the mean resultant length.

    Raises:
        TypeError: ``kappa`` is no tensor of float32 or float64, or ``dim`` is not an int.
        ValueError: ``dim < 2``.
    Source: Govindarajan et al., "DINO as a von Mises-Fisher mixture model", ICLR 2023 (arXiv:2405.10939); the expansion
        is that of DLMF 10.41(ii).

    Example:
        >>> kappa = torch.tensor([1.0, 10.0])
        >>> torch.allclose(log_vmf_constant(kappa, dim=3), torch.log(kappa / torch.sinh(kappa)))  # its closed form in R^3
        True
    """
    _check_arguments(kappa, dim)
    log_constant: Tensor = _LogConstant.apply(kappa, dim)  # type: ignore[no-untyped-call]  # torch leaves apply untyped
    return log_constant


def vmf_mean_resultant_length(kappa: Tensor, dim: int) -> Tensor:
    """Length of the mean of the von Mises-Fisher density on the unit sphere in R^dim.

    Equals ``A_dim(kappa) = I_{dim/2}(kappa) / I_{dim/2-1}(kappa)``: 0 at kappa = 0, increasing, tends to 1.
    It is minus the slope of ``log_vmf_constant``, and as accurate.

    Args:
        kappa: [...] concentration, float32 or float64, must be >= 0 and finite. This is not checked, because a check would
            wait for the device: a negative kappa gives minus the value at ``abs(kappa)``; NaN and infinity give NaN.
        dim: dimension of the embedding, >= 2.

    Returns:
        [...] in [0, 1], dtype of ``kappa``; differentiable, slope is ``1 - A^2 - (dim - 1) A / kappa`` (1/dim at 0),
        evaluated without that difference: relative error at most 1e-6 in float32 and 5e-12 in float64.

    Raises:
        TypeError: ``kappa`` is no tensor of float32 or float64, or ``dim`` is not an int.
        ValueError: ``dim < 2``.
    Source: Mardia and Jupp, "Directional Statistics", Wiley 2000, for the density; DLMF 10.29.1 and 10.41(ii).

    Example:
        >>> kappa = torch.tensor([1.0, 10.0])
        >>> torch.allclose(vmf_mean_resultant_length(kappa, dim=3), 1 / torch.tanh(kappa) - 1 / kappa, rtol=1e-4)
        True
    """
    _check_arguments(kappa, dim)
    length: Tensor = _MeanResultantLength.apply(kappa, dim)  # type: ignore[no-untyped-call]  # torch leaves apply untyped
    return length


def _check_arguments(kappa: Tensor, dim: int) -> None:
    if not isinstance(kappa, Tensor):
        raise TypeError(f"kappa is {kappa!r} of type {type(kappa).__name__}; it must be a tensor")
    if kappa.dtype not in DEBYE_TERMS:
        raise TypeError(f"kappa has dtype {kappa.dtype}; it must be torch.float32 or torch.float64")
    if not isinstance(dim, int) or isinstance(dim, bool):
        raise TypeError(
            f"dim is {dim!r} of type {type(dim).__name__}; it must be an int, the dimension of the embedding"
        )
    if dim < 2:
        raise ValueError(f"dim is {dim}; it must be at least 2, the dimension of the plane")


class _LogConstant(torch.autograd.Function):
    """log C with the closed form of its slope, -A: autograd through the expansion would be slower and less exact."""

    @staticmethod
    def forward(kappa: Tensor, dim: int) -> Tensor:
        return _log_constant(kappa, dim)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
        kappa, ctx.dim = inputs
        ctx.save_for_backward(kappa)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (kappa,) = ctx.saved_tensors
        return -grad * vmf_mean_resultant_length(kappa, ctx.dim), None


class _MeanResultantLength(torch.autograd.Function):
    """A with the closed form of its slope. The slope uses plain torch operations, so it is differentiable itself."""

    @staticmethod
    def forward(kappa: Tensor, dim: int) -> Tensor:
        return _mean_resultant_length(kappa, dim)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
        kappa, ctx.dim = inputs
        ctx.save_for_backward(kappa)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (kappa,) = ctx.saved_tensors
        return grad * _mean_resultant_slope(kappa, ctx.dim), None


# An order too small for the expansion is reached from above by r_{nu-1} = kappa/(2 nu + kappa r_nu), the recurrence of
# DLMF 10.29.1 divided by I_nu. Going down, no terms cancel, and each step shrinks the error of the one before.


def orders(dim: int) -> list[float]:
    """The orders to visit, in steps of one: from the smallest at which the expansion is used down to dim/2 - 1."""
    order = dim / 2 - 1
    steps_up = max(0, math.ceil(MIN_DEBYE_ORDER - order))
    return [order + step for step in range(steps_up, -1, -1)]


def _log_constant(kappa: Tensor, dim: int) -> Tensor:
    """log C_dim(kappa) - log C_dim(0): the expansion at the largest order, then one term <= 0 per step down."""
    visited = orders(dim)
    log_constant = _debye_log_constant(kappa, visited[0])
    if len(visited) == 1:
        return log_constant
    ratio = _debye_ratio(kappa, visited[0])
    for order in visited[:-1]:
        scaled = kappa * ratio
        log_constant = log_constant - torch.log1p(scaled / (2 * order))
        ratio = kappa / (2 * order + scaled)
    return log_constant


def _mean_resultant_length(kappa: Tensor, dim: int) -> Tensor:
    """r_nu at nu = dim/2 - 1."""
    visited = orders(dim)
    ratio = _debye_ratio(kappa, visited[0])
    for order in visited[:-1]:
        ratio = kappa / (2 * order + kappa * ratio)
    return ratio


def _mean_resultant_slope(kappa: Tensor, dim: int) -> Tensor:
    """Derivative of r_nu by kappa at nu = dim/2 - 1: the recurrence of the ratio, differentiated."""
    visited = orders(dim)
    if len(visited) == 1:
        return _debye_ratio_slope(kappa, visited[0])
    # float64: terms of the slope cancel, unlike those of the ratio; float32 would keep only four digits at dim = 2
    k = kappa.double()
    ratio, slope = _debye_ratio(k, visited[0]), _debye_ratio_slope(k, visited[0])
    for order in visited[:-1]:
        denominator = 2 * order + k * ratio
        slope = (2 * order - k * (k * slope)) / denominator / denominator
        ratio = k / denominator
    return slope.to(kappa.dtype)


def _debye_log_constant(kappa: Tensor, order: float) -> Tensor:
    """log C(kappa) - log C(0) by the uniform expansion, in the dtype of ``kappa``; order >= MIN_DEBYE_ORDER.

    ``nu (log1p(d/2) - d) + log1p(d)/2 + x q(t)``, where x = 1 - t and ``x q(t) = sum_j (D_j(1) - D_j(t))/nu^j`` with
    its root at x = 0 divided out. So every term vanishes like kappa^2, and no large terms cancel.
    """
    z = kappa / order
    s = torch.hypot(z, torch.ones_like(z))  # not sqrt(1 + z^2): that square overflows float32 from 2e19 on
    d = z * (z / (1 + s))
    q = _polynomial(s.reciprocal(), difference_coefficients(order, kappa.dtype))
    return order * (torch.log1p(d / 2) - d) + torch.log1p(d) / 2 + (d / s) * q


def _debye_ratio(kappa: Tensor, order: float) -> Tensor:
    """r_nu(kappa), minus the derivative of ``_debye_log_constant``: ``z/(1 + s) - z t^2 p(t)/nu``."""
    z = kappa / order
    s = torch.hypot(z, torch.ones_like(z))
    t = s.reciprocal()
    p = _polynomial(t, slope_coefficients(order, kappa.dtype))
    return z / (1 + s) - (z * t) * t * (p / order)


def _debye_ratio_slope(kappa: Tensor, order: float) -> Tensor:
    """Derivative of ``_debye_ratio`` by kappa: ``t^2 (1/(1 + t) + w/nu)/nu``, w = (1 - 2 t^2) p + (1 - t^2) t p'."""
    z = kappa / order
    t = torch.hypot(z, torch.ones_like(z)).reciprocal()
    p = slope_coefficients(order, kappa.dtype)
    # the coefficient of t^m in w takes only p[m] and p[m - 2]
    w = [(m + 1) * a - m * b for m, (a, b) in enumerate(zip([*p, 0.0, 0.0], [0.0, 0.0, *p], strict=True))]
    return t * t * (1 / (1 + t) + _polynomial(t, w) / order) / order


def _expansion_coefficients(order: float, dtype: torch.dtype) -> list[float]:
    """Coefficients of t^0, t^1, ... in ``sum_j D_j(t)/nu^j``."""
    terms = DEBYE_TERMS[dtype]
    coefficients = [0.0] * (3 * terms + 1)
    for j, debye in enumerate(DEBYE_LOG_COEFFICIENTS[:terms], start=1):
        for i, coefficient in enumerate(debye):
            coefficients[j + 2 * i] += coefficient / order**j
    return coefficients


def difference_coefficients(order: float, dtype: torch.dtype) -> list[float]:
    """Coefficients of q in ``(1 - t) q(t) = sum_j (D_j(1) - D_j(t))/nu^j``; that of t^i is the sum of D's beyond i."""
    expansion = _expansion_coefficients(order, dtype)
    return [math.fsum(expansion[i + 1 :]) for i in range(len(expansion) - 1)]


def slope_coefficients(order: float, dtype: torch.dtype) -> list[float]:
    """Coefficients of ``p(t) = 1/2 + t sum_j D_j'(t)/nu^j``."""
    expansion = _expansion_coefficients(order, dtype)
    return [0.5, *(power * expansion[power] for power in range(1, len(expansion)))]


def _polynomial(t: Tensor, coefficients: list[float]) -> Tensor:
    """Value at ``t`` of the polynomial with these coefficients of t^0, t^1, ... (Horner)."""
    value = torch.full_like(t, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        # in place on the new product, which autograd does not need: one allocation per step instead of two
        value = (value * t).add_(coefficient)
    return value
