"""The running mean of a teacher's batches, the base of both centres.

``accumulate`` records the teacher's batch (once per micro-batch), and ``apply_pending`` moves the centre (once per optimiser
step); ``update`` does both. If a process group exists, statistics are over all ranks. A batch with a non-finite value is
ignored, even if other batches are pending. Nothing waits for the device.

Legend: R rows, K prototypes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from vmf_kernels.centering.rank_rule import RankRule
from vmf_kernels.ranks import all_finite
from vmf_kernels.unstored.prototype_logits import PrototypeLogits, outside_transforms

STARTS = ("zero", "first_batch")


def check_momentum(value: float, name: str) -> None:
    """Raise ValueError unless this is a valid momentum of a running mean."""
    if not 0 <= value < 1:
        raise ValueError(f"{name} is {value}; expected a number in [0, 1)")


class RunningMean(RankRule):
    """A centring rule whose bias depends on a running mean of the batches: the buffer, its start, and its update.

    ``module.center = tensor`` copies the tensor's K values and its device; shape and dtype stay. The buffer stays fp32 (fp64
    after ``double()``) under ``half()``, ``bfloat16()`` and ``to()``.

    If a loss was built on the meta device, each centre needs ``reset_parameters()`` after ``to_empty()``, or a checkpoint.

    Args:
        num_prototypes: K; of this rank, if the prototypes are split over ranks.
        momentum: of the running mean, in [0, 1).
        start: "zero", or "first_batch" to start at the first batch's mean.
        backend: of passes over unstored teacher logits, see ``choose_backend``. Stored logits are summed in plain torch.
        prototype_group: ranks over which the prototypes are split and which hold the same rows, or None.
        row_group: ranks whose rows form one batch; None means all ranks, or, with a prototype group, this rank only.

    Attributes:
        center: [1, K] fp32 buffer (fp64 after ``double()``), the only entry of the state dict. With start "first_batch" it is
            NaN until the first batch.
    """

    center: Tensor
    center_dims = 2  # of the buffer [1, ..., K]
    _no_rows = 0.0  # the sum over 0 rows

    def __init__(
        self,
        num_prototypes: int,
        momentum: float = 0.9,
        *,
        start: str = "zero",
        backend: str = "auto",
        prototype_group: ProcessGroup | None = None,
        row_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__(backend, prototype_group, row_group)
        if start not in STARTS:
            raise ValueError(f"start is {start!r}; expected one of {', '.join(STARTS)}")
        if num_prototypes < 1:
            raise ValueError(f"num_prototypes is {num_prototypes}; expected at least 1")
        check_momentum(momentum, "center momentum")
        self.momentum = momentum
        # fp32 for any default dtype of torch: at 16 bits, small steps would be rounded away
        shape = (*[1] * (self.center_dims - 1), num_prototypes)
        empty = torch.empty(shape, dtype=torch.float32, device=torch.get_default_device())
        self.register_buffer("center", empty)
        self._start = torch.nan if start == "first_batch" else 0.0
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the centre to its start value, which ``to_empty()`` does not; pending batches are dropped."""
        self.center.fill_(self._start)
        self._started = not math.isnan(self._start)
        self._pending: tuple[Tensor, Tensor] | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "center":
            self._set_center(value)
        else:
            super().__setattr__(name, value)

    @torch.no_grad()
    def _set_center(self, value: Any) -> None:
        before: Tensor = self.center
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        # [1, K], [1, 1, K] and [K] are accepted; [K, 1], K centres of one value, is not
        fits = isinstance(value, Tensor) and value.numel() == before.numel() and shape[-1:] == before.shape[-1:]
        if not fits or not value.is_floating_point():
            got = f"{value.dtype} of shape {shape}" if isinstance(value, Tensor) else shape
            raise ValueError(f"center is assigned {got}; expected a floating-point tensor {list(before.shape)}, or [K]")
        new = value.detach().to(before.dtype).reshape(before.shape)
        if new.device == before.device and not new.is_meta:
            before.copy_(new)  # in place, so that a compiled step still uses this tensor
        else:
            self._buffers["center"] = new.clone()
        self._center_was_set()

    def _center_was_set(self) -> None:
        # only with start "first_batch" does NaN mean that the centre has not started; otherwise the run has diverged
        self._started = self.center.is_meta or not (math.isnan(self._start) and bool(self.center.isnan().all()))

    def target_bias(
        self, teacher: PrototypeLogits | Tensor, temperature: float | Tensor, bias: Tensor | None = None
    ) -> Tensor:
        """[K] nats to add to the logits of this batch; a centre not started yet starts at its mean. As ``accumulate``."""
        self.begin(teacher, temperature, bias)
        return self.bias(temperature)

    @outside_transforms
    def begin(self, teacher: PrototypeLogits | Tensor, temperature: float | Tensor, bias: Tensor | None = None) -> None:
        """If the centre has not started, set it to the mean of this batch. Call before ``bias``; as ``accumulate``."""
        if self._started:
            return
        if self.center.isnan().all():
            batch = self._mean(*self._statistic(teacher, temperature, bias))
            finite = all_finite(batch, group=self.prototype_group)
            self._move_to(torch.where(finite, batch, self._values))
        self._started = not bool(self.center.isnan().all())

    @property
    def pending(self) -> tuple[Tensor, Tensor] | None:
        """The batches that ``apply_pending`` will use: their [K] sum and its [] divisor, over all ranks; None if none."""
        return self._pending

    @outside_transforms
    def accumulate(
        self, teacher: PrototypeLogits | Tensor, temperature: float | Tensor | None, bias: Tensor | None = None
    ) -> None:
        """Record a batch without moving the centre. Collective: every rank must call it equally often.

        Args:
            teacher: [..., K] raw teacher logits, uncentred and not divided by the temperature. The number of rows may differ
                between ranks, and may be 0.
            temperature: of the teacher, positive.
            bias: [K] nats that stored logits lack (the vMF log-normaliser), or None.

        Raises:
            ValueError: the teacher's K is not the centre's, or the temperature is not positive.
        """
        if teacher.shape[-1] != self.center.shape[-1]:
            raise ValueError(
                f"teacher has {teacher.shape[-1]} prototypes; expected the center's {self.center.shape[-1]}"
            )
        self._add(*self._statistic(teacher, temperature, bias))

    @torch.no_grad()
    def _add(self, total: Tensor, rows: Tensor) -> None:
        """Add a statistic to the pending ones, unless its mean, or the mean with it, is not finite."""
        nothing = total.new_full((), self._no_rows), torch.zeros_like(rows)
        kept = nothing if self._pending is None else self._pending
        merged = self._merge(kept, (total, rows))
        # over all blocks of prototypes: either each block records the batch or none does
        finite = all_finite(self._mean(total, rows), self._mean(*merged), group=self.prototype_group)
        self._pending = torch.where(finite, merged[0], kept[0]), torch.where(finite, merged[1], kept[1])

    @torch.no_grad()
    @outside_transforms
    def apply_pending(self) -> None:
        """Move the centre by the batches recorded since the last call, if any."""
        if self._pending is None:
            return
        batch = self._mean(*self._pending)
        # a centre that has not started takes the batch's mean here, if ``begin`` has not been called
        center_K = self._values
        moved = self._step(center_K, batch)
        if math.isnan(self._start):
            moved = torch.where(center_K.isnan().all(), batch, moved)
        # not finite only if nothing is pending, which is then the case on all ranks
        self._move_to(torch.where(batch.isfinite().all(), moved, center_K))
        self._pending = None

    def update(
        self, teacher: PrototypeLogits | Tensor, temperature: float | Tensor, bias: Tensor | None = None
    ) -> None:
        """``accumulate``, then ``apply_pending``."""
        self.accumulate(teacher, temperature, bias)
        self.apply_pending()

    def bias(self, temperature: float | Tensor) -> Tensor:
        """[K] nats to add to the teacher's logits."""
        raise NotImplementedError

    def _statistic(
        self, teacher: PrototypeLogits | Tensor, temperature: float | Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """([K] sum over the rows of all ranks, [] its divisor for a mean)."""
        raise NotImplementedError

    def _merge(self, one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The statistic of two micro-batches."""
        return one[0] + other[0], one[1] + other[1]

    def _mean(self, total: Tensor, rows: Tensor) -> Tensor:
        """[K] mean in the units of the centre; not finite for 0 rows."""
        return (total / rows).to(self.center.dtype)

    @property
    def _values(self) -> Tensor:
        return self.center.view(-1)

    def _move_to(self, center_K: Tensor) -> None:
        self.center.copy_(center_K.view(self.center.shape))

    def _step(self, center: Tensor, batch: Tensor) -> Tensor:
        """[K] the centre after a batch with this mean."""
        return center * self.momentum + batch * (1 - self.momentum)

    def _apply(self, fn: Callable[[Any], Any], recurse: bool = True) -> Self:
        before = self.center
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.center.dtype not in (torch.float32, torch.float64):
            # at 16 bits, small steps would be rounded away
            self._buffers["center"] = before.to(self.center.device)
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *rest)
        # find out here whether the loaded centre has started: a branch on it would break a compiled step
        self._center_was_set()
        self._pending = None
