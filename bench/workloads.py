"""Named workloads of the head's loss, and their tensors: modules in fp32, and arguments of the operator itself.

Legend: V / G student / teacher views, B images, K prototypes, D bottleneck dim, S / T student / teacher rows.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from tests.published import TEACHER_CROPS, PublishedWeightNorm
from vmf_kernels import PrototypeLayer, multi_crop_weights


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


@dataclass(frozen=True)
class HeadShape:
    """Sizes of one loss; rows are view-major. One view on each side is the one-to-one pairing of masked patches."""

    images: int
    teacher_views: int = TEACHER_CROPS
    student_views: int = 10
    prototypes: int = 65_536
    dim: int = 256

    @property
    def matched(self) -> bool:
        """Whether each student row learns from one teacher row."""
        return self.teacher_views == self.student_views == 1

    @property
    def student_rows(self) -> int:
        """R_s."""
        return self.student_views * self.images

    @property
    def teacher_rows(self) -> int:
        """R_t."""
        return self.teacher_views * self.images

    @property
    def name(self) -> str:
        """For example "640/128 K65536 D256"."""
        return f"{self.student_rows}/{self.teacher_rows} K{self.prototypes} D{self.dim}"

    @property
    def flops(self) -> int:
        """8 (R_s + R_t) K D: what a forward and a backward pass without stored logits multiply and add."""
        return 8 * (self.student_rows + self.teacher_rows) * self.prototypes * self.dim


def matched_shape(rows: int, *, prototypes: int = 65_536, dim: int = 256) -> HeadShape:
    """``rows`` masked patches of both networks."""
    return HeadShape(rows, 1, 1, prototypes, dim)


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


@dataclass(frozen=True, eq=False)
class HeadInputs:
    """Arguments of one DINO loss under weight norm: bf16 features, as autocast hands them over, and fp32 parameters."""

    shape: HeadShape
    student_features: Tensor  # [S, D] bf16 unit rows, requires grad
    student_magnitude: Tensor  # [K, 1] g, requires grad
    student_direction: Tensor  # [K, D] v, requires grad
    teacher_features: Tensor  # [T, D] bf16 unit rows
    teacher_magnitude: Tensor
    teacher_direction: Tensor
    center: Tensor  # [K], taken off the teacher's logits before its temperature
    pair_weights: Tensor  # [G, V]
    image_weights: Tensor  # [B]
    student_temperature: float = 0.1
    teacher_temperature: float = 0.04

    @classmethod
    def of(cls, shape: HeadShape, *, device: torch.device, seed: int = 0) -> HeadInputs:
        """Each image's views scatter around one of the prototypes, so that targets are as uneven as in training."""
        random = torch.Generator(device).manual_seed(seed)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, device=device, generator=random)

        direction = normal(shape.prototypes, shape.dim) / shape.dim**0.5
        owners = torch.randint(shape.prototypes, (shape.images,), device=device, generator=random)

        def features(views: int) -> Tensor:
            spread = normal(views, shape.images, shape.dim) / shape.dim**0.5
            rows = (spread + 0.5 * functional.normalize(direction[owners], dim=1)).reshape(-1, shape.dim)
            return functional.normalize(rows, dim=1).to(torch.bfloat16)

        magnitude = 1 + 0.05 * normal(shape.prototypes, 1)
        pairs = multi_crop_weights(shape.teacher_views, shape.student_views) if not shape.matched else torch.ones(1, 1)
        return cls(
            shape,
            features(shape.student_views).requires_grad_(),
            magnitude.clone().requires_grad_(),
            (direction + 0.1 * normal(shape.prototypes, shape.dim) / shape.dim**0.5).requires_grad_(),
            features(shape.teacher_views),
            magnitude,
            direction,
            center=0.01 * normal(shape.prototypes),
            pair_weights=pairs.to(device=device, dtype=torch.float32),
            image_weights=torch.full((shape.images,), 1 / shape.images, device=device),
        )

    @property
    def leaves(self) -> dict[str, Tensor]:
        """What gets a gradient, by name."""
        return {
            "features": self.student_features,
            "magnitude": self.student_magnitude,
            "direction": self.student_direction,
        }

    def clear_gradients(self) -> None:
        """Drop every gradient, so that each step allocates its own, as training does."""
        for leaf in self.leaves.values():
            leaf.grad = None

    @property
    def gradient_bytes(self) -> int:
        """Size of the gradients one step leaves behind."""
        return sum(leaf.numel() * leaf.element_size() for leaf in self.leaves.values())

    @functools.cached_property
    def teacher_bias(self) -> Tensor:
        """[K] nats added to the teacher's logits over temperature."""
        return -self.center / self.teacher_temperature

    @functools.cached_property
    def temperatures(self) -> tuple[Tensor, Tensor]:
        """Student's and teacher's as fp64 tensors on the device, which a loss need not fill anew."""
        values = self.student_temperature, self.teacher_temperature
        student, teacher = (torch.full((), v, dtype=torch.float64, device=self.center.device) for v in values)
        return student, teacher
