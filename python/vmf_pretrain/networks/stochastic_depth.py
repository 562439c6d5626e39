"""Stochastic depth whose draws do not depend on how a batch is divided over ranks and parts.

Legend: V views, B images of this rank, R = V * B rows, view-major.
"""

from collections.abc import Callable, Iterable

import torch
from timm.layers.drop import DropPath
from timm.models.vision_transformer import Block
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
        if not self.active:
            return branch
        kept = self.kept_of(branch).to(branch.dtype)
        return branch * kept.view(-1, *[1] * (branch.ndim - 1))

    @property
    def active(self) -> bool:
        """Whether it drops anything."""
        return self.training and self.rate > 0

    def kept_of(self, rows: Tensor) -> Tensor:
        """[R] what was drawn for rows [R, ...], or else is now."""
        return self.draw(len(rows), rows) if self.kept is None else self.kept

    def draw(self, rows: int, like: Tensor) -> Tensor:
        """[rows] what each is multiplied with: 0, or one over the probability of being kept."""
        dtype = like.dtype if like.is_floating_point() else torch.float32
        kept = torch.empty(rows, dtype=dtype, device=like.device).bernoulli_(1 - self.rate)
        return kept.div_(1 - self.rate)


class SubsetDepth(StochasticDepth):
    """Keeps a residual branch for a random subset of the rows, of fixed size, and computes it for these rows only.

    The subset is one of all ranks' rows, so that it does not depend on their number; that of a rank may be a few rows larger
    or smaller than that of another. Scaled by the rows over those kept.

    Source: Oquab et al., "DINOv2", TMLR 2024, "efficient stochastic depth"; repository facebookresearch/dinov2,
    dinov2/layers/block.py, where each rank draws a subset of its own rows.
    """

    def draw(self, rows: int, like: Tensor) -> Tensor:
        """[rows] on the CPU, because the host has to know how many are kept."""
        size = max(int(rows * (1 - self.rate)), 1)
        kept = torch.zeros(rows, dtype=torch.float64)
        kept[torch.randperm(rows)[:size]] = rows / size
        return kept

    def add(self, rows: Tensor, branch: Callable[[Tensor], Tensor]) -> Tensor:
        """[R, ...] the rows with the branch of the subset added to them."""
        kept = self.kept_of(rows)
        chosen = kept.nonzero().flatten()
        weights = kept[chosen].to(rows.device, rows.dtype).view(-1, *[1] * (rows.ndim - 1))
        chosen = chosen.to(rows.device)
        return rows.index_add(0, chosen, branch(rows[chosen]).to(rows.dtype) * weights)


class SubsetBlock(Block):
    """timm's ``Block`` that leaves dropped rows out of the computation."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """[R, tokens, F] to the same shape."""
        masked = {"attn_mask": attn_mask, "is_causal": is_causal}
        x = _added(self.drop_path1, x, lambda rows: self.ls1(self.attn(self.norm1(rows), **masked)))
        return _added(self.drop_path2, x, lambda rows: self.ls2(self.mlp(self.norm2(rows))))


def _added(depth: nn.Module, rows: Tensor, branch: Callable[[Tensor], Tensor]) -> Tensor:
    if isinstance(depth, SubsetDepth) and depth.active:
        return depth.add(rows, branch)
    dropped: Tensor = depth(branch(rows))
    return rows + dropped


def own_stochastic_depth(module: nn.Module, kind: type[StochasticDepth] = StochasticDepth) -> None:
    """Replace timm's ``DropPath`` everywhere in a module."""
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, DropPath):
                setattr(parent, name, kind(float(child.drop_prob or 0.0)))


def depths_of(module: nn.Module) -> list[StochasticDepth]:
    """The active ones of a module, in the order of their calls."""
    return [part for part in module.modules() if isinstance(part, StochasticDepth) and part.active]


def draw_depths(depths: Iterable[StochasticDepth], rows: Tensor, images: int) -> list[Tensor]:
    """[R] for each one: this rank's part of what one process would draw for the whole batch.

    Args:
        depths: drawn for in this order, from the global generator of the rows' device, which is the same on all ranks.
        rows: [R, ...] of this rank.
        images: B.
    """
    views, world, place = rows.shape[0] // images, ranks.count(), ranks.rank()
    mine = slice(place * images, (place + 1) * images)
    drawn = (depth.draw(views * world * images, rows) for depth in depths)
    return [whole.view(views, world * images)[:, mine].reshape(-1) for whole in drawn]
