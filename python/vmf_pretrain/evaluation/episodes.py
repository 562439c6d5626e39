"""Episodes of few classes and few labelled images, classified by the nearest mean.

Legend: N rows, F features, W ways (classes of an episode), S shots (labelled rows of a class), Q queries of a class.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

SEED = 0


@dataclass(frozen=True)
class Shape:
    """Of an episode: W, S and Q."""

    ways: int
    shots: int
    queries: int


def eligible(labels: Tensor, shape: Shape) -> Tensor:
    """Labels of the classes with at least S + Q rows, ascending."""
    classes, counts = torch.unique(labels, return_counts=True)
    found: Tensor = classes[counts >= shape.shots + shape.queries]
    return found


def episode_accuracies(rows: Tensor, labels: Tensor, shape: Shape, episodes: int) -> Tensor:
    """[episodes] float64 share of queries whose nearest mean, by Euclidean distance, is that of their class; deterministic.

    Args:
        rows: [N, F] floating point.
        labels: [N] int64 on the CPU.
        shape: of every episode.
        episodes: how many; classes and rows of each are drawn without replacement.

    Raises:
        ValueError: fewer than W classes have S + Q rows.
    """
    classes = eligible(labels, shape)
    if len(classes) < shape.ways:
        raise ValueError(f"{len(classes)} classes have enough rows; an episode needs {shape.ways}")
    places = [(labels == label).nonzero()[:, 0] for label in classes.tolist()]
    numbers = torch.Generator().manual_seed(SEED)
    return torch.tensor([_accuracy(rows, places, shape, numbers) for _ in range(episodes)], dtype=torch.float64)


def _accuracy(rows: Tensor, places: list[Tensor], shape: Shape, numbers: torch.Generator) -> float:
    chosen = []
    for way in torch.randperm(len(places), generator=numbers)[: shape.ways].tolist():
        order = torch.randperm(len(places[way]), generator=numbers)[: shape.shots + shape.queries]
        chosen.append(places[way][order])
    drawn = rows[torch.stack(chosen).to(rows.device)]  # [W, S + Q, F]
    means = drawn[:, : shape.shots].mean(dim=1)
    nearest = torch.cdist(drawn[:, shape.shots :].flatten(0, 1), means).argmin(dim=1).view(shape.ways, shape.queries)
    own = torch.arange(shape.ways, device=rows.device)[:, None]
    return float((nearest == own).double().mean())
