"""Centres of a teacher's logits, batch by batch, written out.

Legend: R rows, K prototypes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def log_mean_probability(logits: Tensor) -> Tensor:
    """[1, K] ``log mean_b softmax(l_b)``, formed without leaving log space."""
    return logits.log_softmax(dim=-1).logsumexp(dim=0, keepdim=True) - math.log(logits.shape[0])


def moved_center(center_1K: Tensor, rule: str, raw_RK: Tensor, uncentered_RK: Tensor, momentum: float) -> Tensor:
    """[1, K] the running mean after one batch.

    Args:
        center_1K: before it.
        rule: "logit", "log_probability" or "probability", whose centre is the log of a running mean.
        raw_RK: logits, not over temperature.
        uncentered_RK: logits over temperature with the normaliser.
        momentum: of the running mean.

    Source: Caron et al., ICCV 2021, equation 4; Govindarajan et al., ICLR 2023, "probability-space centering".
    """
    if rule == "logit":
        return momentum * center_1K + (1 - momentum) * raw_RK.mean(dim=0, keepdim=True)
    batch = log_mean_probability(uncentered_RK)
    if rule == "log_probability":
        return momentum * center_1K + (1 - momentum) * batch
    kept = center_1K + (math.log(momentum) if momentum else -math.inf)
    return torch.logaddexp(kept, batch + math.log1p(-momentum))
