"""The normaliser of the von Mises-Fisher density, from series and from scipy's Bessel functions.

Legend: K concentrations, J terms of a series, D embedding dim.
"""

from __future__ import annotations

from typing import Any

import torch
from scipy import special
from torch import Tensor

SERIES_TERMS = 600  # the largest is at kappa / 2 or before, and falls off within a few square roots of that
LONG = 1e7  # from here on the terms of the expansion in 1 / kappa are few


class LogNormalizer(torch.autograd.Function):
    """``log C_D(kappa) - log C_D(0)`` of [K] fp64 concentrations, and its slope, minus the mean resultant length."""

    @staticmethod
    def forward(ctx: Any, kappa: Tensor, dim: int) -> Tensor:
        ctx.save_for_backward(mean_resultant_length(kappa, dim))
        return log_normalizer(kappa, dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return -grads[0] * ctx.saved_tensors[0], None


def log_normalizer(kappa: Tensor, dim: int) -> Tensor:
    """[K] nats, fp64, ``order log(kappa / 2) - log Gamma(order + 1) - log I_order(kappa)`` with order D/2 - 1."""
    order = torch.tensor(dim / 2 - 1, dtype=torch.float64, device=kappa.device)
    large = order * (kappa / 2).log() - torch.lgamma(order + 1) - log_scaled_bessel(dim / 2 - 1, kappa) - kappa
    return torch.where(kappa < SERIES_TERMS, -log_series(kappa, dim), large)


def mean_resultant_length(kappa: Tensor, dim: int) -> Tensor:
    """[K] ``I_{order + 1} / I_order``."""
    small = kappa / dim * (log_series(kappa, dim + 2) - log_series(kappa, dim)).exp()
    large = (log_scaled_bessel(dim / 2, kappa) - log_scaled_bessel(dim / 2 - 1, kappa)).exp()
    return torch.where(kappa < SERIES_TERMS, small, large)


def log_series(kappa: Tensor, dim: int) -> Tensor:
    """[K] log of the confluent series ``0F1(D/2; kappa^2 / 4)``, for kappa below ``SERIES_TERMS``.

    All terms are positive, so nothing cancels; that of order 0 is 1. Source: DLMF 10.25.2.
    """
    distinct, of_each = kappa.clamp(max=SERIES_TERMS).unique(return_inverse=True)
    if not len(distinct):
        return torch.zeros_like(kappa)
    j = torch.arange(1, SERIES_TERMS, dtype=torch.float64, device=kappa.device)
    half = torch.tensor(dim / 2, dtype=torch.float64, device=kappa.device)
    log_quarter = (distinct / 2).log()[..., None] * 2
    rest = (j * log_quarter - torch.lgamma(j + 1) - torch.lgamma(half + j) + torch.lgamma(half)).logsumexp(-1)
    return torch.logaddexp(rest, torch.zeros_like(rest))[
        of_each
    ]  # exact to the last digit also where the rest is small


def log_scaled_bessel(order: float, kappa: Tensor) -> Tensor:
    """[K] ``log I_order(kappa) - kappa`` for kappa of at least ``SERIES_TERMS``, where nothing underflows up to order 256.

    Source: from ``LONG`` on DLMF 10.40.1, before it scipy.
    """
    k = kappa.clamp(min=SERIES_TERMS)
    scaled = torch.from_numpy(special.ive(order, k.clamp(max=LONG).cpu().numpy())).to(k.device).log()
    mu, term, total = 4 * order**2, torch.ones_like(k), torch.ones_like(k)
    for i in range(1, 5):
        term = -term * (mu - (2 * i - 1) ** 2) / (i * 8 * k)
        total = total + term
    return torch.where(k < LONG, scaled, total.log() - (2 * torch.pi * k).log() / 2)
