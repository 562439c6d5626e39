"""This rank's images of one step.

Legend: B images, C channels.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class BadImage:
    """An image that could not be read, and another one took its place.

    Attributes:
        name: of the image, as the data set names it.
        reason: what is wrong with it, one sentence.
    """

    name: str
    reason: str


@dataclass(frozen=True, eq=False)
class Batch:
    """Views, masks and numbers of images.

    Attributes:
        views: network inputs [B, C, side, side], the global views first; clips are [B, T, C, side, side].
        masks: by name, rows as the images.
        indices: the images' numbers in the data set, B of them.
        bad: images of this batch that could not be read.
        drawn: the masks as the loader gave them, in host memory; ``to`` keeps them.
    """

    views: list[Tensor]
    masks: dict[str, Tensor] = field(default_factory=dict)
    indices: list[int] = field(default_factory=list)
    bad: list[BadImage] = field(default_factory=list)
    drawn: dict[str, Tensor] = field(default_factory=dict)

    def host_mask(self, name: str) -> Tensor:
        """A mask where reading it waits for no device."""
        return self.drawn.get(name, self.masks[name])

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> "Batch":
        """The batch on a device; views in ``dtype`` if one is given. Does not wait for the device."""
        views = [view.to(device, dtype, non_blocking=True) for view in self.views]
        masks = {name: mask.to(device, non_blocking=True) for name, mask in self.masks.items()}
        return replace(self, views=views, masks=masks, drawn=self.drawn or self.masks)

    def pin_memory(self) -> "Batch":
        """The batch in pinned memory; the loader calls it."""
        views = [view.pin_memory() for view in self.views]
        return replace(self, views=views, masks={name: mask.pin_memory() for name, mask in self.masks.items()})
