"""Features with labels, of training and of held-out images."""

from collections.abc import Callable

import torch
from torch import Tensor


def check_split(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> None:
    """Raise ValueError unless the features are [N, F] with [N] labels, in both splits with the same F."""
    for side, features, labels in (("train", train, train_labels), ("test", test, test_labels)):
        if features.ndim != 2 or not features.shape[0] or tuple(labels.shape) != (features.shape[0],):
            raise ValueError(
                f"{side} features have shape {tuple(features.shape)} and labels {tuple(labels.shape)}; "
                "expected [N, F] and [N] with N >= 1"
            )
    if train.shape[1] != test.shape[1]:
        raise ValueError(f"train features have {train.shape[1]} columns but test features {test.shape[1]}")


def held_out_per_class(labels: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Places of the rows that are kept, and of ``share`` of each class, at least one; a class with one row keeps it.

    Args:
        labels: [N] int64.
        share: in (0, 1).
        seed: of the draw.

    Returns:
        Ascending places: [N - n] of the kept ones, and [n], which may be none.
    """
    numbers = torch.Generator().manual_seed(seed)
    out = torch.zeros(len(labels), dtype=torch.bool)
    for label in torch.unique(labels).tolist():
        places = (labels == label).nonzero()[:, 0]
        shuffled = places[torch.randperm(len(places), generator=numbers)]
        out[shuffled[: min(len(places) - 1, max(1, int(share * len(places))))]] = True
    return (~out).nonzero()[:, 0], out.nonzero()[:, 0]


def drawn_per_class(labels: Tensor, count: Callable[[int], int], seed: int) -> Tensor:
    """Ascending places of some rows of every class, drawn without replacement; a function of its arguments.

    Args:
        labels: [N] int64.
        count: from the rows of a class to how many are drawn; at most all are.
        seed: of the draw.
    """
    numbers = torch.Generator().manual_seed(seed)
    chosen = []
    for label in torch.unique(labels).tolist():
        places = (labels == label).nonzero()[:, 0]
        chosen.append(places[torch.randperm(len(places), generator=numbers)[: count(len(places))]])
    return torch.cat(chosen).sort().values
