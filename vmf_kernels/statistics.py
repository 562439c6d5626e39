"""What a batch says about the health of a head: entropies, divergence, usage, mutual information."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class AssignmentStatistics:
    """Detached by-products of the loss, averaged over the pairs with their weights; entropies in nats.

    ``loss = (teacher_entropy + kl) * sum of pair weights``. A healthy loss may rise; ``mutual_information`` near 0 is a
    dead head, whatever the loss says: all rows go to one prototype, or every row to all of them.
    """

    teacher_entropy: Tensor  # [] mean H(q)
    student_entropy: Tensor  # [] mean H(p)
    kl: Tensor  # [] mean KL(q || p)
    usage: Tensor  # [K] mean teacher probability of each prototype

    @classmethod
    def of_op(cls, summary: Tensor, usage: Tensor) -> AssignmentStatistics:
        """From an op's [3] summary (teacher entropy, student entropy, KL) and [K] usage."""
        teacher_entropy, student_entropy, kl = summary.detach().unbind()
        return cls(teacher_entropy, student_entropy, kl, usage.detach())

    @property
    def mutual_information(self) -> Tensor:
        """[] mutual information between images and prototypes, H(mean q) - mean H(q)."""
        return entropy(self.usage) - self.teacher_entropy


def entropy(probabilities: Tensor) -> Tensor:
    """[] Shannon entropy of ``probabilities`` [K], nats; 0 log 0 = 0."""
    return -torch.xlogy(probabilities, probabilities).sum()
