"""What is evaluated during training: quick protocols on features in memory.

Legend: N training rows, M test rows, F features.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from vmf_pretrain.config.evaluate import EvaluateConfig, Online
from vmf_pretrain.config.tasks.data import DataTask
from vmf_pretrain.evaluation.given import Given, Splits
from vmf_pretrain.evaluation.knn import knn_accuracy
from vmf_pretrain.evaluation.linear import linear_accuracy
from vmf_pretrain.evaluation.logistic import regressions
from vmf_pretrain.evaluation.scores import Known, predicted
from vmf_pretrain.evaluation.splits import drawn_per_class

DRAWS = 3  # of the labelled images of few_shot
COST = 100.0  # C of few_shot: iBOT's smallest penalty, 0.01, on features of unit length


@dataclass(frozen=True, eq=False)
class Labelled:
    """Features with labels.

    Attributes:
        rows: [N, F].
        labels: [N] int64.
    """

    rows: Tensor
    labels: Tensor


def online_figures(train: Labelled, test: Labelled, settings: EvaluateConfig) -> dict[Online, float | None]:
    """The accuracy of each of ``settings.online``, percent; None where one class has nothing to be told from."""
    several = bool((train.labels != train.labels[0]).any())
    found: dict[Online, float | None] = {}
    for name in settings.online:
        if name == "knn":
            k, temperature = settings.neighbours, settings.temperature
            found[name] = knn_accuracy(
                train.rows, train.labels, test.rows, test.labels, neighbours=k, temperature=temperature
            )
        elif not several:
            found[name] = None
        elif name == "linear":
            found[name] = linear_accuracy(train.rows, train.labels, test.rows, test.labels)
        else:
            found[name] = few_shot_accuracy(train, test, settings.shots)
    return found


def few_shot_accuracy(train: Labelled, test: Labelled, shots: int) -> float:
    """Mean accuracy over DRAWS of ``shots`` rows of each class, percent: logistic regression on features of unit length."""
    read, tested = functional.normalize(train.rows, dim=1), functional.normalize(test.rows, dim=1)
    right = []
    for draw in range(DRAWS):
        chosen = drawn_per_class(train.labels, lambda size: shots, draw)
        known = Known.of(train.labels[chosen])
        (fitted,) = regressions(read[chosen], known.labels, len(known), [COST], intercept=False)
        right.append(predicted(fitted.scores, tested, test.labels, known).correct().mean())
    return 100 * float(torch.stack(right).mean())


def probe_sets(settings: EvaluateConfig, size: int) -> Mapping[str, Splits]:
    """The images of ``settings.sets`` by the name of their folder, seen at ``size`` pixels.

    Raises:
        PretrainError: a folder has no images or no classes.
    """
    given = {Path(folder).name: DataTask(folder, max_images=settings.max_images) for folder in settings.sets}
    return {name: Given(wanted, None, size).labelled for name, wanted in given.items()}


def improved(
    figures: Mapping[str, float | None], before: Mapping[str, Any], names: Collection[str]
) -> dict[str, float]:
    """Those of ``names`` that are better than ``best_NAME`` of before, or the first, under that key."""
    found = {f"best_{name}": value for name in names if (value := figures.get(name)) is not None}
    return {key: value for key, value in found.items() if before[key] is None or value > before[key]}
