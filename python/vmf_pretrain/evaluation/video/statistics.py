"""Mean, recall and decay of J and F over the frames of objects, and over all objects.

Legend: N frames that are scored, K objects.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vmf_pretrain.evaluation.video.measures import contour_accuracy, region_similarity

RECALLED = 0.5  # a frame is recalled above this
QUARTERS = 4
HALF_UP = 1e-10  # so that a half is rounded up, as published


class Statistics(NamedTuple):
    """One measure of one object, or of all: shares in [0, 1]; the decay is the first quarter's mean less the last one's."""

    mean: float
    recall: float
    decay: float


class ObjectScores(NamedTuple):
    """Scores of one object of one video.

    Attributes:
        video: its name.
        object: its number in the masks.
        region: [N] J of each frame.
        contour: [N] F.
    """

    video: str
    object: int
    region: NDArray[np.float64]
    contour: NDArray[np.float64]


def statistics_of(values: NDArray[np.float64]) -> Statistics:
    """Statistics of a measure over N >= 1 frames; the quarters share their end frames."""
    ends = np.round(np.linspace(1, len(values), QUARTERS + 1) + HALF_UP).astype(np.int64) - 1
    first, last = (values[ends[quarter] : ends[quarter + 1] + 1] for quarter in (0, QUARTERS - 1))
    return Statistics(float(values.mean()), float((values > RECALLED).mean()), float(first.mean() - last.mean()))


def overall(scores: Sequence[ObjectScores]) -> dict[str, float]:
    """J&F, and the statistics of J and of F, in percent: means over objects, not over videos, as published."""
    found: dict[str, float] = {}
    for letter, values in (("j", [s.region for s in scores]), ("f", [s.contour for s in scores])):
        means = np.mean([statistics_of(frames) for frames in values], axis=0)
        found |= {f"{letter}_{name}": float(100 * mean) for name, mean in zip(Statistics._fields, means, strict=True)}
    return {"j&f": (found["j_mean"] + found["f_mean"]) / 2, **found}


class Tally:
    """J and F of the objects of one video, frame by frame.

    Args:
        video: its name.
        objects: their numbers.
    """

    def __init__(self, video: str, objects: Sequence[int]) -> None:
        self.video = video
        self._values: dict[int, list[tuple[float, float]]] = {number: [] for number in objects}

    def add(self, reference: NDArray[np.uint8], predicted: NDArray[np.uint8]) -> None:
        """Count a frame of [H, W] numbers of objects.

        Raises:
            ValueError: the masks differ in shape.
        """
        if reference.shape != predicted.shape:
            raise ValueError(f"the mask has {predicted.shape} pixels; expected {reference.shape}")
        for number, values in self._values.items():
            one, other = reference == number, predicted == number
            values.append((region_similarity(one, other), contour_accuracy(one, other)))

    def scores(self) -> list[ObjectScores]:
        """Scores of each object; none if no frame was counted."""
        columns = {number: np.array(values).T for number, values in self._values.items() if values}
        return [ObjectScores(self.video, number, *column) for number, column in columns.items()]
