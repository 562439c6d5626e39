"""Copies made of an image: JPEG of low quality, and crops.

Copydays scales the pictures of its JPEG copies down before, and cuts its crops where their author put them.

Legend: H x W pixels.
"""

import io
import math

from PIL import Image
from torch import Tensor

from vmf_pretrain.data.decode import decode


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
