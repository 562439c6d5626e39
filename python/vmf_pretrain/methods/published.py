"""The loss as the published trainers compute it: stored logits, one softmax a pair. For comparison with ours, and slow.

Legend: S / T student / teacher rows, view-major, B images, K prototypes.
"""

import torch
from torch import Tensor, nn

from vmf_kernels import AssignmentStatistics, DINOLoss, PrototypeLogits
from vmf_pretrain.networks import ranks

TEACHER_VIEWS = 2


class PublishedLoss(nn.Module):
    """Takes the place of a ``DINOLoss``: same schedule, centring and state dict, computed from stored logits.

    Args:
        ours: the loss that it stands for; its settings are read, its code is not run.

    Source: Caron et al., ICCV 2021, algorithm 1; for DINO-vMF, Govindarajan et al., ICLR 2023, section 4.
    """

    center: Tensor

    def __init__(self, ours: DINOLoss) -> None:
        super().__init__()
        self.teacher_temp_schedule = ours.teacher_temp_schedule
        self.student_temp, self.views, self.momentum = ours.student_temp, ours.ncrops, ours.center_momentum
        self.over_probabilities = ours.centering.over_probabilities
        self.register_buffer("center", ours.center.detach().clone())
        self.statistics: AssignmentStatistics | None = None

    @property
    def centering(self) -> "PublishedLoss":
        """What has the centre's bias."""
        return self

    def bias(self, temperature: float) -> Tensor:
        """[K] nats that the centre adds to logits over temperature."""
        center = self.center[0]
        return -center if self.over_probabilities else -center / temperature

    def forward(self, student: PrototypeLogits, teacher: PrototypeLogits, epoch: int) -> Tensor:
        """[] mean over pairs of different views of ``-sum_k q_k log p_k``, nats; moves the centre."""
        temperature = float(self.teacher_temp_schedule[epoch])
        with torch.no_grad():
            raw_TK = teacher.materialize()
            scaled_TK = _over(teacher, raw_TK, temperature)
            batch = self._batch_center(raw_TK, scaled_TK)
            if bool(self.center.isnan().all()):
                self.center.copy_(batch)
            q_TK = (scaled_TK + self.bias(temperature)).softmax(dim=-1)
        p_SK = _over(student, student.materialize(), self.student_temp)
        targets, predictions = q_TK.chunk(TEACHER_VIEWS), p_SK.chunk(self.views)
        pairs = [
            (q, p, -(q * p.log_softmax(dim=-1)).sum(dim=-1).mean())
            for one, q in enumerate(targets)
            for other, p in enumerate(predictions)
            if one != other
        ]
        loss = torch.stack([loss for _, _, loss in pairs]).mean()
        with torch.no_grad():
            self._observe(loss, [(q, p) for q, p, _ in pairs])
            self.center.copy_(self.center * self.momentum + batch * (1 - self.momentum))
        return loss

    def _batch_center(self, raw_TK: Tensor, scaled_TK: Tensor) -> Tensor:
        """[1, K] of all ranks' rows: the mean of the raw logits, or the log of the mean probability."""
        if not self.over_probabilities:
            return ranks.averaged(raw_TK.mean(dim=0, keepdim=True)).to(self.center.dtype)
        return ranks.averaged(scaled_TK.softmax(dim=-1).mean(dim=0, keepdim=True)).log().to(self.center.dtype)

    def _observe(self, loss: Tensor, pairs: list[tuple[Tensor, Tensor]]) -> None:
        targets = torch.cat([q for q, _ in pairs])
        student = torch.cat([p for _, p in pairs]).softmax(dim=-1)
        entropy = -torch.xlogy(targets, targets).sum(-1).mean()
        self.statistics = AssignmentStatistics(
            teacher_entropy=entropy,
            student_entropy=-torch.xlogy(student, student).sum(-1).mean(),
            kl=loss.detach() - entropy,
            usage=targets.mean(dim=0),
        )


def _over(logits: PrototypeLogits, raw: Tensor, temperature: float) -> Tensor:
    """Logits over temperature, with the vMF log-normaliser if the prototypes have one."""
    scaled = raw / temperature
    prototypes = logits.prototypes
    return scaled + prototypes.log_normalizer(temperature) if prototypes.has_normalizer else scaled
