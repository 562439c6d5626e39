"""What a classifier predicts, from its scores.

Legend: N training rows, M test rows, C classes that occur in training.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vmf_pretrain.config.errors import PretrainError

ROWS_AT_ONCE = 4096  # of M


@dataclass(frozen=True, eq=False)
class Known:
    """The classes that occur in training, numbered without gaps.

    Attributes:
        classes: [C] int64 their labels, ascending.
        labels: [N] int64 the training labels as places among them.
    """

    classes: Tensor
    labels: Tensor

    @classmethod
    def of(cls, labels: Tensor) -> "Known":
        """Those of training labels [N].

        Raises:
            PretrainError: there is only one class.
        """
        classes, numbered = torch.unique(labels, return_inverse=True)
        if len(classes) < 2:
            raise PretrainError(f"{len(labels)} training images are of 1 class; expected at least 2 classes.")
        return cls(classes, numbered)

    def __len__(self) -> int:
        return len(self.classes)


@dataclass(frozen=True, eq=False)
class Predicted:
    """What a classifier says of each test row.

    Attributes:
        label: [M] int64 of the largest score; of equal ones the smallest label.
        rank: [M] int64 how many classes score more than the row's own, or as much and have a smaller label; NaN counts as
            more.
        known: [M] bool whether the row's own class occurs in training.
    """

    label: Tensor
    rank: Tensor
    known: Tensor

    def correct(self, top: int = 1) -> Tensor:
        """[M] float64: 1 where the row's class is among the ``top`` with the largest scores, else 0."""
        return ((self.rank < top) & self.known).double()


def predicted(scores: Callable[[Tensor], Tensor], rows: Tensor, labels: Tensor, known: Known) -> Predicted:
    """The predictions for test rows.

    Args:
        scores: from rows [m, F] to [m, C].
        rows: [M, F].
        labels: [M] int64; one that is not among ``known`` counts as wrong.
        known: the classes.
    """
    places = torch.searchsorted(known.classes, labels).clamp(max=len(known) - 1)
    found, ranks = [], []
    for part, own in zip(torch.split(rows, ROWS_AT_ONCE), torch.split(places, ROWS_AT_ONCE), strict=True):
        some = scores(part)
        mine = some.gather(1, own[:, None])
        smaller = torch.arange(len(known), device=some.device) < own[:, None]
        above = ~(some <= mine)  # so that a head that has diverged is wrong: NaN is no number's equal or less
        ranks.append((above | ((some == mine) & smaller)).sum(dim=1))
        found.append(known.classes[some.argmax(dim=1)])
    return Predicted(torch.cat(found), torch.cat(ranks), known.classes[places] == labels)
