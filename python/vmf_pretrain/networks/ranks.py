"""This process among those of a run: collectives that also work alone, without a process group."""

import json
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed
from torch import Tensor

from vmf_pretrain.config.errors import PretrainError

T = TypeVar("T")


def grouped() -> bool:
    """Whether there is a process group of more than one rank."""
    return torch.distributed.is_available() and torch.distributed.is_initialized() and count() > 1


def count() -> int:
    """Number of ranks; 1 without a process group."""
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if there else 1


def rank() -> int:
    """This process's place among the ranks, from 0."""
    return torch.distributed.get_rank() if grouped() else 0


def summed(tensor: Tensor) -> Tensor:
    """Sum over the ranks, without a gradient; the tensor itself if there is one rank. Every rank must call it."""
    if not grouped():
        return tensor
    total = tensor.detach().clone()
    torch.distributed.all_reduce(total)
    return total


def averaged(tensor: Tensor) -> Tensor:
    """Mean over the ranks, without a gradient; the tensor itself if there is one rank. Every rank must call it."""
    return summed(tensor) / count() if grouped() else tensor


def from_first(value: str) -> str:
    """The first rank's text, on every rank."""
    if not grouped():
        return value
    values = [value]
    torch.distributed.broadcast_object_list(values, src=0)
    return values[0]


def gathered(mine: list[T]) -> list[T]:
    """The lists of all ranks joined, in the order of ranks, on every rank. Every rank must call it."""
    if not grouped():
        return mine
    everyone: list[list[T]] = [[]] * count()
    torch.distributed.all_gather_object(everyone, mine)
    return [item for part in everyone for item in part]


def agreed(work: Callable[[], T]) -> T:
    """What ``work`` returns here, once it has returned on every rank. Every rank must call it.

    Raises:
        PretrainError: on all ranks, where one raises it: none may wait for one that has given up.
    """
    done: list[T] = []
    failures: list[str] = []
    try:
        done.append(work())
    except PretrainError as error:
        failures.append(str(error))
    failures = gathered(failures)
    if failures:
        raise PretrainError(failures[0])
    return done[0]


def done_by_first(work: Callable[[], T]) -> T:
    """What ``work`` returns on the first rank, something that JSON holds, on every rank. Every rank must call it.

    Raises:
        PretrainError: on all ranks, where the first one raises it.
    """
    if not grouped():
        return work()
    said = agreed(lambda: "" if rank() else json.dumps(work()))
    found: T = json.loads(from_first(said))
    return found
