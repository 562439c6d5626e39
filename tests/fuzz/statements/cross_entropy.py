"""The loss of logits as the papers write it: the one such formula that the tests compare with.

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
    log_p = student_SK.log_softmax(dim=-1)
    log_p = log_p.unflatten(0, (views_V, log_p.shape[0] // views_V))
    pairs_GVB = -torch.einsum("gbk,vbk->gvb", q_TK.unflatten(0, (views_G, log_p.shape[1])), log_p)
    weighted = pairs_GVB if image_weights is None else pairs_GVB * image_weights
    return (weighted * pair_weights[:, :, None]).sum()


def statistics(
    student_SK: Tensor, teacher_TK: Tensor, pair_weights: Tensor, image_weights: Tensor | None = None
) -> dict[str, Tensor]:
    """The loss of logits over temperature, and means over its pairs: entropies, KL in nats, [K] usage; 0 if none has weight."""
    log_p, log_q = student_SK.log_softmax(dim=-1), teacher_TK.log_softmax(dim=-1)
    p, q = log_p.exp(), log_q.exp()
    loss = plain_loss(student_SK, q, pair_weights, image_weights)
    images = len(student_SK) // pair_weights.shape[1]
    by_image = pair_weights.new_ones(images) if image_weights is None else image_weights
    n_S, n_T = (torch.outer(pair_weights.sum(dim=dim), by_image).flatten() for dim in (0, 1))
    total = n_T.sum() if n_T.sum() > 0 else torch.ones_like(n_T.sum())
    teacher_entropy = -(n_T @ torch.where(q > 0, q * log_q, 0.0)).sum() / total
    return {
        "loss": loss,
        "teacher_entropy": teacher_entropy,
        "student_entropy": -(n_S @ torch.where(p > 0, p * log_p, 0.0)).sum().detach() / total,
        "kl": loss.detach() / total - teacher_entropy,
        "usage": n_T @ q / total,
    }


def push_and_pull(
    student_SK: Tensor, q_TK: Tensor, pair_weights: Tensor, image_weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The two parts whose difference ``plain_loss`` is: by the student's log-sum-exp, and by its logits at the targets."""
    images = len(student_SK) // pair_weights.shape[1]
    by_image = pair_weights.new_ones(images) if image_weights is None else image_weights
    pairs_TS = torch.kron(pair_weights, torch.diag(by_image))
    return pairs_TS.sum(dim=0) @ student_SK.logsumexp(dim=1), ((pairs_TS @ student_SK) * q_TK).sum()
