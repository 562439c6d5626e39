"""Bundled images, which are put at places of a canvas; the first are scikit-learn's handwritten digits.

Legend: N images, B of them, S side of the canvas.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vmf_pretrain.config.views import CANVASES, DigitViewConfig, ViewsConfig
from vmf_pretrain.data.images import SPLIT_SEED, fingerprint, split
from vmf_pretrain.data.placed_views import Placed, ink_middles
from vmf_pretrain.data.randomness import PLACEMENT, generator_for

DIGIT_CLASSES = tuple("0123456789")
DIGIT_CANVAS = CANVASES["digits"]
DIGIT_SIDE = 8  # pixels; scikit-learn's digits before they are put on a canvas
FULL_INK = 16.0  # largest value of scikit-learn's digits
TRAIN_DIGITS = 1297  # the other 500 are held out


class Drawings(ABC):
    """Gray images whose views are computed a batch at a time, because each is small."""

    @abstractmethod
    def placed(self, indices: Sequence[int]) -> Placed:
        """B images, as their views are drawn from them."""

    @abstractmethod
    def view_config(self, views: ViewsConfig) -> DigitViewConfig:
        """The augmentation of these images."""


@dataclass(frozen=True, eq=False)
class DigitImages(Drawings):
    """Handwritten digits on canvases."""

    canvases: Tensor  # [N, S, S] ink in [0, 1]
    middles: Tensor  # [N, 2] middle of the ink, pixels from the canvas's middle
    labels: Tensor  # [N] int64

    def __len__(self) -> int:
        return len(self.canvases)

    def name(self, index: int) -> str:
        """The digit's place among these."""
        return f"digit {index}"

    def decode(self, index: int, pixels: int | None = None) -> Tensor:
        """[1, S, S] float32 in [0, 1]; it is never reduced."""
        return self.canvases[index : index + 1]

    def evaluation_pixels(self, indices: Sequence[int]) -> Tensor:
        """[B, 1, S, S] in [0, 1]: the canvases."""
        return self.canvases[list(indices)].unsqueeze(1)

    def viewed(self, index: int, view: Callable[[Tensor], Tensor]) -> Tensor:
        """[1, S, S] the canvas, whatever the view."""
        return self.decode(index)

    def placed(self, indices: Sequence[int]) -> Placed:
        """The canvases."""
        return Placed(self.canvases[list(indices)], self.middles[list(indices)], DIGIT_SIDE)

    def view_config(self, views: ViewsConfig) -> DigitViewConfig:
        """That of digits."""
        return views.digits

    def subset(self, indices: Tensor) -> "DigitImages":
        """Some of the images."""
        return DigitImages(self.canvases[indices], self.middles[indices], self.labels[indices])

    def facts(self) -> dict[str, Any]:
        """The fingerprint; the name of a digit is its canvas."""
        canvases = self.canvases.flatten(1).numpy()
        return fingerprint((canvas.tobytes().hex(), canvas.nbytes) for canvas in canvases)


def digits() -> tuple[DigitImages, DigitImages]:
    """Training and held-out digits; the split and the place of each digit never change."""
    from sklearn.datasets import load_digits  # here, for it takes seconds: photographs and their workers do without

    bundled = load_digits()
    ink = torch.from_numpy((bundled.images / FULL_INK).astype(np.float32))
    free = DIGIT_CANVAS - DIGIT_SIDE + 1
    corners = torch.randint(free, (len(ink), 2), generator=generator_for(SPLIT_SEED, PLACEMENT)).tolist()
    canvases = torch.zeros(len(ink), DIGIT_CANVAS, DIGIT_CANVAS)
    for canvas, digit, (top, left) in zip(canvases, ink, corners, strict=True):
        canvas[top : top + DIGIT_SIDE, left : left + DIGIT_SIDE] = digit
    everything = DigitImages(canvases, ink_middles(canvases), torch.from_numpy(bundled.target).long())
    return split(everything, len(ink) - TRAIN_DIGITS)
