"""Views of photographs: DINO's crops, flips, colours and blurs, drawn from one generator per view.

Source: Caron et al., "Emerging properties in self-supervised vision transformers", ICCV 2021, section 3.2 and its
published augmentation.
"""

import math

import torch
from torch import Generator, Tensor
from torchvision.transforms.v2 import functional

from vmf_pretrain.config.views import GLOBAL_VIEWS, PhotoViewConfig

ASPECT = (3 / 4, 4 / 3)
CROP_TRIES = 10
BLUR_DEVIATIONS = (0.1, 2.0)  # pixels at a side of 224
BLUR_SIDE = 224
SOLARIZE_ABOVE = 0.5


def photo_view(image: Tensor, view: int, side: int, config: PhotoViewConfig, generator: Generator) -> Tensor:
    """[3, side, side] view number ``view`` (0 and 1 are global) of an image [3, H, W]; both in [0, 1]."""
    area = config.global_area if view < GLOBAL_VIEWS else config.local_area
    top, left, height, width = _crop_box(image.shape[-2], image.shape[-1], area, generator)
    out = functional.resized_crop(image, top, left, height, width, [side, side], antialias=True)
    if _chance(config.flip, generator):
        out = functional.horizontal_flip(out)
    if _chance(config.jitter, generator):
        out = _jitter(out, config, generator)
    if _chance(config.grayscale, generator):
        out = functional.rgb_to_grayscale(out, num_output_channels=3)
    if _chance(config.blur[min(view, 2)], generator):
        sigma = _uniform(*BLUR_DEVIATIONS, generator) * side / BLUR_SIDE
        out = functional.gaussian_blur(out, kernel_size=[_odd(side / 10)] * 2, sigma=[sigma] * 2)
    if view == 1 and _chance(config.solarize, generator):
        out = functional.solarize(out, SOLARIZE_ABOVE)
    pixels: Tensor = out.clamp(0, 1)
    return pixels


def _crop_box(height: int, width: int, area: tuple[float, float], generator: Generator) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a crop with a random share of the area; the whole image if no try fits."""
    for _ in range(CROP_TRIES):
        pixels = height * width * _uniform(*area, generator)
        aspect = math.exp(_uniform(math.log(ASPECT[0]), math.log(ASPECT[1]), generator))
        crop_height, crop_width = round(math.sqrt(pixels / aspect)), round(math.sqrt(pixels * aspect))
        if 0 < crop_height <= height and 0 < crop_width <= width:
            top = int(torch.randint(height - crop_height + 1, (), generator=generator))
            left = int(torch.randint(width - crop_width + 1, (), generator=generator))
            return top, left, crop_height, crop_width
    return 0, 0, height, width


def _jitter(image: Tensor, config: PhotoViewConfig, generator: Generator) -> Tensor:
    """Brightness, contrast, saturation and hue, in a random order."""
    for which in torch.randperm(4, generator=generator).tolist():
        if which == 0:
            image = functional.adjust_brightness(image, 1 + _uniform(-config.brightness, config.brightness, generator))
        elif which == 1:
            image = functional.adjust_contrast(image, 1 + _uniform(-config.contrast, config.contrast, generator))
        elif which == 2:
            image = functional.adjust_saturation(image, 1 + _uniform(-config.saturation, config.saturation, generator))
        else:
            image = functional.adjust_hue(image, _uniform(-config.hue, config.hue, generator))
    return image


def _odd(size: float) -> int:
    return 2 * (int(size) // 2) + 1


def _chance(probability: float, generator: Generator) -> bool:
    return float(torch.rand((), generator=generator)) < probability


def _uniform(low: float, high: float, generator: Generator) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator))
