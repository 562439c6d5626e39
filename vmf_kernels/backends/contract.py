"""What every backend computes.

Legend: R rows, K prototypes, D embedding dim, J column weightings. With logits
``l_rk = scale gain_k <x_r, weight_k> + bias_k`` and ``p_r = softmax_k(l_r)`` a backend module provides

    unsupported(rows, weight) -> str | None           why it cannot run on these tensors
    assign(rows_RD, keys, values, columns) -> Assignment
    column_log_sum_exp(rows_RD, keys, offset_R) -> [K]    log sum_r exp(l_rk - offset_r)

No backend stores a [R, K] tensor for all rows at once, except ``reference``, which defines what is correct.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Assignment(NamedTuple):
    """Soft assignment of rows to prototypes, reduced over the prototypes; fp32 (fp64 for fp64 rows), nats."""

    log_sum_exp: Tensor  # [R] lse_r = log sum_k exp(l_rk)
    entropy: Tensor  # [R] H(p_r)
    barycentre: Tensor | None  # [R, D] sum_k p_rk values_k; None without values
    expected_bias: Tensor | None  # [R] sum_k p_rk value_bias_k; None if the values have no bias


class ColumnSums(NamedTuple):
    """Sums over rows, one per prototype, that ``assign`` adds to: the backward pass of the operator.

    ``vectors_KD += sum_r p_rk cotangents_r`` and ``sums_JK[j] += sum_r p_rk weights_jr``.
    """

    cotangents: Tensor | None  # [R, D]
    vectors: Tensor | None  # [K, D]
    weights: Tensor  # [J, R]
    sums: Tensor  # [J, K]
