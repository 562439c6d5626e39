"""What is shown to the network of a photograph that is evaluated. A view is a frozen dataclass: its fields are its settings.

Legend: H x W pixels of the photograph, h x w of the view.
"""

import math
import zlib
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode, functional

TRIES = 10  # draws of a part before the central square is taken
WIDEST = math.log(4 / 3)  # of a random part's aspect


class View(Protocol):
    """From uint8 [3, H, W] to [3, h, w], uint8 or floating in [0, 1]; a frozen dataclass."""

    def __call__(self, image: Tensor) -> Tensor:
        """[3, h, w] of the photograph."""
        ...


@dataclass(frozen=True)
class CentreSquare:
    """The central square of the photograph, resized before with antialiasing, as Pillow does, and rounded to bytes.

    Attributes:
        size: side of the square, pixels.
        shorter: the shorter side after resizing, pixels.
        interpolation: of the resizing.
    """

    size: int
    shorter: int
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"

    def __call__(self, image: Tensor) -> Tensor:
        """[3, size, size] uint8."""
        resized = functional.resize(image, [self.shorter], InterpolationMode(self.interpolation), antialias=True)
        square: Tensor = functional.center_crop(resized, [self.size, self.size])
        return square


@dataclass(frozen=True)
class RandomSquare:
    """A random part of the photograph as a square, mirrored half of the time: always the same one of the same photograph.

    Attributes:
        size: side of the square, pixels.
        number: of the view; another one is another draw.
        smallest: share of the photograph's area that the part has at least.
    """

    size: int
    number: int
    smallest: float = 0.08

    def __call__(self, image: Tensor) -> Tensor:
        """[3, size, size] uint8. Source: the random resized crop of torchvision, as training of linear probes uses it."""
        seed = zlib.crc32(image.contiguous().numpy().data, self.number)
        numbers = torch.Generator().manual_seed(seed)
        top, left, height, width = self._part(image.shape[-2], image.shape[-1], numbers)
        square: Tensor = functional.resized_crop(
            image, top, left, height, width, [self.size, self.size], InterpolationMode.BILINEAR, antialias=True
        )
        return square.flip(-1) if bool(torch.rand((), generator=numbers) < 0.5) else square

    def _part(self, height: int, width: int, numbers: torch.Generator) -> tuple[int, int, int, int]:
        """Top, left, height and width of a part with an aspect between 3/4 and 4/3."""
        for _ in range(TRIES):
            area = height * width * float(torch.empty(()).uniform_(self.smallest, 1, generator=numbers))
            aspect = math.exp(float(torch.empty(()).uniform_(-WIDEST, WIDEST, generator=numbers)))
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                top = int(torch.randint(height - h + 1, (), generator=numbers))
                return top, int(torch.randint(width - w + 1, (), generator=numbers)), h, w
        side = min(height, width)
        return (height - side) // 2, (width - side) // 2, side, side


def view_facts(view: View) -> dict[str, Any]:
    """A view as JSON holds it."""
    return {"view": type(view).__name__, **asdict(view)}  # type: ignore[call-overload]
