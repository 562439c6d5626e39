"""Dense backend in plain torch: the definition of correct, in any floating dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from vmf_kernels.backends.contract import Assignment, ColumnSums
from vmf_kernels.prototypes import Keys, accumulation_dtype


def unsupported(rows: Tensor, weight: Tensor) -> str | None:
    """None: every floating dtype on every device is supported."""
    return None


def assign(rows_RD: Tensor, keys: Keys, values: Keys | None = None, columns: ColumnSums | None = None) -> Assignment:
    """Soft assignment as in ``contract``, through the whole [R, K] matrix of logits."""
    logits_RK = logits(rows_RD, keys)
    log_p_RK = logits_RK.log_softmax(dim=1)
    p_RK = log_p_RK.exp()
    if columns is not None:
        columns.sums.add_(columns.weights @ p_RK)
        if columns.cotangents is not None and columns.vectors is not None:
            columns.vectors.add_(p_RK.T @ columns.cotangents)
    return Assignment(
        log_sum_exp=logits_RK.logsumexp(dim=1),
        entropy=-(p_RK * log_p_RK).sum(dim=1),
        barycentre=None if values is None else p_RK @ effective_weight(values, p_RK.dtype),
        expected_bias=None if values is None or values.bias is None else p_RK @ values.bias,
    )


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
