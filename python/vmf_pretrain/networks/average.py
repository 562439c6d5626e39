"""A network that follows another one: its parameters are a moving average."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


@torch.no_grad()
def update_average(average: Iterable[Tensor], current: Iterable[Tensor], share: float | Tensor) -> None:
    """``average <- average + share (current - average)``, in place, tensor by tensor.

    Args:
        average: the tensors that follow.
        current: those that they follow, in the same order.
        share: 1 minus the momentum; a [] tensor is not read on the host, and with 0 no bit of a finite average changes.
    """
    followers, leaders = list(average), [value.detach() for value in current]
    weight = [share] * len(followers) if isinstance(share, Tensor) else share
    torch._foreach_lerp_(followers, leaders, weight)


def follow(follower: nn.Module, leader: nn.Module, share: float | Tensor) -> None:
    """Update a follower's parameters; its buffers are not changed, as published."""
    update_average(follower.parameters(), leader.parameters(), share)
