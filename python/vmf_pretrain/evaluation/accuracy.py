"""Accuracies as figures: the interval is over test images, the spread over draws.

Legend: M test images.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from vmf_pretrain.evaluation.bootstrap import mean_interval
from vmf_pretrain.evaluation.result import Figure


class Answers(Protocol):
    """What a classifier says of the test images."""

    def correct(self, top: int = 1) -> Tensor:
        """[M] float64: 1 where the image's class is among the first ``top``, else 0."""
        ...


def accuracies(name: str, draws: Sequence[Answers], tops: Sequence[int]) -> list[Figure]:
    """A figure for each of ``tops``, in percent: the mean over draws.

    Args:
        name: what is accurate.
        draws: what was found in each, on the same test images.
        tops: how many classes may be named.
    """
    figures = []
    for top in tops:
        correct = 100 * torch.stack([one.correct(top) for one in draws]).cpu().numpy()
        low, high = mean_interval(correct.mean(axis=0))
        spread = float(np.std(correct.mean(axis=1), ddof=1)) if len(draws) > 1 else None
        figures.append(Figure(f"top-{top}, {name}", float(correct.mean()), low, high, spread=spread))
    return figures
