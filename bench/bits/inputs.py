"""Seeded prototypes, features and two networks that learn, and the gradients of a loss.

Legend: K prototypes, D embedding dim, G / V teacher / student views, B images.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from vmf_kernels import (
    PrototypeLogits,
    Prototypes,
    linear_prototypes,
    normalized_prototypes,
    vmf_prototypes,
    weight_norm_prototypes,
    weight_norm_vmf_prototypes,
)

PLAIN: dict[str, Callable[[Tensor], Prototypes]] = {
    "linear": linear_prototypes,
    "normalized": normalized_prototypes,
    "linear_vmf": vmf_prototypes,
}
WEIGHT_NORM: dict[str, Callable[[Tensor, Tensor], Prototypes]] = {
    "weight_norm": weight_norm_prototypes,
    "weight_norm_vmf": weight_norm_vmf_prototypes,
}
KINDS = {
    "linear": "linear_prototypes",
    "normalized": "normalized_prototypes",
    "linear_vmf": "vmf_prototypes",
    "weight_norm": "weight_norm_prototypes",
    "weight_norm_vmf": "weight_norm_vmf_prototypes",
}  # the public function that makes each
LEARNING_RATE, TEACHER_MOMENTUM = 0.1, 0.9


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal numbers, the same ones in every dtype up to its rounding."""
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


def draw_rows(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """[..., D] unit rows, a leaf that requires a gradient."""
    return functional.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1).to(dtype).requires_grad_()


def draw_prototypes(kind: str, count: int, dim: int, dtype: torch.dtype = torch.float32) -> Prototypes:
    """Prototypes of different norms, whose stored tensors are leaves; one row is zero, and one magnitude negative."""
    weight = draw(count, dim, dtype=dtype) / 2
    weight[count // 2] = 0
    weight.requires_grad_()
    if kind in PLAIN:
        return PLAIN[kind](weight)
    magnitude = (0.5 + 2 * torch.rand(count, 1, dtype=torch.float64)).to(dtype)
    magnitude[count // 3] *= -1
    return WEIGHT_NORM[kind](magnitude.requires_grad_(), weight)


def leaves_of(prototypes: Prototypes) -> dict[str, Tensor]:
    """The stored tensors by name."""
    stored = {"weight": prototypes.weight, "magnitude": prototypes.magnitude}
    return {name: tensor for name, tensor in stored.items() if tensor is not None}


def gradients(output: Tensor, leaves: Mapping[str, Tensor], upstream: Tensor | None = None) -> dict[str, Any]:
    """``<name>_gradient`` of the leaves, None for one that the output does not depend on; ``upstream`` as autograd's."""
    if upstream is None and output.ndim:
        upstream = draw(*output.shape, dtype=output.dtype)
    found = torch.autograd.grad(output, list(leaves.values()), upstream, allow_unused=True)
    return {f"{name}_gradient": gradient for name, gradient in zip(leaves, found, strict=True)}


class Networks:
    """Last layers of a student that learns, and of a teacher that follows it, so that values kept too long show."""

    def __init__(self, kind: str, count: int, dim: int, dtype: torch.dtype = torch.float32) -> None:
        self.dim, self.dtype = dim, dtype
        self.student = draw_prototypes(kind, count, dim, dtype)
        start = draw_prototypes(kind, count, dim, dtype)
        self.teacher = start.detach()

    def outputs(self, form: str, student: Tensor, teacher: Tensor) -> tuple[Any, Any]:
        """Both networks' logits of these features; ``form`` is "unstored" or "stored"."""
        logits = PrototypeLogits(student, self.student), PrototypeLogits(teacher.detach(), self.teacher)
        return logits if form == "unstored" else (logits[0].materialize(), logits[1].materialize())

    def leaves(self) -> dict[str, Tensor]:
        """The student's stored tensors."""
        return leaves_of(self.student)

    @torch.no_grad()
    def learn(self, found: Mapping[str, Any]) -> None:
        """A step of the student by its gradients, and of the teacher towards it, in place."""
        followers = leaves_of(self.teacher)
        for name, leaf in self.leaves().items():
            gradient = found.get(f"{name}_gradient")
            if gradient is not None:
                leaf.sub_(LEARNING_RATE * gradient)
            followers[name].mul_(TEACHER_MOMENTUM).add_(leaf, alpha=1 - TEACHER_MOMENTUM)


def without_magnitude_column(prototypes: Prototypes) -> Prototypes:
    """The same with magnitudes [K] in the place of [K, 1]."""
    assert prototypes.magnitude is not None
    return replace(prototypes, magnitude=prototypes.magnitude.detach().reshape(-1).requires_grad_())
