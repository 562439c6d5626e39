"""What attention covers: masks of the most attended patches, and how they overlap with given masks.

Legend: N images, h x w patches of an image, H x W pixels.
"""

import torch
from torch import Tensor
from torch.nn import functional


def most_attended(maps: Tensor, mass: float) -> Tensor:
    """[..., h, w] bool: the patches with the most attention that have together a share of at least ``mass`` of all patches'.

    No more patches than needed are taken; of equal ones, the later ones in raster order.

    Args:
        maps: [..., h, w] attention, >= 0; its sum need not be 1.
        mass: above 0 and at most 1.

    Source: the pictures of the published DINO, which leave out the least attended patches up to a share of 1 - ``mass``.
    """
    flat = maps.double().flatten(-2)
    ordered, order = flat.sort(dim=-1, stable=True)  # the least attended first
    below = ordered.cumsum(dim=-1)
    kept = below > (1 - mass) * below[..., -1:] * (1 + 1e-12)  # a share that is met but for rounding is left out
    return torch.zeros_like(kept).scatter(-1, order, kept).reshape(maps.shape)


def enlarged(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """[..., H, W] bool: masks [..., h, w] of patches as masks of pixels, each patch a rectangle."""
    flat = masks.reshape(1, -1, *masks.shape[-2:]).float()
    return functional.interpolate(flat, size=size, mode="nearest").bool().reshape(*masks.shape[:-2], *size)


def overlap(masks: Tensor, given: Tensor) -> Tensor:
    """[...] float64 intersection over union of masks [..., H, W], bool; 1 where both are empty."""
    both = (masks & given).flatten(-2).sum(dim=-1).double()
    either = (masks | given).flatten(-2).sum(dim=-1).double()
    return torch.where(either == 0, 1.0, both / either.clamp(min=1))
