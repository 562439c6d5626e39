"""Dense backend in plain torch: the definition of correct, in any floating dtype."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from vmf_kernels.backends.contract import Assignment, Query
from vmf_kernels.prototypes import LOWEST_BIAS, Keys, accumulation_dtype
from vmf_kernels.ranks import has_all_prototypes, max_over_ranks, sum_over_ranks


def assign(
    queries: Sequence[Query],
    values: Keys | None = None,
    vectors_KD: Tensor | None = None,
    group: ProcessGroup | None = None,
) -> list[Assignment]:
    """Soft assignments as in ``composed.Assign``, each from its whole [R, K] matrix of logits."""
    if vectors_KD is not None:
        vectors_KD.zero_()
    return [_assign(query, values, vectors_KD, group) for query in queries]


def _assign(query: Query, values: Keys | None, vectors_KD: Tensor | None, group: ProcessGroup | None) -> Assignment:
    log_p_RK, lse_R = _log_softmax(logits(query.rows, query.keys), group)
    p_RK = log_p_RK.exp()
    if query.weights is not None and query.sums is not None:
        query.sums.add_(query.weights @ p_RK)
    if query.cotangents is not None and vectors_KD is not None:
        vectors_KD.add_(p_RK.T @ query.cotangents)
    return Assignment(
        log_sum_exp=lse_R,
        # logits near the largest finite number can give -inf, which times a probability of 0 would be NaN
        entropy=_total(-(p_RK * log_p_RK.clamp(min=LOWEST_BIAS)).sum(dim=1), group),
        barycentre=None if values is None else _total(p_RK @ effective_weight(values, p_RK.dtype), group),
    )


def _log_softmax(logits_RK: Tensor, group: ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """([R, K] log-probabilities, [R] log-sum-exp) over the prototypes of all ranks."""
    if has_all_prototypes(group):
        # NaN, not inf, if a logit is inf: then log-probabilities and every other result are NaN
        lse_R = logits_RK.logsumexp(dim=1)
        return logits_RK.log_softmax(dim=1), lse_R.masked_fill(lse_R.isposinf(), torch.nan)
    # from the mass, not from the ranks' log-sum-exps, which lose digits if they are large
    top_R = max_over_ranks(logits_RK.amax(dim=1), group)
    logits_RK = logits_RK - top_R[:, None]
    log_mass_R = sum_over_ranks(logits_RK.exp().sum(dim=1), group).log()
    return logits_RK - log_mass_R[:, None], top_R + log_mass_R


def _total(share: Tensor, group: ProcessGroup | None) -> Tensor:
    return share if group is None else sum_over_ranks(share, group)


def column_log_sum_exp(rows_RD: Tensor, keys: Keys, offset_R: Tensor) -> Tensor:
    """[K] ``log sum_r exp(l_rk - offset_r)``."""
    return (logits(rows_RD, keys) - offset_R[:, None]).logsumexp(dim=0)


def logits(rows_RD: Tensor, keys: Keys) -> Tensor:
    """[R, K] logits in the accumulation dtype."""
    dtype = accumulation_dtype(rows_RD.dtype)
    logits_RK = keys.scale * (rows_RD.to(dtype) @ effective_weight(keys, dtype).T)
    return logits_RK if keys.bias is None else logits_RK + keys.bias


def effective_weight(keys: Keys, dtype: torch.dtype) -> Tensor:
    """[K, D] prototypes ``gain_k weight_k`` in ``dtype``."""
    weight = keys.weight.to(dtype)
    return weight if keys.gain is None else weight * keys.gain[:, None]
