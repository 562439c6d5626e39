"""Many linear heads trained at once on frozen features, as DINOv2 has them.

Legend: N rows, B of a batch, M test rows, F features, C classes, R learning rates.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

MOMENTUM = 0.9
SPREAD = 0.01  # standard deviation of the initial weights
SCALED_TO = 256  # images of a batch at which a rate is what it says
SEED = 0

Key = TypeVar("Key")


@dataclass(frozen=True)
class Schedule:
    """How heads are trained.

    Attributes:
        rates: R learning rates at SCALED_TO images a batch; they fall to 0 along a cosine.
        iterations: steps of SGD.
        batch_size: rows of a step; at most N are taken.
    """

    rates: Sequence[float]
    iterations: int
    batch_size: int


@dataclass(eq=False)
class Heads:
    """R linear heads on the same features.

    Attributes:
        weights: [R, C, F].
        biases: [R, C].
    """

    weights: Tensor
    biases: Tensor

    def scores(self, rows: Tensor, rate: int) -> Tensor:
        """[M, C] logits of rows [M, F], of one head."""
        return torch.addmm(self.biases[rate], rows.to(self.weights), self.weights[rate].T)


def trained(
    shown: Sequence[Mapping[Key, Tensor]],
    labels: Tensor,
    classes: int,
    schedule: Schedule,
    *,
    places: Tensor | None = None,
) -> dict[Key, Heads]:
    """Heads for each kind of features and each rate; all see the same batches.

    SGD with momentum, no weight decay, on the mean cross-entropy; an epoch takes each row once, and a batch may end in the
    next one. Deterministic.

    Args:
        shown: the features [N, F] by kind, of one view of the images or several; each batch is of a view drawn for it. All
            are on the device that computes, in the dtype that it computes in.
        labels: [N] int64 in [0, classes).
        classes: C.
        schedule: how.
        places: [n] int64 of the rows that are trained on, which spares a copy of them; None takes all.
    """
    places = torch.arange(len(labels), device=labels.device) if places is None else places
    numbers = torch.Generator().manual_seed(SEED)
    heads = {kind: _start(rows, len(schedule.rates), classes, numbers) for kind, rows in shown[0].items()}
    speeds = {kind: (torch.zeros_like(some.weights), torch.zeros_like(some.biases)) for kind, some in heads.items()}
    size = min(schedule.batch_size, len(places))
    rates = torch.tensor(schedule.rates, dtype=torch.float64) * size / SCALED_TO
    order = torch.empty(0, dtype=torch.int64)
    for step in range(schedule.iterations):
        if len(order) < size:
            order = torch.cat([order, torch.randperm(len(places), generator=numbers)])
        chosen, order = places[order[:size].to(places.device)], order[size:]
        view = shown[int(torch.randint(len(shown), (1,), generator=numbers))]
        now = rates * (1 + math.cos(math.pi * step / schedule.iterations)) / 2
        for kind, some in heads.items():
            _step(some, speeds[kind], view[kind][chosen], labels[chosen], now)
    return heads


def _start(rows: Tensor, rates: int, classes: int, numbers: torch.Generator) -> Heads:
    """The same initial weights for every rate."""
    first = SPREAD * torch.randn(classes, rows.shape[1], generator=numbers)
    return Heads(first.to(rows).repeat(rates, 1, 1), rows.new_zeros(rates, classes))


def _step(heads: Heads, speeds: tuple[Tensor, Tensor], rows: Tensor, labels: Tensor, rates: Tensor) -> None:
    """One step of SGD of all heads on a batch [B, F], in place; two products for all R."""
    count, classes, dim = heads.weights.shape
    logits = torch.addmm(heads.biases.flatten(), rows, heads.weights.view(-1, dim).T)
    residuals = logits.view(-1, count, classes).softmax(dim=-1)  # [B, R, C]
    own = labels[:, None, None].expand(-1, count, 1)
    residuals.scatter_add_(2, own, torch.full_like(own, -1, dtype=residuals.dtype))
    residuals /= len(rows)
    gradients = (residuals.flatten(1).T @ rows).view(count, classes, dim), residuals.sum(dim=0)
    pace = rates.to(rows)
    for speed, gradient, value in zip(speeds, gradients, (heads.weights, heads.biases), strict=True):
        speed.mul_(MOMENTUM).add_(gradient)
        value.sub_(speed * pace.view(-1, *[1] * (value.ndim - 1)))
