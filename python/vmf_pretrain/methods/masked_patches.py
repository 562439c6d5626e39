"""Numbers of the masked patches of a batch.

Legend: M masked patches of this rank, K prototypes.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vmf_kernels import AssignmentStatistics, PrototypeLogits
from vmf_pretrain.networks import ranks

ROWS_AT_ONCE = 64  # of stored logits: 16 MiB of fp32 at K = 65,536


@dataclass(frozen=True, eq=False)
class MaskedPatches:
    """The masked patches of a batch, as teacher and student assign them.

    Attributes:
        statistics: of the loss, over this rank.
        share: [] share of this rank's views that have masked patches, the weight of ``statistics``.
        taught: [M, K] logits of the teacher.
        learnt: [M, K] logits of the student, which did not see them.
        centering: the patches' centring rule.
        teacher_temperature: of the patches.
        student_temperature: of the patches.
    """

    statistics: AssignmentStatistics
    share: Tensor
    taught: PrototypeLogits
    learnt: PrototypeLogits
    centering: Any
    teacher_temperature: float
    student_temperature: float

    @torch.no_grad()
    def numbers(self) -> dict[str, Tensor]:
        """[] entropies, divergence and mutual information, nats, prototypes in use, and accuracy, over all ranks.

        Every rank must call it. ``patch_prototypes_in_use`` is exp of the entropy of the mean assignment. Without masked
        patches it is 1, and the others are 0.
        """
        found = self.statistics
        entropies = (self._averaged(value) for value in (found.teacher_entropy, found.student_entropy, found.kl))
        teacher_entropy, student_entropy, kl = entropies
        usage = self._averaged(found.usage)
        usage_entropy = -torch.xlogy(usage, usage).sum()
        return {
            "patch_teacher_entropy": teacher_entropy,
            "patch_student_entropy": student_entropy,
            "patch_kl": kl,
            "patch_mutual_information": usage_entropy - teacher_entropy,
            "patch_prototypes_in_use": usage_entropy.exp(),
            "masked_patch_accuracy": self._accuracy(),
        }

    def _averaged(self, value: Tensor) -> Tensor:
        """Mean over all ranks' views that have masked patches; 0 if there are none."""
        weight = self.share.to(value)
        total = ranks.summed(value * weight)
        return total / ranks.summed(weight).clamp(min=torch.finfo(value.dtype).tiny)

    def _accuracy(self) -> Tensor:
        """Share of masked patches whose most probable prototype is the same for teacher, with its centre, and student.

        The prototypes are those that the step has left: they move after the loss and before its numbers are read.
        """
        bias = self.centering.target_bias(self.taught, self.teacher_temperature)
        taught = _most_probable(self.taught, self.teacher_temperature, bias)
        learnt = _most_probable(self.learnt, self.student_temperature, torch.zeros_like(bias))
        same = (taught == learnt).double()
        agreed, count = ranks.summed(torch.stack([same.sum(), same.new_tensor(float(len(same)))]))
        accuracy: Tensor = agreed / count.clamp(min=1.0)
        return accuracy


def _most_probable(logits: PrototypeLogits, temperature: float, bias: Tensor) -> Tensor:
    """[M] prototypes."""
    prototypes = logits.prototypes
    if prototypes.has_normalizer:
        bias = bias + prototypes.log_normalizer(temperature)
    rows = logits.split(ROWS_AT_ONCE)
    found = [(part.materialize() / temperature + bias).argmax(dim=-1) for part in rows]
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.long, device=bias.device)
