"""Sinkhorn-Knopp targets on stored logits, written out from the formula: what tests compare with.

Legend: R rows, K prototypes.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def published_sinkhorn_knopp(logits_RK: Tensor, iterations: int = 3) -> Tensor:
    """[R, K] targets in the dtype of the logits over temperature: the whole plan, scaled along each side in turn.

    No maximum is taken off, so ``exp`` overflows fp32 at logits above 88.
    Source: Caron et al., NeurIPS 2020 (SwAV), section 3.1 and appendix A.
    """
    plan_KR = logits_RK.exp().T
    prototypes, rows = plan_KR.shape
    plan_KR = plan_KR / plan_KR.sum()
    for _ in range(iterations):
        plan_KR = plan_KR / plan_KR.sum(dim=1, keepdim=True) / prototypes
        plan_KR = plan_KR / plan_KR.sum(dim=0, keepdim=True) / rows
    return (plan_KR * rows).T


@torch.no_grad()
def sinkhorn_knopp_of_any_size(logits_RK: Tensor, iterations: int = 3) -> Tensor:
    """The same with the plan kept as its logarithm, which neither overflows nor underflows."""
    log_plan_RK = logits_RK
    for _ in range(iterations):
        log_plan_RK = log_plan_RK - log_plan_RK.logsumexp(dim=0, keepdim=True)
        log_plan_RK = log_plan_RK - log_plan_RK.logsumexp(dim=1, keepdim=True)
    return log_plan_RK.exp()
