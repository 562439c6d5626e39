"""The losses without this library that ``bench.shapes`` compares with, in fp32 or under bf16 autocast.

Legend: S / T student / teacher rows, G / V teacher / student views, B images, K prototypes, D bottleneck dim.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from bench.baselines import effective_weights
from bench.workloads import HeadInputs
from tests.published import TEACHER_CROPS, mean_over_pairs


def published(inputs: HeadInputs) -> Tensor:
    """[] the published loss, its centre fixed: a log-softmax for each pair of crops; one a row for one image of many views."""
    student, targets = logits_and_targets(inputs)
    shape = inputs.shape
    if shape.matched:
        return (inputs.image_weights * torch.sum(-targets * student.log_softmax(dim=-1), dim=-1)).sum()
    if shape.teacher_views > TEACHER_CROPS:
        # one image of many views: a loop over ten thousand pairs would be nobody's choice
        assert shape.images == 1
        return -(inputs.pair_weights * (targets @ student.log_softmax(dim=-1).T)).sum()
    return mean_over_pairs(student, targets, shape.student_views)


def one_softmax(inputs: HeadInputs) -> Tensor:
    """[] the same with one log-softmax a student row, and the targets of an image summed before their product with it."""
    student, targets = logits_and_targets(inputs)
    shape = inputs.shape
    log_p = student.log_softmax(dim=-1)
    if shape.matched:
        return -(inputs.image_weights[:, None] * targets * log_p).sum()
    # the views are few, or the image is one: either way a product of matrices sums the targets
    weighted = (targets.view(shape.teacher_views, shape.images, -1) * inputs.image_weights[:, None]).flatten(1)
    summed = (inputs.pair_weights.to(weighted.dtype).T @ weighted).view(shape.student_rows, -1)
    return -(summed * log_p).sum()


def logits_and_targets(inputs: HeadInputs) -> tuple[Tensor, Tensor]:
    """[S, K] student logits over temperature, and [T, K] the teacher's probabilities, without a gradient."""
    student_weight, teacher_weight = effective_weights(inputs)
    student = functional.linear(inputs.student_features, student_weight) / inputs.student_temperature
    with torch.no_grad():
        teacher = functional.linear(inputs.teacher_features, teacher_weight)
        return student, ((teacher - inputs.center) / inputs.teacher_temperature).softmax(dim=-1)
