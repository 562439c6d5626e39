"""Views of all of a photograph: squashed to a square, or in its own shape.

Legend: H x W pixels of the photograph.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms.v2 import InterpolationMode, functional

FULL_BYTE = 255.0


@dataclass(frozen=True)
class Squashed:
    """A square of ``size`` pixels, whatever the photograph's shape; bicubic with antialiasing, rounded to bytes."""

    size: int

    def __call__(self, image: Tensor) -> Tensor:
        """[3, size, size] uint8."""
        square: Tensor = functional.resize(image, [self.size, self.size], InterpolationMode.BICUBIC, antialias=True)
        return square


@dataclass(frozen=True)
class Thumbnail:
    """The photograph in its own shape, at most ``size`` pixels on a side, then scaled, as DINO's retrieval has it.

    Attributes:
        size: largest side, pixels; no photograph is enlarged.
        scale: of the smaller photograph, bilinear without a filter.
        patch: right and bottom are cut to a multiple, as a network drops what is no whole patch.
    """

    size: int
    scale: float = 1.0
    patch: int = 16

    def __call__(self, image: Tensor) -> Tensor:
        """[3, h, w] floating in [0, 1]; at least one patch on a side."""
        share = min(1.0, self.size / max(image.shape[1:]))
        if share < 1:
            sides = [max(1, round(side * share)) for side in image.shape[1:]]
            image = functional.resize(image, sides, InterpolationMode.BICUBIC, antialias=True)
        pixels = image.float() / FULL_BYTE
        if self.scale != 1:
            pixels = interpolate(pixels[None], scale_factor=self.scale, mode="bilinear", align_corners=False)[0]
        height, width = (side // self.patch * self.patch for side in pixels.shape[1:])
        if not height or not width:
            return interpolate(pixels[None], size=[max(height, self.patch), max(width, self.patch)], mode="bilinear")[0]
        return pixels[:, :height, :width].to(torch.float32)
