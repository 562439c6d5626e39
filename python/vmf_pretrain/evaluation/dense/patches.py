"""Labels of patches from those of pixels, and back.

Legend: H x W pixels, h x w patches, C classes.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

Labels = NDArray[np.uint8]


def patch_labels(labels: Labels, grid: tuple[int, int], classes: int, ignored: int | None) -> Tensor:
    """[h, w] int64 most frequent class of the pixels of each patch, the smaller of two equals; -1 where all are ignored.

    Args:
        labels: [H, W] numbers of classes; sides need not be multiples of the grid's.
        grid: h and w.
        classes: C.
        ignored: pixels with this number do not count.
    """
    rows, columns = (np.arange(side) * parts // side for side, parts in zip(labels.shape, grid, strict=True))
    place = rows[:, None] * grid[1] + columns
    kept = (labels < classes) if ignored is None else (labels < classes) & (labels != ignored)
    counts = np.bincount(place[kept] * classes + labels[kept], minlength=grid[0] * grid[1] * classes)
    counts = counts.reshape(*grid, classes)
    return torch.from_numpy(np.where(counts.sum(axis=2) > 0, counts.argmax(axis=2), -1))


def pixel_labels(scores: Tensor, size: tuple[int, int]) -> Labels:
    """[H, W] numbers of the classes with the largest score, of [h, w, C] scores enlarged bilinearly."""
    large = functional.interpolate(scores.permute(2, 0, 1)[None], size=size, mode="bilinear", align_corners=False)[0]
    return large.argmax(dim=0).to(torch.uint8).numpy()
