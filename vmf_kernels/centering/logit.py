"""DINO's centre: the running mean of the teacher's raw logits.

Legend: R rows, K prototypes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vmf_kernels.arguments import temperature_tensor
from vmf_kernels.centering.running_mean import Center
from vmf_kernels.prototypes import accumulation_dtype
from vmf_kernels.unstored.prototype_logits import PrototypeLogits, project


class LogitCenter(Center):
    """DINO's centre: the running mean of the teacher's raw logits, subtracted before dividing by the temperature.

    The batch mean is ``W mean(x)``: no logits are formed and ranks exchange D + 1 numbers instead of K.

    Arguments as ``Center``; the backend is not needed.

    Source: Caron et al., "Emerging properties in self-supervised vision transformers", ICCV 2021, equation 4.
    """

    def bias(self, temperature: float | Tensor) -> Tensor:
        """[K] ``-c / tau``, nats."""
        tau = temperature_tensor(temperature, "teacher_temperature", self.center.device)
        return -self.center[0] / tau.to(self.center.dtype)

    @torch.no_grad()
    def _statistic(
        self, teacher: PrototypeLogits | Tensor, temperature: float | Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        rows = teacher.detach().flatten(0, -2)
        if isinstance(rows, Tensor):
            total = self._row_ranks.sum(rows.sum(dim=0, dtype=accumulation_dtype(rows.dtype)))
            return total, self._row_ranks.sum(total.new_full((), float(rows.shape[0])))
        features = rows.features
        summed = features.sum(dim=0, dtype=accumulation_dtype(features.dtype))
        packed = self._row_ranks.sum(torch.cat([summed, summed.new_full((1,), float(features.shape[0]))]))
        return project(rows.prototypes, packed[:-1]), packed[-1]

    def _reduce(self, total: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        return total, rows  # already over all ranks, in D numbers

    def _merge(self, one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return one[0] + other[0], one[1] + other[1]

    def _mean(self, total: Tensor, rows: Tensor) -> Tensor:
        return (total / rows).to(self.center.dtype)
