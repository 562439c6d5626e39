"""k-NN accuracy of features.

Legend: N training rows, M test rows, k neighbours, F feature dim, C classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from vmf_pretrain.evaluation.nearest import nearest
from vmf_pretrain.evaluation.splits import check_split

VOTES_AT_ONCE = 1 << 22  # of votes by row and class in memory: 16 MiB
TOP = 5


@dataclass(frozen=True, eq=False)
class Voted:
    """What k neighbours say of each test row.

    Attributes:
        predicted: [M] int64 the class with the most votes; of equal ones the smallest.
        rank: [M] int64 how many classes have more votes than the row's own, or as many and a smaller number.
        has_votes: [M] bool whether the row's own class has any.
    """

    predicted: Tensor
    rank: Tensor
    has_votes: Tensor

    def correct(self, top: int = 1) -> Tensor:
        """[M] float64: 1 where the row's class is among the ``top`` ones with the most votes, else 0."""
        return ((self.rank < top) & self.has_votes).double()


def voted(
    cosines: Tensor, neighbours: Tensor, labels: Tensor, *, counts: Sequence[int], temperature: float
) -> dict[int, Voted]:
    """The votes exp(cosine / temperature) of the k nearest rows, for each k of ``counts``.

    Args:
        cosines: [M, K] of the nearest rows, the largest first; K is at least every k, or all N.
        neighbours: [M, K] int64 classes of those rows, >= 0.
        labels: [M] int64 classes of the test rows, >= 0; one that no neighbour has counts as wrong.
        counts: k's; one above K is K.
        temperature: positive.

    Source: Wu et al., "Unsupervised feature learning via non-parametric instance discrimination", CVPR 2018, section 3.4;
    constants of DINO's and DINOv2's evaluation. Where fewer than five classes have votes, those scripts fill the first five
    up with any others; here a class without votes is never among them.
    """
    classes = 1 + int(max(neighbours.max(), labels.max()))
    parts: dict[int, list[Voted]] = {count: [] for count in sorted(counts)}
    at_once = max(1, VOTES_AT_ONCE // classes)
    for start in range(0, len(cosines), at_once):
        rows = slice(start, start + at_once)
        near, own = cosines[rows], labels[rows]
        votes = ((near - near[:, :1]) / temperature).exp()  # relative to the nearest: no overflow
        tally, before = votes.new_zeros(len(near), classes), 0
        for count, found in parts.items():
            tally.scatter_add_(1, neighbours[rows, before:count], votes[:, before:count])
            found.append(_ranked(tally, own))
            before = count
    return {count: _joined(found) for count, found in parts.items()}


def _ranked(tally: Tensor, own: Tensor) -> Voted:
    """Prediction and rank of the own class, from votes [m, C]."""
    mine = tally.gather(1, own[:, None])
    smaller = torch.arange(tally.shape[1], device=tally.device) < own[:, None]
    rank = ((tally > mine) | ((tally == mine) & smaller)).sum(dim=1)
    return Voted(tally.argmax(dim=1), rank, mine[:, 0] > 0)


def _joined(parts: Sequence[Voted]) -> Voted:
    return Voted(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(Voted)))


def knn_accuracy(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, *, neighbours: int, temperature: float
) -> float:
    """Accuracy of the weighted k-NN classifier on cosine similarity, in percent.

    Each of the ``neighbours`` most similar training rows votes ``exp(cosine / temperature)`` for its class.

    Args:
        train: [N, F] features, floating point, of any norm.
        train_labels: [N] integers.
        test: [M, F] features.
        test_labels: [M] integers; a row whose class is not among the training labels counts as wrong.
        neighbours: k; if N is smaller, all N.
        temperature: positive.

    Raises:
        ValueError: shapes do not fit, or ``neighbours`` or ``temperature`` is not positive.
    """
    check_split(train, train_labels, test, test_labels)
    if neighbours < 1 or not temperature > 0:
        raise ValueError(f"neighbours is {neighbours} and temperature {temperature}; both must be greater than 0")
    cosines, places = nearest(test, [train], neighbours)
    numbered = torch.unique(torch.cat([train_labels, test_labels]), return_inverse=True)[1]
    own, voters = numbered[len(train_labels) :], numbered[: len(train_labels)][places]
    found = voted(cosines, voters, own, counts=[neighbours], temperature=temperature)
    return 100.0 * float(found[neighbours].correct().mean())
