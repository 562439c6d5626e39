"""A few images for a picture.

Legend: n images, C channels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.data.bad_images import UnreadableImageError
from vmf_pretrain.data.images import Images
from vmf_pretrain.evaluation.views import View

ORDINALS = ("nearest", "2nd", "3rd")


def spread(count: int, shown: int) -> list[int]:
    """Places of at most ``shown`` of ``count`` things, evenly spread over all."""
    few = min(shown, count)
    return [place * count // few for place in range(few)]


def pixels(images: Images, places: Sequence[int], view: View) -> Tensor:
    """[n, C, h, w] in [0, 1] of images that have the same size when viewed; of a clip, its middle frame.

    Raises:
        UnreadableImageError: one is damaged.
    """
    seen = [images.viewed(place, view) for place in places]
    frames = [image if image.ndim == 3 else image[len(image) // 2] for image in seen]
    return torch.stack([functional.to_dtype(frame, torch.float32, scale=True) for frame in frames])


def readable(images: Images, count: int, view: View) -> Tensor:
    """[n, C, h, w] as ``pixels``, of at most ``count`` images, evenly spread; after a damaged one, the next takes its place.

    Raises:
        PretrainError: none can be read.
    """
    seen = []
    starts = spread(len(images), count)
    for start, end in zip(starts, [*starts[1:], len(images)], strict=True):
        for place in range(start, end):
            try:
                seen.append(pixels(images, [place], view))
                break
            except UnreadableImageError:
                continue
    if not seen:
        raise PretrainError(f"none of {len(images)} images can be read; the first is {images.name(0)}.")
    return torch.cat(seen)


def ordinal(place: int) -> str:
    """The title of a neighbour's column; 0 is the nearest."""
    return ORDINALS[place] if place < len(ORDINALS) else f"{place + 1}th"
