"""lightly's losses written out from their formulas, dense and slow: the oracle of its drop-in.

The teacher gets no gradient here, unlike there. Temperatures and weights of images are fp32, whatever the logits are.

Legend: G / V teacher / student views, B images, M masked patches, K prototypes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vmf_bench.published import mean_over_pairs


class PublishedLightlyLoss(nn.Module):
    """Mean cross-entropy of each student view with each teacher view but its own; the centre moves after use.

    Source: lightly-ai/lightly lightly/loss/dino_loss.py.
    """

    center: Tensor

    def __init__(
        self,
        output_dim: int,
        warmup_teacher_temp: float,
        teacher_temp: float,
        warmup_teacher_temp_epochs: int,
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
    ) -> None:
        super().__init__()
        self.student_temp, self.center_momentum, self.teacher_temp = student_temp, center_momentum, teacher_temp
        self.register_buffer("center", torch.zeros(1, 1, output_dim))
        self.warm_up = torch.linspace(warmup_teacher_temp, teacher_temp, warmup_teacher_temp_epochs).tolist()

    def forward(self, teacher_out: list[Tensor], student_out: list[Tensor], epoch: int) -> Tensor:
        """G and V views [B, K] of raw logits to a [] loss, nats."""
        tau = self.warm_up[epoch] if epoch < len(self.warm_up) else rounded(self.teacher_temp)
        teacher_GBK, views = torch.stack(teacher_out).detach(), len(student_out)
        targets = ((teacher_GBK - self.center) / tau).softmax(dim=-1)
        loss = mean_over_pairs(torch.cat(student_out) / self.student_temp, targets.flatten(0, 1), views)
        batch_center = teacher_GBK.mean(dim=(0, 1), keepdim=True)
        self.center = self.center * self.center_momentum + batch_center * (1 - self.center_momentum)
        return loss


class PublishedLightlyPatchLoss(nn.Module):
    """Cross-entropy of masked patches, meaned over those of each image, then over images; the centre moves after use.

    Source: lightly-ai/lightly lightly/loss/ibot_loss.py.
    """

    center: Tensor

    def __init__(self, output_dim: int, student_temp: float = 0.1, center_momentum: float = 0.9) -> None:
        super().__init__()
        self.student_temp, self.center_momentum = student_temp, center_momentum
        self.register_buffer("center", torch.zeros(1, output_dim))

    def forward(self, teacher_out: Tensor, student_out: Tensor, mask: Tensor, teacher_temp: float) -> Tensor:
        """[M, K] raw logits each, [B, H, W] with M True entries, to a [] loss, nats."""
        teacher = teacher_out.detach()
        q_MK = ((teacher - self.center) / rounded(teacher_temp)).softmax(dim=-1)
        losses_M = -(q_MK * (student_out / self.student_temp).log_softmax(dim=-1)).sum(dim=-1)
        mask = mask.flatten(1)
        weights_B = 1 / mask.sum(dim=1).float()  # fp32, as there
        batch_center = teacher.mean(dim=0, keepdim=True)
        self.center = self.center * self.center_momentum + batch_center * (1 - self.center_momentum)
        loss: Tensor = (losses_M * weights_B[mask.nonzero()[:, 0]]).sum() / len(mask)
        return loss


def rounded(temperature: float) -> float:
    """To fp32, as lightly has it."""
    return float(torch.tensor(temperature, dtype=torch.float32))
