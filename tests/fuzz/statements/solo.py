"""solo-learn's loss and head written out from the formulas, dense and slow: the oracle of its drop-in.

Legend: V crops, B images, K prototypes.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from tests.fuzz.statements.dino import PublishedDINOHead


class PublishedSoloHead(PublishedDINOHead):
    """The head of DINO under solo-learn's argument names and defaults."""

    def __init__(
        self,
        in_dim: int,
        num_prototypes: int,
        use_bn: bool = True,
        norm_last_layer: bool = True,
        num_layers: int = 3,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
    ) -> None:
        super().__init__(in_dim, num_prototypes, use_bn, norm_last_layer, num_layers, hidden_dim, bottleneck_dim)


class PublishedSoloLoss(nn.Module):
    """Cross-entropy of each student crop with each of two teacher crops but its own, the centre moved after use.

    Source: vturrisi/solo-learn solo/losses/dino.py.
    """

    center: Tensor

    def __init__(
        self,
        num_prototypes: int,
        warmup_teacher_temp: float,
        teacher_temp: float,
        warmup_teacher_temp_epochs: int,
        num_epochs: int,
        student_temp: float = 0.1,
        num_large_crops: int = 2,
        center_momentum: float = 0.9,
    ) -> None:
        super().__init__()
        self.epoch = 0
        self.student_temp, self.center_momentum, self.crops = student_temp, center_momentum, num_large_crops
        self.register_buffer("center", torch.zeros(1, num_prototypes))
        warm_up = np.linspace(warmup_teacher_temp, teacher_temp, warmup_teacher_temp_epochs)
        self.temperatures = [*warm_up, *[teacher_temp] * (num_epochs - warmup_teacher_temp_epochs)]

    def forward(self, student_output: Tensor, teacher_output: Tensor) -> Tensor:
        """[V * B, K] and [2 * B, K] raw logits to a [] loss, nats."""
        teacher = teacher_output.detach()
        q_2BK = ((teacher - self.center) / self.temperatures[self.epoch]).softmax(-1).unflatten(0, (2, -1))
        log_p_VBK = (student_output / self.student_temp).log_softmax(-1).unflatten(0, (self.crops, -1))
        losses_2V = -torch.einsum("gbk,vbk->gv", q_2BK, log_p_VBK) / q_2BK.shape[1]
        different = ~torch.eye(2, self.crops, dtype=torch.bool)
        self.center = self.center_momentum * self.center + (1 - self.center_momentum) * teacher.mean(0, keepdim=True)
        loss: Tensor = losses_2V[different].mean()
        return loss
