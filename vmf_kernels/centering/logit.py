"""DINO's centre: the running mean of the teacher's raw logits.

Legend: R rows, K prototypes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vmf_kernels.arguments import temperature_tensor
from vmf_kernels.centering.running_mean import RunningMean
from vmf_kernels.prototypes import accumulation_dtype
from vmf_kernels.unstored.prototype_logits import PrototypeLogits, project


class LogitCenter(RunningMean):
    """DINO's centre: the running mean of the teacher's raw logits, subtracted before dividing by the temperature.

    The batch mean is ``W mean(x)``: no logits are computed, and ranks exchange D + 1 numbers instead of K.

    Arguments as ``RunningMean``; the backend is not used.

    Source: Caron et al., "Emerging properties in self-supervised vision transformers", ICCV 2021, equation 4.

    Example:
        >>> center = LogitCenter(3, momentum=0.5)
        >>> center.update(torch.tensor([[2.0, 0.0, 0.0], [0.0, 4.0, 0.0]]), temperature=0.04)  # two rows of teacher logits
        >>> center.center.tolist()
        [[0.5, 1.0, 0.0]]
    """

    def bias(self, temperature: float | Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """[K] ``-c / tau``, nats, in ``dtype``; None for that of the centre."""
        center = self._values.to(dtype or self.center.dtype)
        tau = temperature_tensor(temperature, "teacher_temperature", center.device)
        return -center / tau.to(center.dtype)

    @torch.no_grad()
    def _statistic(
        self, teacher: PrototypeLogits | Tensor, temperature: float | Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        flat = teacher.detach().flatten(0, -2)
        rows = flat if isinstance(flat, Tensor) else flat.features
        summed, weight = self._weighed(rows.sum(dim=0, dtype=accumulation_dtype(rows.dtype)), rows.shape[0])
        packed = self._row_ranks.sum(torch.cat([summed, summed.new_full((1,), float(weight))]))
        total = packed[:-1] if isinstance(flat, Tensor) else project(flat.prototypes, packed[:-1])
        return total, packed[-1]

    def _weighed(self, summed: Tensor, rows: int) -> tuple[Tensor, int]:
        """This rank's contribution to the sum over all ranks, and to its divisor: here every row has the same weight."""
        return summed, rows


class RankMeanCenter(LogitCenter):
    """The running mean of the ranks' means: every rank with rows has the same weight (DINOv2, lightly).

    Arguments as ``LogitCenter``, in which every row has the same weight; the two agree if all ranks have equally many rows.

    Source: facebookresearch/dinov2 dinov2/loss/ibot_patch_loss.py; lightly-ai/lightly lightly/models/modules/center.py.
    """

    def _weighed(self, summed: Tensor, rows: int) -> tuple[Tensor, int]:
        weight = min(rows, 1)
        return summed * (weight / max(rows, 1)), weight
