"""Colours and blurs are Pillow's and torchvision's, to a rounding."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torchvision.transforms.v2 import functional

from tests.pretrain.data.photo_files import encoded, noise
from vmf_pretrain.config.views import PhotoViewConfig
from vmf_pretrain.data import colour
from vmf_pretrain.data.colour import Planes
from vmf_pretrain.data.decode import decode
from vmf_pretrain.data.photo_views import least_pixels, photo_view

pytestmark = pytest.mark.quick


def planes(image: Image.Image) -> Planes:
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1), dtype=np.float32) / np.float32(255)


def smooth(side: int = 64) -> Image.Image:
    return noise(8).resize((side, side), Image.Resampling.BICUBIC)


Twice = tuple[Callable[[Planes], Planes], Callable[[Image.Image], Image.Image]]


def blurred(radius: float) -> Twice:
    """By us and by Pillow."""
    return lambda x: colour.blur(x, radius), lambda i: i.filter(ImageFilter.GaussianBlur(radius))


PILLOW: dict[str, Twice] = {
    "darker": (lambda x: colour.brightness(x, 0.6), lambda i: ImageEnhance.Brightness(i).enhance(0.6)),
    "brighter": (lambda x: colour.brightness(x, 1.4), lambda i: ImageEnhance.Brightness(i).enhance(1.4)),
    "flatter": (lambda x: colour.contrast(x, 0.6), lambda i: ImageEnhance.Contrast(i).enhance(0.6)),
    "steeper": (lambda x: colour.contrast(x, 1.4), lambda i: ImageEnhance.Contrast(i).enhance(1.4)),
    "paler": (lambda x: colour.saturation(x, 0.8), lambda i: ImageEnhance.Color(i).enhance(0.8)),
    "richer": (lambda x: colour.saturation(x, 1.2), lambda i: ImageEnhance.Color(i).enhance(1.2)),
    "gray": (colour.grayscale, lambda i: ImageOps.grayscale(i).convert("RGB")),
    "solarized": (colour.solarize, lambda i: ImageOps.solarize(i, 128)),
    **{f"blurred by {radius}": blurred(radius) for radius in (0.1, 0.4, 1.0, 1.5, 2.0)},
}


@pytest.mark.parametrize("image", [noise, smooth])
@pytest.mark.parametrize("what", PILLOW)
def test_an_operation_is_pillows_to_the_rounding_of_its_bytes(what: str, image: Callable[[], Image.Image]) -> None:
    mine, theirs = PILLOW[what]
    error = 255 * np.abs(mine(planes(image())) - planes(theirs(image())))
    if what.startswith("blurred") and image is noise:  # Pillow repeats the edge anew in each of its three passes
        error = error[:, 6:-6, 6:-6]
    allowed = 3.0 if what.startswith("blurred") else 1.5  # Pillow rounds six times in a blur
    assert error.max() <= allowed, f"{what} is off by {error.max():.2f} of 255, {error.mean():.3f} on average"


@pytest.mark.parametrize("turns", [-0.5, -0.1, 0.0, 0.03, 0.1, 0.3, 0.5])
def test_hue_is_torchvisions(turns: float) -> None:
    for image in (planes(noise()), planes(smooth()), planes(Image.new("RGB", (4, 4), "gray"))):
        error = (
            torch.from_numpy(colour.hue(image, turns)) - functional.adjust_hue(torch.from_numpy(image), turns)
        ).abs()
        assert error.max() < 1e-5, f"off by {error.max():.1e}"


def test_views_of_a_jpeg_that_was_decoded_smaller_are_those_of_the_whole_to_resampling() -> None:
    jpeg = encoded(noise(40).resize((1600, 1200), Image.Resampling.BICUBIC), "JPEG", quality=95)
    config = PhotoViewConfig()
    whole, small = decode(jpeg), decode(jpeg, least_pixels(config, 112, 48))
    assert small.shape == (3, 300, 400)
    for view, side in ((0, 112), (1, 112), (2, 48), (3, 48)):
        one, other = (
            photo_view(image, view, side, config, torch.Generator().manual_seed(view)) for image in (whole, small)
        )
        apart = 255 * (one - other).abs().mean().item()
        assert apart < 5, f"view {view} is {apart:.1f} of 255 off on average"


def test_least_size_is_that_at_which_the_smallest_crop_is_not_enlarged() -> None:
    config = PhotoViewConfig(global_area=(0.25, 1.0), local_area=(0.01, 0.2))
    assert least_pixels(config, 100, None) == round(100**2 / (0.25 * 0.75)) + 1
    assert least_pixels(config, 100, 50) == round(50**2 / (0.01 * 0.75)) + 1
