"""Log-sum-exp of a network's logits over temperature, over the prototypes or over the rows, for stored or unstored logits.

Legend: R rows, K prototypes (of this rank, if they are split over ranks).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from vmf_kernels.arguments import check_bias, temperature_tensor
from vmf_kernels.backends.contract import StoredSums
from vmf_kernels.backends.prepared import drop_prepared, keep_prepared
from vmf_kernels.ops.assignments import column_log_sum_exp, row_log_sum_exp, stored_sums
from vmf_kernels.prototypes import accumulation_dtype
from vmf_kernels.ranks import log_sum_exp_over_ranks
from vmf_kernels.unstored.prototype_logits import PrototypeLogits

ROWS_AT_ONCE = 64  # of stored logits: 16 MiB of fp32 at K = 65,536


@dataclass(frozen=True, eq=False)
class LogSums:
    """Sums over ``l = logits / temperature + bias``, detached. Inside ``with``, prototypes are prepared once for all sums.

    Args:
        logits: [R, K] raw, detached, not divided by the temperature; R may be 0.
        temperature: positive.
        bias: [K] nats that stored logits lack (the vMF log-normaliser), or None; must be None for unstored logits.
        backend: of the passes over unstored logits, see ``choose_backend``. Stored logits are summed in plain torch.
        prototype_group: ranks over which the prototypes are split, or None.

    Raises:
        ValueError: the bias does not have K elements, or comes with unstored logits.
    """

    logits: PrototypeLogits | Tensor
    temperature: float | Tensor
    bias: Tensor | None = None
    backend: str = "auto"
    prototype_group: ProcessGroup | None = None
    kept: StoredSums | None = field(default=None, init=False)  # inside ``with``, where a backend has them

    def __post_init__(self) -> None:
        check_bias(self.bias, self.logits.shape[-1], "bias")
        if isinstance(self.logits, PrototypeLogits) and self.bias is not None:
            raise ValueError("bias is given for PrototypeLogits, whose prototypes already include it; expected None")

    def __enter__(self) -> LogSums:
        """Until exit, prototypes are prepared once for all sums, or products formed once; nobody may change them."""
        if isinstance(self.logits, PrototypeLogits):
            keep_prepared(self.logits.prototypes)
            options: Any = {"backend": self.backend, "prototype_group": self.prototype_group}
            kept = stored_sums(self.logits.features, self.logits.prototypes, self.temperature, **options)
            object.__setattr__(self, "kept", kept)
        return self

    def __exit__(self, *error: object) -> None:
        if isinstance(self.logits, PrototypeLogits):
            drop_prepared(self.logits.prototypes)
            object.__setattr__(self, "kept", None)

    def over_prototypes(self, extra: Tensor | None = None) -> Tensor:
        """[R] ``log sum_k exp(l_rk + extra_k)``, over the prototypes of all ranks of the group."""
        if self.kept is not None:
            return self.kept.over_prototypes(extra)
        if isinstance(self.logits, PrototypeLogits):
            return row_log_sum_exp(
                self.logits.features,
                self.logits.prototypes,
                self.temperature,
                extra,
                backend=self.backend,
                prototype_group=self.prototype_group,
            )
        sums = torch.cat([(rows if extra is None else rows + extra).logsumexp(dim=1) for rows in self._stored()])
        return sums if self.prototype_group is None else log_sum_exp_over_ranks(sums, self.prototype_group)

    def over_rows(self, offset: Tensor) -> Tensor:
        """[K] ``log sum_r exp(l_rk - offset_r)`` over this rank's rows; -inf without rows."""
        if self.kept is not None:
            return self.kept.over_rows(offset)
        if isinstance(self.logits, PrototypeLogits):
            features, prototypes = self.logits.features, self.logits.prototypes
            return column_log_sum_exp(features, prototypes, self.temperature, offset, backend=self.backend)
        total = offset.new_full((self.logits.shape[1],), -torch.inf)
        for rows, offsets in zip(self._stored(), torch.split(offset, ROWS_AT_ONCE), strict=True):
            total = torch.logaddexp(total, (rows - offsets[:, None]).logsumexp(dim=0))
        return total

    def new_offsets(self) -> Tensor:
        """[R] zeros in the dtype of the sums."""
        shape, device = (self.logits.shape[0],), self.logits.device
        return torch.zeros(shape, dtype=accumulation_dtype(self.logits.dtype), device=device)

    def _stored(self) -> Iterator[Tensor]:
        """Stored logits over temperature, plus the bias, a few rows at a time."""
        assert isinstance(self.logits, Tensor)
        dtype = accumulation_dtype(self.logits.dtype)
        tau = temperature_tensor(self.temperature, "teacher_temperature", self.logits.device).to(dtype)
        for rows in torch.split(self.logits.detach(), ROWS_AT_ONCE):
            yield rows.to(dtype) / tau if self.bias is None else rows.to(dtype) / tau + self.bias
