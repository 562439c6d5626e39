"""Triton backend: the streaming operator on NVIDIA GPUs from compute capability 8.0 up.

The kernels are imported at first use, so the library works without Triton.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vmf_kernels.backends.contract import LossInputs, LossOutputs, RowInputs
from vmf_kernels.backends.triton.launch import target_of, unsupported_device
from vmf_kernels.backends.triton.tiles import MAX_DIM, PASSES, has_tile, precision_of

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class TritonBackend:
    """``contract.Backend`` on fused kernels: no logits in memory, no atomics, no host synchronisation."""

    def unsupported(self, rows: Tensor, weight: Tensor) -> str | None:
        """Why it cannot run, or None: no kernel for the device, the dtype or D."""
        if rows.dtype not in DTYPES:
            return f"it computes in bfloat16, float16 or float32, but the features are {rows.dtype}"
        if weight.shape[1] > MAX_DIM:
            return f"the embedding dim is {weight.shape[1]}; it goes up to {MAX_DIM}"
        reason = unsupported_device(rows.device)
        if reason is not None:
            return reason
        target, precision = target_of(rows.device), precision_of(rows.dtype)
        if not all(has_tile(name, target, precision, weight.shape[1]) for name in PASSES):
            part = f"compute capability {target.arch / 10:.1f}"
            return f"no tile of {precision} products at embedding dim {weight.shape[1]} fits {part}"
        return None

    def cross_entropy(self, inputs: LossInputs) -> LossOutputs:
        """See ``contract.Backend``."""
        from vmf_kernels.backends.triton import operator

        return operator.cross_entropy(inputs, self._kernels())

    def usage(self, inputs: RowInputs) -> Tensor:
        """See ``contract.Backend``."""
        from vmf_kernels.backends.triton import operator

        return operator.usage(inputs, self._kernels())

    def row_log_sum_exp(self, inputs: RowInputs) -> Tensor:
        """See ``contract.Backend``."""
        from vmf_kernels.backends.triton import operator

        return operator.row_log_sum_exp(inputs, self._kernels())

    def column_log_sum_exp(self, inputs: RowInputs, offset: Tensor) -> Tensor:
        """See ``contract.Backend``."""
        from vmf_kernels.backends.triton import operator

        return operator.column_log_sum_exp(inputs, offset, self._kernels())

    def _kernels(self) -> Any:
        """``operator.Kernels``."""
        from vmf_kernels.backends.triton import operator

        return operator.TRITON
