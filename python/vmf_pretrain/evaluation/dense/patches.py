"""Labels of patches from those of pixels, and back.

Legend: H x W pixels, h x w patches, C classes.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

VALUES_AT_ONCE = 2**24  # enlarged scores in memory: 64 MiB of fp32

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
    """[H, W] numbers of the classes with the largest score, the smaller of two equals, of scores enlarged bilinearly.

    Some classes are enlarged at a time, at most VALUES_AT_ONCE values, or one class.

    Args:
        scores: [h, w, C], at most 256 classes.
        size: H and W.
    """
    at_once = max(1, VALUES_AT_ONCE // (size[0] * size[1]))
    best, found = torch.full(size, -torch.inf), torch.zeros(size, dtype=torch.uint8)
    for start in range(0, scores.shape[2], at_once):
        some = scores[:, :, start : start + at_once].permute(2, 0, 1)[None]
        large, places = functional.interpolate(some, size=size, mode="bilinear", align_corners=False)[0].max(dim=0)
        better = large > best
        best[better], found[better] = large[better], (places[better] + start).to(torch.uint8)
    return found.numpy()
