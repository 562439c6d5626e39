"""Plain torch on stored logits: the published loss, and the same with one log-softmax for each student row.

Legend: S / T student / teacher rows, G / V teacher / student views, B images, K prototypes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from vmf_bench.inputs import HeadInputs
from vmf_bench.peers.peer import effective_weights, products
from vmf_bench.published import mean_over_pairs


def logits_and_targets(inputs: HeadInputs) -> tuple[Tensor, Tensor]:
    """[S, K] student logits over temperature, and [T, K] the teacher's probabilities, which need no gradient."""
    student_weight, teacher_weight = effective_weights(inputs)
    student = functional.linear(inputs.student_features, student_weight) / inputs.student_temperature
    with torch.no_grad():
        teacher = functional.linear(inputs.teacher_features, teacher_weight)
        return student, ((teacher - inputs.center) / inputs.teacher_temperature).softmax(dim=-1)


def published(inputs: HeadInputs) -> Tensor:
    """The published loss with a fixed centre: with multi-crop views, every pair has its own log-softmax."""
    with products(inputs):
        student, targets = logits_and_targets(inputs)
        if not inputs.shape.matched:
            return mean_over_pairs(student, targets, inputs.shape.student_views)
        return (inputs.image_weights * torch.sum(-targets * student.log_softmax(dim=-1), dim=-1)).sum()


def one_log_softmax(inputs: HeadInputs) -> Tensor:
    """What a careful user writes: each student row has one log-softmax, however many teachers it learns from.

    The log-probabilities that an image's teacher rows meet are summed over the student's views before they are multiplied by
    the targets, so that the pairs cost one small product.
    """
    shape = inputs.shape
    with products(inputs):
        student, q_TK = logits_and_targets(inputs)
        log_p_SK = student.log_softmax(dim=-1, dtype=inputs.center.dtype)  # CPUs' autocast leaves it in 16 bits
    log_p_VX = log_p_SK.view(shape.student_views, -1)
    q_GBK = q_TK.view(shape.teacher_views, shape.images, -1)
    # outside of autocast, which would round log-probabilities of both signs to 16 bits for this product
    met_GBK = (inputs.pair_weights @ log_p_VX).view_as(q_GBK) if not shape.matched else log_p_SK[None]
    return -(inputs.image_weights * (q_GBK * met_GBK).sum(dim=(0, 2))).sum()
