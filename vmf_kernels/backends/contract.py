"""What every backend computes.

Legend: R rows, K prototypes, D embedding dim, J column weightings. With logits
``l_rk = scale gain_k <x_r, weight_k> + bias_k`` and ``p_r = softmax_k(l_r)`` a backend module provides

    unsupported(rows, weight) -> str | None               why it cannot run on these tensors
    assign(queries, values, vectors_KD) -> [Assignment]   one a query; adds to the queries' sums, writes vectors_KD
    column_log_sum_exp(rows_RD, keys, offset_R) -> [K]    log sum_r exp(l_rk - offset_r)

``vectors_KD[k] = sum over queries and rows of p_rk cotangent_r`` is the operator's backward pass, equation (5). No backend
stores a [R, K] tensor for all rows at once, except ``reference``, which defines what is correct.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from vmf_kernels.prototypes import Keys


class Query(NamedTuple):
    """Rows against one network's prototypes, and the sums over the rows that are wanted of them."""

    rows: Tensor  # [R, D]
    keys: Keys
    cotangents: Tensor | None = None  # [R, D], needed when vectors_KD is asked for
    weights: Tensor | None = None  # [J, R]
    sums: Tensor | None = None  # [J, K] sums_jk += sum_r weights_jr p_rk


class Assignment(NamedTuple):
    """Soft assignment of rows to prototypes, reduced over the prototypes; fp32 (fp64 for fp64 rows), nats."""

    log_sum_exp: Tensor  # [R] lse_r = log sum_k exp(l_rk)
    entropy: Tensor  # [R] H(p_r)
    barycentre: Tensor | None  # [R, D] sum_k p_rk values_k; None without values
    expected_bias: Tensor | None  # [R] sum_k p_rk value_bias_k; None if the values have no bias
