"""Copies made of an image: JPEG of low quality, and crops.

Legend: H x W pixels.
"""

import io
import math
from collections.abc import Callable

from PIL import Image
from torch import Tensor

from vmf_pretrain.data.decode import decode

# as on Copydays; there the JPEG copies were scaled down before, and crops lie where their author put them
QUALITIES = (3, 5, 8, 10, 15, 20, 30, 50, 75)
REMOVED = (10, 20, 30, 40, 50, 60, 70, 80)  # % of the surface


def jpeg(image: Tensor, quality: int) -> Tensor:
    """[3, H, W] uint8 after JPEG compression."""
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=quality)
    return decode(file.getvalue())


def crop(image: Tensor, removed: int) -> Tensor:
    """[3, h, w] uint8: the centre of the image in its own shape, without ``removed`` percent of its surface."""
    share = math.sqrt(1 - removed / 100)
    height, width = (max(1, round(side * share)) for side in image.shape[1:])
    top, left = (image.shape[1] - height) // 2, (image.shape[2] - width) // 2
    return image[:, top : top + height, left : left + width]


Alteration = Callable[[Tensor], Tensor]


def alterations() -> dict[str, Alteration]:
    """Every way to alter an image, by the name of its block."""
    made: dict[str, Alteration] = {}
    for quality in QUALITIES:
        made[f"jpegqual/{quality}"] = lambda image, quality=quality: jpeg(image, quality)  # type: ignore[misc]
    for removed in REMOVED:
        made[f"crops/{removed}"] = lambda image, removed=removed: crop(image, removed)  # type: ignore[misc]
    return made
