"""Stochastic depth whose draws do not depend on how a batch is divided over ranks and parts.

Legend: V views, B images of this rank, R = V * B rows, view-major.
"""

from collections.abc import Iterable

import torch
from timm.layers.drop import DropPath
from torch import Tensor, nn

from vmf_pretrain.networks import ranks


class StochasticDepth(nn.Module):
    """Drops a residual branch for some rows, in training; the other rows are scaled by ``1 / (1 - rate)``.

    Args:
        rate: probability of a drop.

    Source: Huang et al., "Deep networks with stochastic depth", ECCV 2016; the draws of one rank are timm's ``DropPath``'s.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.kept: Tensor | None = None  # [R] what the rows of the next call are multiplied with; None draws anew

    def forward(self, branch: Tensor) -> Tensor:
        """[R, ...] to the same shape."""
        if not self.training or self.rate == 0:
            return branch
        kept = _drawn(branch.shape[0], self.rate, branch) if self.kept is None else self.kept.to(branch.dtype)
        return branch * kept.view(-1, *[1] * (branch.ndim - 1))


def own_stochastic_depth(module: nn.Module) -> None:
    """Replace timm's ``DropPath`` everywhere in a module."""
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, DropPath):
                setattr(parent, name, StochasticDepth(float(child.drop_prob or 0.0)))


def depths_of(module: nn.Module) -> list[StochasticDepth]:
    """The active ones of a module, in the order of their calls."""
    found = (part for part in module.modules() if isinstance(part, StochasticDepth))
    return [part for part in found if part.training and part.rate > 0]


def draw_depths(depths: Iterable[StochasticDepth], rows: Tensor, images: int) -> list[Tensor]:
    """[R] for each one: this rank's part of what one process would draw for the whole batch.

    Args:
        depths: drawn for in this order, from the global generator of the rows' device, which is the same on all ranks.
        rows: [R, ...] of this rank.
        images: B.
    """
    views, world, place = rows.shape[0] // images, ranks.count(), ranks.rank()
    mine = slice(place * images, (place + 1) * images)
    drawn = (_drawn(views * world * images, depth.rate, rows) for depth in depths)
    return [whole.view(views, world * images)[:, mine].reshape(-1) for whole in drawn]


def _drawn(rows: int, rate: float, like: Tensor) -> Tensor:
    dtype = like.dtype if like.is_floating_point() else torch.float32
    return torch.empty(rows, dtype=dtype, device=like.device).bernoulli_(1 - rate).div_(1 - rate)
