"""The loss of stored logits as the papers write it: the one such formula that the tests compare with.

From features and prototypes, with a normaliser of Bessel functions, it is written out in ``tests/ops/test_properties.py``.

Legend: S / T student / teacher rows, view-major, G / V their views, B images, K prototypes.
"""

from __future__ import annotations

import torch
from torch import Tensor


def plain_loss(student_SK: Tensor, q_TK: Tensor, pair_weights: Tensor, image_weights: Tensor | None = None) -> Tensor:
    """[] minus the weighted sum over pairs of rows of ``sum_k q_t(k) log p_s(k)``.

    Args:
        student_SK: logits over temperature.
        q_TK: the teacher's probabilities, of any row sums.
        pair_weights: [G, V]
        image_weights: [B]; None means 1.

    Source: Caron et al., "Emerging properties in self-supervised vision transformers", ICCV 2021, equation 3.
    """
    views_G, views_V = pair_weights.shape
    log_p = student_SK.log_softmax(dim=-1).unflatten(0, (views_V, -1))
    pairs_GVB = -torch.einsum("gbk,vbk->gvb", q_TK.unflatten(0, (views_G, -1)), log_p)
    weighted = pairs_GVB if image_weights is None else pairs_GVB * image_weights
    return (weighted * pair_weights[:, :, None]).sum()
