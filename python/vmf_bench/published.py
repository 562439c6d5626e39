"""The published loss on stored logits, written out from its formula; nothing of the library is used.

Legend: B images, V student crops, K prototypes.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

TEACHER_CROPS = 2


def mean_over_pairs(student: Tensor, targets: Tensor, crops: int) -> Tensor:
    """[] mean of ``-<q_i, log p_v>`` over the pairs v != i and over images, nats.

    Every pair has its own log-softmax, as published.

    Args:
        student: [V * B, K] logits over temperature, view-major.
        targets: [2 * B, K] probabilities of the teacher, view-major.
        crops: V.

    Source: Caron et al., "Emerging properties in self-supervised vision transformers", ICCV 2021, algorithm 1.
    """
    views = student.chunk(crops)
    total, pairs = student.new_zeros(()), 0
    for (i, q), (v, view) in itertools.product(enumerate(targets.chunk(TEACHER_CROPS)), enumerate(views)):
        if v != i:
            total = total + torch.sum(-q * view.log_softmax(dim=-1), dim=-1).mean()
            pairs += 1
    return total / pairs
