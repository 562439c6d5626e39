"""Photographs from any source: decoded when they are needed, uint8 RGB.

Legend: N images, B of them, H x W pixels.
"""

import errno
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional
from torchvision.transforms.v2.functional import InterpolationMode

from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.data.bad_images import NAMED, UnreadableImageError
from vmf_pretrain.data.batch import BadImage
from vmf_pretrain.data.cache import ImageCache
from vmf_pretrain.data.decode import decode
from vmf_pretrain.data.images import fingerprint
from vmf_pretrain.data.source import Source

RESIZED, CROPPED = 8, 7  # 256 and 224 pixels
OURS = (errno.EMFILE, errno.ENFILE)  # errors of the process, not of the file


@dataclass(frozen=True, eq=False)
class Photos:
    """Some of the images of a source.

    Attributes:
        source: where their bytes are.
        indices: [N] int64 their places in the source.
        labels: [N] int64 classes, None where there are none.
        size: side of an evaluation image, pixels.
        cache: where decoded images are kept, or None.
        bad: images that an evaluation could not read; a training batch lists its own.
    """

    source: Source
    indices: Tensor
    labels: Tensor | None
    size: int
    cache: ImageCache | None = None
    bad: dict[str, BadImage] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, index: int) -> str:
        """What the source calls the image."""
        return self.source.names[int(self.indices[index])]

    def decode(self, index: int, pixels: int | None = None) -> Tensor:
        """[3, H, W] uint8, channels last in memory; ``pixels`` is the least number that a JPEG may be reduced to.

        Raises:
            UnreadableImageError: the image is damaged.
            PretrainError: the process has too many files open.
        """
        place = int(self.indices[index])
        try:
            return self._decoded(place, pixels) if self.cache is None else self._cached(place, self.cache)
        except OSError as error:
            if error.errno in OURS:
                raise PretrainError(
                    f"{error.strerror} at {self.name(index)}; raise the limit with ulimit -n."
                ) from None
            raise UnreadableImageError(f"{type(error).__name__}: {error.strerror or error}") from None

    def evaluation_pixels(self, indices: Sequence[int]) -> Tensor:
        """[B, 3, size, size] in [0, 1]: resized by the shorter side to 8/7 of ``size``, centre-cropped.

        Instead of an unreadable image, the nearest readable one of its class is evaluated.

        Raises:
            PretrainError: there are NAMED unreadable ones in a row.
        """
        return torch.stack([self._evaluated(index) for index in indices])

    def viewed(self, index: int, view: Callable[[Tensor], Tensor]) -> Tensor:
        """[3, h, w] what a view shows of the image; no other image takes the place of a damaged one."""
        return view(self.decode(index))

    def subset(self, indices: Tensor) -> "Photos":
        """Some of the images."""
        labels = None if self.labels is None else self.labels[indices]
        return Photos(self.source, self.indices[indices], labels, self.size, self.cache)

    def facts(self) -> dict[str, Any]:
        """The fingerprint, by name and size in bytes."""
        names, sizes = self.source.names, self.source.sizes
        return fingerprint((names[place], int(sizes[place])) for place in self.indices.tolist())

    def _decoded(self, place: int, pixels: int | None) -> Tensor:
        encoded = self.source.read(place)
        return decode(encoded, pixels) if isinstance(encoded, bytes | Image.Image) else encoded

    def _cached(self, place: int, cache: ImageCache) -> Tensor:
        stamp = self.source.stamp(place)
        if stamp is None:
            return cache.reduced(self._decoded(place, None))
        name = self.source.names[place]
        found = cache.get(name, stamp)
        if found is None:
            found = cache.reduced(self._decoded(place, None))
            cache.put(name, stamp, found)
        return found

    def _evaluated(self, index: int) -> Tensor:
        tried = []
        for place in self._nearest(index):
            try:
                return centred(self.decode(place), self.size)
            except UnreadableImageError as error:
                tried.append(self.name(place))
                self.bad[tried[-1]] = BadImage(tried[-1], str(error))
            if len(tried) == NAMED:
                break
        first = self.bad[tried[0]]
        raise PretrainError(f"image {first.name} cannot be read ({first.reason}), nor can its neighbours {tried[1:]}.")

    def _nearest(self, index: int) -> Iterator[int]:
        """The image, then its neighbours of the same class, the nearest first."""
        yield index
        for distance in range(1, len(self)):
            for place in (index + distance, index - distance):
                if 0 <= place < len(self) and (self.labels is None or self.labels[place] == self.labels[index]):
                    yield place


def centred(image: Tensor, size: int) -> Tensor:
    """[..., size, size] in [0, 1] of uint8 [..., H, W]: shorter side resized to 8/7 of ``size``, bicubic, and centre-cropped.

    At 224 pixels this is the published evaluation of DINO, iBOT, DINOv2 and MAE: resize to 256, crop of 224.
    """
    resized = functional.resize(
        image, [size * RESIZED // CROPPED], interpolation=InterpolationMode.BICUBIC, antialias=True
    )
    cropped = functional.center_crop(resized, [size, size])
    pixels: Tensor = functional.to_dtype(cropped, torch.float32, scale=True)
    return pixels


def everything(source: Source, labels: Tensor | None, size: int, cache: ImageCache | None) -> Photos:
    """All images of a source."""
    return Photos(source, torch.from_numpy(np.arange(len(source.names), dtype=np.int64)), labels, size, cache)
