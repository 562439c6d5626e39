"""Collectives that also work with one rank, and without a process group.

A group is a ``torch.distributed`` process group. None means the default group, or this process alone if there is no default
group. Every rank of a group must call each function equally often, whatever rows it holds.

Legend: P ranks, R rows, D any trailing dim.
"""

from __future__ import annotations

from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp, distributed_c10d

GATHERED_TWICE = (
    "rows gathered over ranks cannot be differentiated twice: their gradient is summed over ranks in place, which autograd "
    "does not record; expected backward() or autograd.grad() without create_graph=True, or a loss of this rank's rows alone"
)
T = TypeVar("T")


def count_ranks(group: ProcessGroup | None = None) -> int:
    """Number of ranks P; 1 without a process group."""
    return torch.distributed.get_world_size(group) if _exists() else 1


def has_all_prototypes(prototype_group: ProcessGroup | None) -> bool:
    """Whether this rank has all prototypes: they are not split over ranks, or over one alone."""
    return prototype_group is None or count_ranks(prototype_group) == 1


def rank_in(group: ProcessGroup | None = None) -> int:
    """This process's rank in the group, from 0; 0 without a process group."""
    return torch.distributed.get_rank(group) if _exists() else 0


def sum_over_ranks(tensor: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """Sum over ranks, in place; the tensor itself for one rank."""
    return _all_reduce(tensor, ReduceOp.SUM, group)


def max_over_ranks(tensor: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """Maximum over ranks, in place; the tensor itself for one rank."""
    return _all_reduce(tensor, ReduceOp.MAX, group)


def gather_objects(mine: T, group: ProcessGroup | None = None) -> list[T]:
    """A small object on the host from every rank, in rank order."""
    everyone = [mine] * count_ranks(group)
    if len(everyone) > 1:
        torch.distributed.all_gather_object(everyone, mine, group)
    return everyone


def sum_number_over_ranks(number: int, group: ProcessGroup | None = None) -> int:
    """Sum over ranks of a number on the host."""
    return sum(gather_objects(number, group))


def log_sum_exp_over_ranks(values: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """``log sum_ranks exp(values)``, relative to the maximum over ranks, so that it neither overflows nor underflows."""
    if count_ranks(group) == 1:
        return values
    # a finite number, not -inf, if every rank has -inf: (-inf) - (-inf) would be NaN
    top = max_over_ranks(values.clone(), group).clamp(min=torch.finfo(values.dtype).min)
    return sum_over_ranks((values - top).exp(), group).log() + top


def all_finite(*tensors: Tensor, group: ProcessGroup | None) -> Tensor:
    """[] bool: whether every element is finite on all ranks of the group (None: on this rank). Does not wait for a device."""
    finite = torch.stack([tensor.isfinite().all() for tensor in tensors]).all()
    return finite if group is None else max_over_ranks((~finite).float(), group) == 0


def gather_counts(count: int, device: torch.device, group: ProcessGroup | None = None) -> list[int]:
    """The number of every rank, in rank order. Waits for ``device``, which must be one that the group's collectives use."""
    if count_ranks(group) == 1:
        return [count]
    counts = [torch.empty(1, dtype=torch.int64, device=device) for _ in range(count_ranks(group))]
    torch.distributed.all_gather(counts, torch.full_like(counts[0], count), group)
    return [int(each) for each in counts]


def gather_rows(
    rows_RD: Tensor, group: ProcessGroup | None = None, counts: list[int] | None = None
) -> tuple[Tensor, int]:
    """The rows of all ranks, concatenated, and the index of this rank's first row. R may differ between ranks and be 0.

    Differentiable once: the gradient of a row is the sum over ranks. ``counts`` are the ranks' R, if already known.
    """
    if count_ranks(group) == 1:
        return rows_RD, 0
    counts = gather_counts(rows_RD.shape[0], rows_RD.device, group) if counts is None else counts
    mine = rank_in(group)
    gathered: Tensor = _GatherRows.apply(rows_RD, counts, mine, group)  # type: ignore[no-untyped-call]
    return gathered, sum(counts[:mine])


def name_of(group: ProcessGroup | None) -> str:
    """A name of the group that a ``torch.library`` op can take; "" for None."""
    return "" if group is None else group.group_name


def group_named(name: str) -> ProcessGroup | None:
    """The group of a name that ``name_of`` returned."""
    # private, but torch's own collectives in compiled graphs use it: an op's argument cannot be a group
    return distributed_c10d._resolve_process_group(name) if name else None  # type: ignore[arg-type]


class Shared(NamedTuple, Generic[T]):
    """Holds a value that deep copies share with the original, such as a process group, which cannot be copied."""

    value: T

    def __deepcopy__(self, memo: dict[int, Any]) -> Shared[T]:
        return self


class RowRanks(NamedTuple):
    """The ranks over whose rows a sum is taken; each rank's rows enter once. Deep copies share the group."""

    group: ProcessGroup | None
    alone: bool  # this process has all rows

    @classmethod
    def of(cls, prototype_group: ProcessGroup | None, row_group: ProcessGroup | None) -> RowRanks:
        """``row_group``, or all ranks; with a prototype group alone, only this rank, for that group holds the same rows.

        Raises:
            ValueError: there are ranks outside the prototype group, and no row group says which of them have other rows.
        """
        alone = prototype_group is not None and row_group is None
        if alone and count_ranks(prototype_group) < count_ranks():
            raise ValueError(
                f"prototype_group has {count_ranks(prototype_group)} of {count_ranks()} ranks and row_group is None; "
                "expected row_group=, the ranks that hold this rank's block of prototypes and other rows"
            )
        return cls(row_group, alone)

    def __deepcopy__(self, memo: dict[int, Any]) -> RowRanks:
        return self

    def sum(self, tensor: Tensor) -> Tensor:
        """As ``sum_over_ranks``."""
        return tensor if self.alone else sum_over_ranks(tensor, self.group)

    def log_sum_exp(self, values: Tensor) -> Tensor:
        """As ``log_sum_exp_over_ranks``."""
        return values if self.alone else log_sum_exp_over_ranks(values, self.group)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, counts: list[int], mine: int, group: ProcessGroup | None) -> Tensor:
        ctx.span, ctx.group = slice(sum(counts[:mine]), sum(counts[: mine + 1])), group
        # all_gather needs equal shapes: every rank sends as many rows as the rank with the most
        padded = rows_RD.new_zeros(max(counts), *rows_RD.shape[1:])
        padded[: counts[mine]] = rows_RD
        parts = [torch.empty_like(padded) for _ in counts]
        torch.distributed.all_gather(parts, padded, group)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(GATHERED_TWICE)
        total = sum_over_ranks(gradient.clone(memory_format=torch.contiguous_format), ctx.group)
        return total[ctx.span], None, None, None


def _all_reduce(tensor: Tensor, op: Any, group: ProcessGroup | None) -> Tensor:
    if count_ranks(group) > 1:
        torch.distributed.all_reduce(tensor, op, group)
    return tensor


def _exists() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
