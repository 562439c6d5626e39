"""Batch normalisation over the rows of all ranks; torch's own SyncBatchNorm needs a GPU.

Legend: R rows of this rank, F features.
"""

from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from vmf_pretrain.networks import ranks


class GlobalBatchNorm(nn.BatchNorm1d):
    """``nn.BatchNorm1d`` whose statistics in training are those of all ranks' rows; every rank must call it equally often."""

    def forward(self, rows: Tensor) -> Tensor:
        """[R, F] to [R, F]; R may differ between ranks but is at least 1."""
        if not self.training or not ranks.grouped():
            return super().forward(rows)
        wide = rows if rows.dtype == torch.float64 else rows.float()
        count = ranks.summed(wide.new_full((), float(rows.shape[0])))
        mean = _summed(wide.sum(0)) / count
        variance = _summed((wide - mean).square().sum(0)) / count
        if self.track_running_stats and self.running_mean is not None and self.running_var is not None:
            self._track(mean.detach(), variance.detach() * count / (count - 1))
        scaled = (wide - mean) * (variance + self.eps).rsqrt()
        if self.affine:
            scaled = scaled * self.weight + self.bias
        return scaled.to(rows.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, unbiased: Tensor) -> None:
        assert self.num_batches_tracked is not None
        assert self.running_mean is not None
        assert self.running_var is not None
        self.num_batches_tracked.add_(1)
        share = self.momentum if self.momentum is not None else 1.0 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), share)


def synchronise(module: nn.Module) -> None:
    """Let every ``BatchNorm1d`` in a module normalise over all ranks; parameters, buffers and names stay."""
    for part in module.modules():
        if type(part) is nn.BatchNorm1d:
            part.__class__ = GlobalBatchNorm


class _Sum(torch.autograd.Function):
    """Sum over ranks; its gradient is summed over ranks as well, since every rank's loss depends on it."""

    @staticmethod
    def forward(context: Any, tensor: Tensor) -> Tensor:
        return ranks.summed(tensor)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        return ranks.summed(gradient)


def _summed(tensor: Tensor) -> Tensor:
    total: Tensor = _Sum.apply(tensor)  # type: ignore[no-untyped-call]
    return total
