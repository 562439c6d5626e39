"""Sizes and tensors of one loss: the arguments of a head's last layer and of the loss behind it.

Legend: S / T student / teacher rows, G / V teacher / student views, B images, K prototypes, D bottleneck dim.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from vmf_bench.published import TEACHER_CROPS
from vmf_kernels import multi_crop_weights


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
        """8 (R_s + R_t) K D: what passes that form the logits twice multiply and add; ``operations_of`` has the least."""
        return 8 * (self.student_rows + self.teacher_rows) * self.prototypes * self.dim


def matched_shape(rows: int, *, prototypes: int = 65_536, dim: int = 256) -> HeadShape:
    """``rows`` masked patches of both networks."""
    return HeadShape(rows, 1, 1, prototypes, dim)


@dataclass(frozen=True, eq=False)
class HeadInputs:
    """Arguments of one DINO loss under weight norm: fp32 parameters, and features in fp32 or as bf16 autocast hands them over.

    Products are in the features' dtype. Softmaxes are in fp32, but for those that autocast leaves in 16 bits: on a CPU the
    log-softmax of the published loss, and of what others write on stored logits, is in bf16; on a GPU it is in fp32.
    """

    shape: HeadShape
    student_features: Tensor  # [S, D] unit rows, requires grad
    student_magnitude: Tensor  # [K, 1] g, requires grad
    student_direction: Tensor  # [K, D] v, requires grad
    teacher_features: Tensor  # [T, D] unit rows of the same dtype
    teacher_magnitude: Tensor
    teacher_direction: Tensor
    center: Tensor  # [K], taken off the teacher's logits before its temperature
    pair_weights: Tensor  # [G, V]
    image_weights: Tensor  # [B]
    student_temperature: float = 0.1
    teacher_temperature: float = 0.04

    @classmethod
    def of(
        cls, shape: HeadShape, *, device: torch.device, dtype: torch.dtype = torch.bfloat16, seed: int = 0
    ) -> HeadInputs:
        """Each image's views scatter around one of the prototypes, so that targets are as uneven as in training."""
        random = torch.Generator(device).manual_seed(seed)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, device=device, generator=random)

        direction = normal(shape.prototypes, shape.dim) / shape.dim**0.5
        owners = torch.randint(shape.prototypes, (shape.images,), device=device, generator=random)

        def features(views: int) -> Tensor:
            spread = normal(views, shape.images, shape.dim) / shape.dim**0.5
            rows = (spread + 0.5 * functional.normalize(direction[owners], dim=1)).reshape(-1, shape.dim)
            return functional.normalize(rows, dim=1).to(dtype)

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
    def dtype(self) -> torch.dtype:
        """Of the features, and so of the products."""
        return self.student_features.dtype

    @property
    def device(self) -> torch.device:
        """Of every tensor."""
        return self.student_features.device

    def to(self, dtype: torch.dtype) -> HeadInputs:
        """The same numbers with every tensor in a wider dtype, in which all is then computed; leaves are new ones."""
        names = [field.name for field in fields(self) if isinstance(getattr(self, field.name), Tensor)]
        moved: dict[str, Any] = {name: getattr(self, name).detach().to(dtype) for name in names}
        for name in ("student_features", "student_magnitude", "student_direction"):
            moved[name] = moved[name].clone().requires_grad_()
        return replace(self, **moved)

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
