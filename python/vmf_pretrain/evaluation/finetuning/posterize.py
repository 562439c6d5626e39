"""Posterising to no bits, which timm's augmentations draw at their largest magnitude and Pillow refuses from version 13 on.

Pillow used to return a black image, so that is what the sources trained on.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from PIL import Image
from timm.data.auto_augment import AugmentOp, posterize


def keep_black(steps: Iterable[Any]) -> None:
    """Make every posterising operation of these augmentations (timm's RandAugment, AutoAugment, AugMix) take 0 bits."""
    for operation in _operations(steps):
        if operation.aug_fn is posterize:
            operation.aug_fn = _posterized


def _operations(steps: Iterable[Any]) -> Iterator[AugmentOp]:
    for step in steps:
        yield from getattr(step, "ops", ())
        for policy in getattr(step, "policy", ()):
            yield from policy


def _posterized(image: Image.Image, bits: int, **unused: Any) -> Image.Image:
    """The image with so many bits a colour, from 0."""
    if bits < 1:
        return Image.new(image.mode, image.size)
    result: Image.Image = posterize(image, bits)
    return result
