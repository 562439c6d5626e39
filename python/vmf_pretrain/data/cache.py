"""Decoded images of reduced size as files of uint8, read by memory map, so that an epoch decodes nothing.

Legend: H x W pixels.
"""

import contextlib
import hashlib
import logging
import os
import uuid
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional
from torchvision.transforms.v2.functional import InterpolationMode

from vmf_pretrain.data.source import Stamp

LAYOUT = 1  # of a file; another number never finds the files of this one
LOG = logging.getLogger(__name__)


class ImageCache:
    """Images by name and stamp. A disk that is full or cannot be written to costs speed, never the run.

    Args:
        folder: where the files are; made if needed.
        side: the shorter side of an image, pixels; smaller images keep their size.
    """

    def __init__(self, folder: Path, side: int) -> None:
        self.folder = folder
        self.side = side
        self._writable = True

    def reduced(self, image: Tensor) -> Tensor:
        """[3, H, W] uint8 with the shorter side at most ``side``: the same whether or not it comes from a file."""
        if min(image.shape[-2:]) <= self.side:
            return image
        bicubic = InterpolationMode.BICUBIC
        small: Tensor = functional.resize(image, [self.side], interpolation=bicubic, antialias=True)
        return small

    def get(self, name: str, stamp: Stamp) -> Tensor | None:
        """[3, H, W] uint8, or None where no whole file is."""
        try:
            pixels = np.load(self._path(name, stamp), mmap_mode="c", allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
            return None
        return torch.from_numpy(pixels).permute(2, 0, 1)

    def put(self, name: str, stamp: Stamp, image: Tensor) -> None:
        """Write an image, whole or not at all."""
        if not self._writable:
            return
        path = self._path(name, stamp)
        part = path.with_name(f".{uuid.uuid4().hex}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                np.save(file, np.ascontiguousarray(image.permute(1, 2, 0).numpy()), allow_pickle=False)
            os.replace(part, path)
        except OSError as error:
            self._writable = False
            with contextlib.suppress(OSError):
                part.unlink()
            LOG.warning(
                "data.cache %s takes no more images (%s); the run goes on without.", self.folder, error.strerror
            )

    def _path(self, name: str, stamp: Stamp) -> Path:
        key = f"{LAYOUT}\0{self.side}\0{stamp.size}\0{stamp.changed}\0{name}"
        digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()
        return self.folder / digest[:2] / f"{digest}.npy"
