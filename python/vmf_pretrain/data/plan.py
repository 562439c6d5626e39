"""What views and masks an image gets: a method says it, the loader carries it out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Generator, Tensor


class MaskSampler(Protocol):
    """Draws the masks of a batch."""

    def draw(self, generators: Sequence[Generator]) -> dict[str, Tensor]:
        """Masks of a whole global batch by name, one row per image in the first dimension.

        Args:
            generators: one for each image of the global batch, a function of (seed, epoch, image).
        """
        ...


@dataclass(frozen=True)
class Plan:
    """The views of an image, and its masks.

    Attributes:
        global_views: large views (``views.global_size`` pixels); they come first.
        local_views: small views (``views.local_size`` pixels).
        masks: draws masks beside the views, or None.
    """

    global_views: int = 2
    local_views: int = 0
    masks: MaskSampler | None = None
