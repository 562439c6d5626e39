"""Statistics of a batch that show whether a head has collapsed: entropies, divergence, usage, mutual information."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class AssignmentStatistics:
    """Detached by-products of the loss, averaged over the pairs of this rank with their weights; entropies in nats.

    ``loss = (teacher_entropy + kl) * sum of pair weights``. A healthy loss may rise. If ``mutual_information`` is near 0, the
    head has collapsed, whatever the loss says: all rows go to one prototype, or every row goes to all of them.

    Example:
        >>> prototypes = linear_prototypes(torch.eye(4))
        >>> rows = torch.eye(4)  # each at a prototype of its own
        >>> statistics = prototype_cross_entropy(rows, prototypes, rows, prototypes, torch.ones(1, 1)).statistics
        >>> statistics.usage.tolist(), round(statistics.mutual_information.item(), 2)  # all used alike; log 4 nats
        ([0.25, 0.25, 0.25, 0.25], 1.39)
    """

    teacher_entropy: Tensor  # [] mean H(q)
    student_entropy: Tensor  # [] mean H(p)
    kl: Tensor  # [] mean KL(q || p)
    usage: Tensor  # [K] mean teacher probability of each prototype

    @classmethod
    def of_op(cls, summary: Tensor, usage: Tensor) -> AssignmentStatistics:
        """From an op's [3] summary (teacher entropy, student entropy, KL) and [K] usage."""
        teacher_entropy, student_entropy, kl = summary.unbind()  # an op's by-products have no gradient
        return cls(teacher_entropy, student_entropy, kl, usage)

    @property
    def mutual_information(self) -> Tensor:
        """[] mutual information between images and prototypes, H(mean q) - mean H(q)."""
        return entropy(self.usage) - self.teacher_entropy


@dataclass(frozen=True, eq=False)
class SharedStatistics(AssignmentStatistics):
    """The same if prototypes are split over ranks: ``usage`` is that of this rank's prototypes."""

    usage_entropy: Tensor  # [] H(mean q) over the prototypes of all ranks

    @property
    def mutual_information(self) -> Tensor:
        """[] mutual information between images and the prototypes of all ranks."""
        return self.usage_entropy - self.teacher_entropy


def weighted_summary(loss: Tensor, teacher_entropy: Tensor, student_entropy: Tensor, total: Tensor) -> Tensor:
    """[3] means (teacher entropy, student entropy, KL) from weighted sums [] over pairs whose weights sum to ``total``."""
    total = or_one(total)
    teacher_mean = teacher_entropy / total
    return torch.stack([teacher_mean, student_entropy / total, loss / total - teacher_mean])


def or_one(total: Tensor) -> Tensor:
    """``total``, or 1 if it is 0: then no pair has weight, and every weighted sum is 0 as well."""
    return torch.where(total == 0, torch.ones_like(total), total)


def entropy(probabilities: Tensor) -> Tensor:
    """[] Shannon entropy of ``probabilities`` [K], nats; 0 log 0 = 0."""
    return -torch.xlogy(probabilities, probabilities).sum()
