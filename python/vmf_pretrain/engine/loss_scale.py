"""The scale of an fp16 loss, which keeps small gradients above the smallest fp16 number.

torch's own GradScaler decides on each rank whether a step is skipped; here all ranks have agreed before. Nothing is read on
the host.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vmf_pretrain.engine.optim import local_tensors

START, GROWTH, BACKOFF, PATIENCE = 2.0**16, 2.0, 0.5, 2000  # GradScaler's
LEAST = 1.0  # at this scale, a gradient that is not finite is no matter of fp16's range
HALVINGS = int(math.log2(START / LEAST))


class LossScale(nn.Module):
    """Multiplies the loss, divides the gradients, and adapts: halved after a step that is skipped, doubled after 2,000 others.

    Args:
        active: whether the scale differs from 1 at all.
        device: of the loss.
    """

    scale: Tensor
    good_steps: Tensor

    def __init__(self, *, active: bool, device: torch.device) -> None:
        super().__init__()
        self.active = active
        self.register_buffer("scale", torch.full((), START if active else 1.0, device=device))
        self.register_buffer("good_steps", torch.zeros((), device=device))

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss to call backward on."""
        return loss * self.scale if self.active else loss

    @torch.no_grad()
    def unscale(self, gradients: Sequence[Tensor]) -> None:
        """Divide gradients, in place."""
        if self.active and gradients:
            torch._foreach_mul_(local_tensors(gradients), 1.0 / self.scale)

    @torch.no_grad()
    def update(self, skipped: Tensor) -> None:
        """Adapt to whether a step was skipped ([], 0 or 1)."""
        if not self.active:
            return
        bad = skipped > 0
        self.good_steps.add_(1).mul_((~bad).float())
        grow = self.good_steps >= PATIENCE
        factor = torch.where(bad, BACKOFF, torch.where(grow, GROWTH, 1.0))
        self.scale.mul_(factor).clamp_(min=LEAST)
        self.good_steps.mul_((~grow).float())
