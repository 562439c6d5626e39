"""Metrics of a classifier over all rows, or as means over classes.

Legend: M test rows, C classes.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

RECALLS = tuple(place / 10 for place in range(11))

Floats = NDArray[np.float64]
Places = NDArray[np.int64]
Metric = Callable[[Floats, Places], float]


def accuracy(scores: Floats, labels: Places) -> float:
    """Share of the rows whose label has the largest score; of equal scores the first counts.

    Args:
        scores: [M, C].
        labels: [M] in [0, C), or -1 for a class that has no score.
    """
    return float((scores.argmax(axis=1) == labels).mean())


def mean_per_class(scores: Floats, labels: Places) -> float:
    """The mean of the accuracies of the classes that occur among the labels. Arguments as of ``accuracy``."""
    right = scores.argmax(axis=1) == labels
    shares = [right[labels == label].mean() for label in np.unique(labels)]
    return float(np.mean(shares))


def mean_ap11(scores: Floats, labels: Places) -> float:
    """The mean of ``ap11`` of the classes that occur among the labels. Arguments as of ``accuracy``; -1 scores 0."""
    found = [0.0 if label < 0 else ap11(scores[:, label], labels == label) for label in np.unique(labels)]
    return float(np.mean(found))


def ap11(scores: Floats, positive: NDArray[np.bool_]) -> float:
    """11-point average precision: the mean of the largest precision at a recall of at least 0, 0.1, ..., 1.

    Rows of equal scores are one step of the curve.

    Args:
        scores: [M], the largest first in the ranking.
        positive: [M], at least one.

    Source: Everingham et al., "The PASCAL visual object classes challenge", IJCV 2010, section 4.2.
    """
    order = np.argsort(-scores, kind="stable")
    hits = np.cumsum(positive[order])
    ends = np.flatnonzero(np.diff(scores[order], append=-np.inf))  # the last row of each score
    precision, recall = hits[ends] / (ends + 1), hits[ends] / hits[-1]
    # a recall such as 3/10 may lie a rounding below 0.3
    return float(np.mean([precision[recall >= least - 1e-12].max() for least in RECALLS]))


METRICS: dict[str, Metric] = {"accuracy": accuracy, "mean_per_class": mean_per_class, "ap11": mean_ap11}
