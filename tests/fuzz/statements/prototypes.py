"""What prototypes are in the logits: effective weights, norms, the normaliser.

Legend: R rows, K prototypes, D embedding dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tests.fuzz.statements.vmf import LogNormalizer


def effective(weight: Tensor, magnitude: Tensor | None, kind: str) -> tuple[Tensor, Tensor]:
    """[K, D] what multiplies the rows, and [K] its norm; a row of zeros has no direction: it stays zero, without a gradient.

    Source: Salimans & Kingma, "Weight Normalization", NeurIPS 2016, equation 2.
    """
    square = (weight * weight).sum(dim=1)
    length = torch.where(square > 0, square, 1.0).sqrt() * (square > 0)
    if kind.startswith("linear"):
        return weight, length
    unit = weight * torch.where(square > 0, 1 / torch.where(square > 0, length, 1.0), 0.0)[:, None]
    if magnitude is None:
        return unit, torch.ones_like(length)
    return magnitude.reshape(-1, 1) * unit, magnitude.reshape(-1).abs()


def logits(
    rows_RD: Tensor, weight: Tensor, magnitude: Tensor | None, kind: str, temperature: float, bias: Tensor | None = None
) -> Tensor:
    """[R, K] nats: ``<x, w_k> / tau``, plus ``log C_D(||w_k|| / tau) - log C_D(0)`` of vMF components, plus the bias.

    Source: Govindarajan et al., "DINO as a von Mises-Fisher mixture model", ICLR 2023 (arXiv:2405.10939).
    """
    w, norm = effective(weight, magnitude, kind)
    result = rows_RD @ w.T / temperature
    if kind.endswith("vmf"):
        kappa = (norm / temperature).double()
        result = result + LogNormalizer.apply(kappa, w.shape[1]).to(result.dtype)  # type: ignore[no-untyped-call]
    return result if bias is None else result + bias.reshape(-1)
