"""Named workloads of the head's loss: modules in fp32, and the sizes of the operator's own arguments.

Legend: V / G student / teacher views, B images, K prototypes, D bottleneck dim, S / T student / teacher rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from tests.fuzz.statements.dino import PublishedWeightNorm
from vmf_bench.inputs import HeadShape, matched_shape
from vmf_bench.published import TEACHER_CROPS
from vmf_kernels import PrototypeLayer


@dataclass(frozen=True)
class Workload:
    """Sizes of one multi-crop step; the student has ``crops * images`` rows, the teacher ``2 * images``."""

    images: int
    crops: int = 10
    prototypes: int = 65_536
    dim: int = 256

    @property
    def name(self) -> str:
        """Student / teacher rows, for example 640/128."""
        return f"{self.crops * self.images}/{TEACHER_CROPS * self.images}"

    @property
    def flops(self) -> int:
        """8 (R_s + R_t) K D, as ``HeadShape.flops``."""
        return 8 * (self.crops + TEACHER_CROPS) * self.images * self.prototypes * self.dim


WORKLOADS = {"160/32": Workload(images=16), "640/128": Workload(images=64)}
TOY = Workload(images=2, crops=4, prototypes=301, dim=24)  # the same code in milliseconds, for the test suite


@dataclass(frozen=True)
class Inputs:
    """Inputs of a head's last layer in one step; the layers of both heads have the same weights."""

    student_features: Tensor  # [V * B, D] unit rows, requires grad
    teacher_features: Tensor  # [2 * B, D] unit rows
    layers: tuple[PrototypeLayer, PrototypeLayer]  # student, teacher
    published_layers: tuple[PublishedWeightNorm, PublishedWeightNorm]

    @classmethod
    def of(cls, workload: Workload, seed: int = 0) -> Inputs:
        """Random unit features; the teacher's prototypes lie near the student's; norms are free."""
        torch.manual_seed(seed)
        rows, size = workload.crops * workload.images, (workload.dim, workload.prototypes)
        student = functional.normalize(torch.randn(rows, workload.dim), dim=1).requires_grad_()
        teacher = functional.normalize(torch.randn(TEACHER_CROPS * workload.images, workload.dim), dim=1)
        layers = PrototypeLayer(*size), PrototypeLayer(*size).requires_grad_(False)
        layers[1].weight_v.copy_(layers[0].weight_v.detach() + 0.01 * torch.randn_like(layers[0].weight_v))
        published = PublishedWeightNorm(*size, frozen_norm=False), PublishedWeightNorm(*size, frozen_norm=False)
        for ours, theirs in zip(layers, published, strict=True):
            theirs.load_state_dict(ours.state_dict())
            theirs.requires_grad_(ours.weight_v.requires_grad)
        return cls(student, teacher, layers, published)

    def clear_gradients(self) -> None:
        """Drop every gradient, so that each step allocates its own, as training does."""
        self.student_features.grad = None
        for layer in (*self.layers, *self.published_layers):
            layer.zero_grad(set_to_none=True)

    @property
    def gradient_bytes(self) -> int:
        """Size of the gradients one step leaves behind."""
        kept = [self.student_features, *self.layers[0].parameters()]
        return sum(tensor.numel() * tensor.element_size() for tensor in kept)


# In the order they are worth measuring when time is short.
HEAD_SHAPES = (
    HeadShape(64),
    matched_shape(3771),
    HeadShape(128),
    matched_shape(16_384),
    HeadShape(64, prototypes=131_072),
    matched_shape(3771, prototypes=131_072),
    HeadShape(64, dim=384),
    matched_shape(3771, dim=384),
)
TOY_HEAD_SHAPES = (HeadShape(3, 2, 4, prototypes=301, dim=32), matched_shape(7, prototypes=301, dim=32))
