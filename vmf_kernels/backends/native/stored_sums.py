"""Log-sums of one batch with several biases and offsets, from logits that are stored once.

Legend: R rows, K prototypes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vmf_kernels.backends.base_two import LN_2, LOG2_E
from vmf_kernels.backends.contract import RowInputs
from vmf_kernels.backends.native import module
from vmf_kernels.backends.native.chunks import WORKSPACE_BYTES, padded
from vmf_kernels.backends.native.scores import Logits, native_keys, score


class NativeStoredSums:
    """The sums of ``row_log_sum_exp`` and ``column_log_sum_exp`` over rows whose logits fit the workspace.

    Args:
        inputs: rows and prototypes; all prototypes are on this rank.
        products: dtype of the products.
    """

    def __init__(self, inputs: RowInputs, products: torch.dtype) -> None:
        keys = native_keys(inputs.prototypes, inputs.temperature, inputs.bias, products)
        x_RD = module.fp32(inputs.features)
        self._rows, self._prototypes, self._products = len(x_RD), keys.prototypes, products
        self._logits = Logits.empty(keys.prototypes, padded(len(x_RD)))
        score(x_RD, keys, products, self._logits)

    def over_prototypes(self, extra_K: Tensor | None) -> Tensor:
        """[R] nats ``log sum_k exp(l_rk + extra_k)``."""
        bias = None if extra_K is None else module.fp32(extra_K.reshape(-1)) * LOG2_E
        result = module.new(self._rows)
        self._run("sum_over_prototypes", bias, result)
        return result * LN_2

    def over_rows(self, offset_R: Tensor) -> Tensor:
        """[K] nats ``log sum_r exp(l_rk - offset_r)``."""
        offset, result = module.fp32(offset_R) * LOG2_E, module.new(self._prototypes)
        self._run("sum_over_rows", offset, result)
        return result * LN_2

    def _run(self, name: str, argument: Tensor | None, result: Tensor) -> None:
        native, run = module.built(), module.execution(self._products)
        stored = native.StoredLogits(logits=self._logits, prototypes=self._prototypes, rows=self._rows)
        memory, start = module.workspace(native.stored_workspace(stored, run))
        getattr(native, name)(stored, argument, result, run, start)
        del memory


def fits(rows: int, prototypes: int) -> bool:
    """Whether the logits of these rows are few enough to be stored; there must be some."""
    return 0 < 4 * padded(rows) * prototypes <= WORKSPACE_BYTES
