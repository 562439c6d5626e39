"""How pixels of each class were classified, and what follows: mean intersection over union.

Legend: C classes.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Labels = NDArray[np.uint8]
Counts = NDArray[np.int64]


def confusion(reference: Labels, predicted: Labels, classes: int, ignored: int | None) -> Counts:
    """[C, C] counts of pixels by their class (row) and what was predicted (column).

    Args:
        reference: numbers of classes, of any shape.
        predicted: of the same shape, each below C.
        classes: C.
        ignored: pixels with this number do not count.

    Raises:
        ValueError: the shapes differ, or a number is C or more.
    """
    if reference.shape != predicted.shape:
        raise ValueError(f"the prediction has shape {predicted.shape}; expected {reference.shape}")
    kept = np.ones(reference.shape, bool) if ignored is None else reference != ignored
    rows, columns = reference[kept].astype(np.int64), predicted[kept].astype(np.int64)
    if rows.size and max(rows.max(), columns.max()) >= classes:
        raise ValueError(f"a class has the number {max(rows.max(), columns.max())}; expected less than {classes}")
    return np.bincount(rows * classes + columns, minlength=classes**2).reshape(classes, classes)


@dataclass(frozen=True, eq=False)
class SegmentationScores:
    """Scores of all pixels together.

    Attributes:
        union: [C] intersection over union in [0, 1]; NaN for a class that neither is there nor was predicted.
        accuracy: share of pixels that are right; NaN without pixels.
    """

    union: NDArray[np.float64]
    accuracy: float

    @property
    def mean(self) -> float:
        """Mean intersection over union in [0, 1], over the classes that are there or were predicted; NaN without any."""
        found = self.union[~np.isnan(self.union)]
        return float(found.mean()) if len(found) else float("nan")


def areas_of(counts: Counts) -> Counts:
    """[3, C] of [C, C] counts: pixels of each class that are right, that there are, and that were predicted.

    They are all that scores need, and the areas of several images add up.
    """
    return np.stack([np.diag(counts), counts.sum(axis=1), counts.sum(axis=0)])


def scores_of(areas: Counts | NDArray[np.float64]) -> SegmentationScores:
    """Scores of [3, C] areas, whole numbers of any type."""
    right, there, predicted = areas.astype(np.float64)
    either = there + predicted - right
    union = np.divide(right, either, out=np.full(len(right), np.nan), where=either > 0)
    total = there.sum()
    return SegmentationScores(union, float(right.sum() / total) if total else float("nan"))
