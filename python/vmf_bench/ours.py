"""This library's losses on ``HeadInputs``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from vmf_bench.inputs import HeadInputs
from vmf_bench.peers.peer import Loss, effective_weights, products
from vmf_kernels import (
    Prototypes,
    logit_cross_entropy,
    matched_prototype_cross_entropy,
    prototype_cross_entropy,
    weight_norm_prototypes,
)


def ours(backend: str, stored: Callable[[Tensor, Tensor], Prototypes] = weight_norm_prototypes) -> Loss:
    """The operator on a backend; ``stored`` turns magnitude and direction into prototypes."""

    def loss(inputs: HeadInputs) -> Tensor:
        student_temperature, teacher_temperature = inputs.temperatures
        sides = (
            inputs.student_features,
            stored(inputs.student_magnitude, inputs.student_direction),
            inputs.teacher_features,
            stored(inputs.teacher_magnitude, inputs.teacher_direction),
        )
        if inputs.shape.matched:
            return matched_prototype_cross_entropy(
                *sides,
                inputs.image_weights,
                student_temperature=student_temperature,
                teacher_temperature=teacher_temperature,
                teacher_bias=inputs.teacher_bias,
                backend=backend,
            ).loss
        return prototype_cross_entropy(
            *sides,
            inputs.pair_weights,
            student_temperature=student_temperature,
            teacher_temperature=teacher_temperature,
            teacher_bias=inputs.teacher_bias,
            image_weights=inputs.image_weights,
            backend=backend,
        ).loss

    return loss


def stored_logits(inputs: HeadInputs) -> Tensor:
    """A plain head and ``logit_cross_entropy``."""
    with products(inputs):
        student_weight, teacher_weight = effective_weights(inputs)
        student = functional.linear(inputs.student_features, student_weight)
        with torch.no_grad():
            teacher = functional.linear(inputs.teacher_features, teacher_weight)
    student_temperature, teacher_temperature = inputs.temperatures
    return logit_cross_entropy(
        student,
        teacher,
        inputs.pair_weights,
        student_temperature=student_temperature,
        teacher_temperature=teacher_temperature,
        teacher_bias=inputs.teacher_bias,
        image_weights=inputs.image_weights,
    ).loss
