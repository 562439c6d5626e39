"""Views of photographs: DINO's crops, flips, colours and blurs, drawn from one generator per view.

A crop is resized as bytes; only the small view becomes floating.

Source: Caron et al., "Emerging properties in self-supervised vision transformers", ICCV 2021, section 3.2 and its
published augmentation.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Generator, Tensor
from torchvision.transforms.v2 import functional
from torchvision.transforms.v2.functional import InterpolationMode

from vmf_pretrain.config.views import GLOBAL_VIEWS, PhotoViewConfig
from vmf_pretrain.data import colour
from vmf_pretrain.data.colour import Planes

CROP_TRIES = 10
BLUR_RADII = (0.1, 2.0)  # pixels of the view, whatever its side, as published
FULL_BYTE = np.float32(255)


@dataclass(frozen=True)
class Draws:
    """The random numbers of a view, uniform in [0, 1): each has its use, so that none depends on whether another is used."""

    crops: list[float]  # share of the area and aspect, for each try
    place: list[float]  # down and across
    order: list[float]  # the parts of the jitter are done in the order of these
    amounts: list[float]  # brightness, contrast, saturation, hue
    flip: float
    jitter: float
    grayscale: float
    blur: float
    radius: float
    solarize: float

    @classmethod
    def of(cls, generator: Generator) -> "Draws":
        """The first numbers of a generator."""
        crops = 2 * CROP_TRIES
        numbers: list[float] = torch.rand(crops + 16, generator=generator).tolist()
        rest = numbers[crops:]
        return cls(numbers[:crops], rest[:2], rest[2:6], rest[6:10], *rest[10:])


def photo_view(
    image: Tensor,
    view: int,
    side: int,
    config: PhotoViewConfig,
    generator: Generator,
    *,
    global_views: int = GLOBAL_VIEWS,
) -> Tensor:
    """[3, side, side] float32 in [0, 1], view number ``view`` of an image [3, H, W] uint8; the global ones come first.

    It is quickest for images with channels last in memory.
    """
    draws, is_global = Draws.of(generator), view < global_views
    area = config.global_area if is_global else config.local_area
    small = cropped(image, area, side, config, draws)
    if draws.flip < config.flip:
        small = small.flip(2)
    planes = small.contiguous().numpy().astype(np.float32)
    planes /= FULL_BYTE
    if draws.jitter < config.jitter:
        planes = _jittered(planes, config, draws)
    if draws.grayscale < config.grayscale:
        planes = colour.grayscale(planes)
    if draws.blur < config.blur[min(view, 1) if is_global else 2]:
        planes = colour.blur(planes, _between(BLUR_RADII, draws.radius))
    if view == 1 and is_global and draws.solarize < config.solarize:
        planes = colour.solarize(planes)
    return torch.from_numpy(np.clip(planes, 0, 1, out=planes))


def cropped(image: Tensor, area: tuple[float, float], side: int, config: PhotoViewConfig, draws: Draws) -> Tensor:
    """[..., side, side] uint8 of an image, or of the frames of a clip, [..., H, W] uint8: a random crop, resized."""
    top, left, height, width = crop_box(image.shape[-2], image.shape[-1], area, config.aspect, draws)
    crop = image[..., top : top + height, left : left + width]
    way = InterpolationMode(config.interpolation)
    small: Tensor = functional.resize(crop, [side, side], interpolation=way, antialias=True)
    return small


def least_pixels(config: PhotoViewConfig, global_size: int, local_size: int | None) -> int:
    """The least size of an image, in pixels, at which no crop is enlarged; ``local_size`` is None without local views."""
    narrowest = {global_size: config.global_area[0]}
    if local_size is not None:
        narrowest[local_size] = min(config.local_area[0], narrowest.get(local_size, 1.0))
    uneven = min(config.aspect[0], 1 / config.aspect[1])  # shorter side over the longer
    return math.ceil(max(side**2 / (share * uneven) for side, share in narrowest.items()))


def crop_box(
    height: int, width: int, area: tuple[float, float], aspect: tuple[float, float], draws: Draws
) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a crop with a random share of the area; if no try fits, the largest in the middle."""
    logarithms = math.log(aspect[0]), math.log(aspect[1])
    for one in range(CROP_TRIES):
        share, shape = draws.crops[2 * one : 2 * one + 2]
        pixels, ratio = height * width * _between(area, share), math.exp(_between(logarithms, shape))
        crop_height, crop_width = round(math.sqrt(pixels / ratio)), round(math.sqrt(pixels * ratio))
        if 0 < crop_height <= height and 0 < crop_width <= width:
            # shares, not numbers of pixels, so that a smaller copy of the image gets the same crop
            top = int(draws.place[0] * (height - crop_height + 1))
            return top, int(draws.place[1] * (width - crop_width + 1)), crop_height, crop_width
    crop_height, crop_width = min(height, round(width / aspect[0])), min(width, round(height * aspect[1]))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def _jittered(image: Planes, config: PhotoViewConfig, draws: Draws) -> Planes:
    """Brightness, contrast, saturation and hue, in a random order."""
    amounts = (config.brightness, config.contrast, config.saturation, config.hue)
    parts = (colour.brightness, colour.contrast, colour.saturation, colour.hue)
    middle = (1.0, 1.0, 1.0, 0.0)
    for part in sorted(range(len(parts)), key=draws.order.__getitem__):
        amount = middle[part] + amounts[part] * (2 * draws.amounts[part] - 1)
        image = parts[part](image, amount)
    return image


def _between(bounds: tuple[float, float], share: float) -> float:
    return bounds[0] + (bounds[1] - bounds[0]) * share
