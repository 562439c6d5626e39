"""Region similarity J and contour accuracy F of one object in one frame.

Legend: H x W pixels.
Source: Perazzi et al., "A benchmark dataset and evaluation methodology for video object segmentation", CVPR 2016, as the
DAVIS 2017 benchmark computes them.
"""

import math

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]
TOLERANCE = 0.008  # of the diagonal: how far apart contours may be; 8 pixels at 480 x 854


def region_similarity(reference: Mask, predicted: Mask) -> float:
    """J in [0, 1]: intersection over union; 1 if both are empty."""
    union = int((reference | predicted).sum())
    return int((reference & predicted).sum()) / union if union else 1.0


def contour_accuracy(reference: Mask, predicted: Mask) -> float:
    """F in [0, 1]: harmonic mean of the shares of either contour that lie near the other; 1 if there is no contour at all."""
    contours = contour(reference), contour(predicted)
    lengths = [int(found.sum()) for found in contours]
    if not all(lengths):
        return 1.0 if not any(lengths) else 0.0
    radius = math.ceil(TOLERANCE * math.hypot(*reference.shape))
    box = _box(contours[0] | contours[1])  # the rest is empty
    inside = contours[0][box], contours[1][box]
    recall = int((inside[0] & dilated(inside[1], radius)).sum()) / lengths[0]
    precision = int((inside[1] & dilated(inside[0], radius)).sum()) / lengths[1]
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def contour(mask: Mask) -> Mask:
    """[H, W] whether a pixel differs from its neighbour to the right, below, or both; beyond the edge there is none."""
    found = np.zeros_like(mask)
    found[:, :-1] |= mask[:, :-1] ^ mask[:, 1:]
    found[:-1] |= mask[:-1] ^ mask[1:]
    found[:-1, :-1] |= mask[:-1, :-1] ^ mask[1:, 1:]
    return found


def dilated(mask: Mask, radius: int) -> Mask:
    """[H, W] whether a pixel is at most ``radius`` away from one of the mask: a union of rows, each by running sums."""
    height, width = mask.shape
    sums = np.zeros((height, width + 2 * radius + 1), np.int32)
    np.cumsum(mask, axis=1, out=sums[:, radius + 1 : radius + 1 + width])
    sums[:, radius + 1 + width :] = sums[:, radius + width, None]
    found = np.zeros_like(mask)
    for down in range(min(radius, height - 1) + 1):
        half = math.isqrt(radius**2 - down**2)
        near = sums[:, radius + half + 1 : radius + half + 1 + width] > sums[:, radius - half : radius - half + width]
        found[down:] |= near[: height - down]
        found[: height - down] |= near[down:]
    return found


def _box(mask: Mask) -> tuple[slice, slice]:
    """The smallest rectangle around a mask that is not empty."""
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    return slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
