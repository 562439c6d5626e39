"""What a loss to compare with is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vmf_bench.errors import UnavailableError
from vmf_bench.inputs import HeadInputs

Loss = Callable[[HeadInputs], Tensor]  # differentiable in ``HeadInputs.leaves``
Compile = Callable[[Callable[..., Any]], Callable[..., Any]]


class Peer(NamedTuple):
    """A way to compute the loss."""

    title: str
    prepare: Callable[[HeadInputs, Compile], Loss]  # raises ``UnavailableError``
    omits_teacher_entropy: bool = False  # its value is KL(q, p): the same gradients, another constant
    compiles: bool = False  # by torch.compile: tens of seconds at its first call


def eager(function: Callable[..., Any]) -> Callable[..., Any]:
    """A ``Compile`` that does not compile."""
    return function


def effective_weights(inputs: HeadInputs) -> tuple[Tensor, Tensor]:
    """[K, D] prototypes of student and teacher in their own dtype, by torch's own weight norm."""
    student = torch._weight_norm(inputs.student_direction, inputs.student_magnitude, 0)
    with torch.no_grad():
        return student, torch._weight_norm(inputs.teacher_direction, inputs.teacher_magnitude, 0)


def product_weights(inputs: HeadInputs) -> tuple[Tensor, Tensor]:
    """The same in the dtype of the products."""
    student, teacher = effective_weights(inputs)
    return student.to(inputs.dtype), teacher.to(inputs.dtype)


def products(inputs: HeadInputs) -> torch.autocast:
    """The context of a training step: autocast, where the features are in 16 bits."""
    return torch.autocast(inputs.device.type, torch.bfloat16, enabled=inputs.dtype == torch.bfloat16)


def equal_weight(inputs: HeadInputs, name: str) -> Tensor:
    """[] sum of the weights of all pairs of rows, for a loss that is a mean over these pairs.

    Raises:
        UnavailableError: the pairs differ in weight.
    """
    pairs = inputs.pair_weights[inputs.pair_weights != 0]
    if pairs.ne(pairs[0]).any() or inputs.image_weights.ne(inputs.image_weights[0]).any():
        raise UnavailableError(f"{name}'s loss weights all rows alike, and these pairs differ")
    return inputs.pair_weights.sum() * inputs.image_weights.sum()


def by_view(inputs: HeadInputs) -> tuple[Tensor, Tensor]:
    """Student rows [V, B, D] and teacher rows [G, B, D]."""
    shape = inputs.shape
    student = inputs.student_features.view(shape.student_views, shape.images, shape.dim)
    return student, inputs.teacher_features.view(shape.teacher_views, shape.images, shape.dim)
