"""What is shown to the network of a photograph that is evaluated. A view is a frozen dataclass: its fields are its settings.

Legend: H x W pixels of the photograph, h x w of the view.
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode, functional


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


def view_facts(view: View) -> dict[str, Any]:
    """A view as JSON holds it."""
    return {"view": type(view).__name__, **asdict(view)}  # type: ignore[call-overload]
