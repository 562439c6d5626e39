"""KoLeo of prototypes: a regulariser that keeps them apart.

Legend: K prototypes, D embedding dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from vmf_kernels.losses.koleo import checked_eps, in_range
from vmf_kernels.ops.ready_gradients import once_differentiable
from vmf_kernels.prototypes import (
    Prototypes,
    linear_prototypes,
    normalized_prototypes,
    pull_back_to_stored,
    refuse_freed,
    refuse_severed,
    weight_norm_prototypes,
)
from vmf_kernels.ranks import gather_rows, sum_over_ranks
from vmf_kernels.tensors import no_autocast

TILE = 2048  # prototypes a side of a tile of similarities: 16 MiB of fp32, which the allocator reuses without mapping it anew
BLOCK = 4096  # prototypes whose distances are computed at once: 4 MiB of fp32 at D = 256


class PrototypeKoLeoLoss(nn.Module):
    """KoLeo of prototypes: ``-1/K sum_k log(min_{j != k} ||mu_k - mu_j|| + eps)`` with ``mu_k = w_k / ||w_k||``.

    Neighbours are found in tiles of similarities, each pair once; there is no [K, K] tensor. It is computed in fp32 (fp64 for
    fp64 prototypes), also under autocast; repeats are bitwise equal. Only directions get a gradient, from their own term and
    from the terms whose neighbour they are; magnitudes get none. A prototype of zeros is at the origin and gets no gradient.
    Two prototypes that coincide give each other no gradient, because there is no direction between them. A product of unit
    vectors cannot distinguish neighbours nearer than some 5e-4 (1e-8 in fp64; 5e-2 on a GPU with less than "highest" of
    ``torch.set_float32_matmul_precision``), so a slightly farther one may be taken.

    Args:
        eps: added to the distance, > 0.
        group: ranks that each hold a block of the prototypes, or None if this rank has all. Every rank returns the loss of all
            prototypes; each block gets that loss's gradient. The backward pass is collective, so the prototypes must require a
            gradient on all ranks or on none.

    Raises:
        ValueError: ``eps`` is not positive.
    Source: Govindarajan et al., "On partial prototype collapse in the DINO family of self-supervised methods", BMVC 2024
        (arXiv:2410.14060); the formula is reconstructed from KoLeo's.

    Example:
        >>> head = DINOHead(8, 512, hidden_dim=16, bottleneck_dim=4)
        >>> PrototypeKoLeoLoss()(head.last_layer.prototypes()).backward()
        >>> tuple(head.last_layer.weight_v.grad.shape)
        (512, 4)
    """

    def __init__(self, eps: float = 1e-8, *, group: ProcessGroup | None = None) -> None:
        super().__init__()
        self.eps, self.group = checked_eps(eps), group

    def forward(self, prototypes: Prototypes | Tensor) -> Tensor:
        """The [] loss, nats, of K prototypes or of a [K, D] tensor.

        Raises:
            ValueError: the tensor is not a floating-point matrix with D >= 2, or there is a single prototype.
            RuntimeError: the memory of the prototypes has been freed, at this call or at the backward pass.
        """
        if not isinstance(prototypes, (Prototypes, Tensor)):
            raise ValueError(
                f"prototypes are a {type(prototypes).__name__}; expected Prototypes (of a head: last_layer.prototypes()), or a "
                "matrix [K, D]"
            )
        stored = linear_prototypes(prototypes) if isinstance(prototypes, Tensor) else prototypes
        refuse_freed(stored.weight, stored.magnitude)
        refuse_severed(stored)
        sign = None if stored.magnitude is None else stored.magnitude.detach().sign()
        loss: Tensor = _SpreadPrototypes.apply(stored.weight, sign, self.eps, self.group)[0]  # type: ignore[no-untyped-call]
        return loss


class _SpreadPrototypes(torch.autograd.Function):
    """The loss of prototypes ``weight`` [K, D] with signs [K] or [K, 1]; saves neighbours and distances for backward."""

    @staticmethod
    def forward(
        weight: Tensor, sign: Tensor | None, eps: float, group: ProcessGroup | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        with no_autocast(weight.device):
            among_KD, own = _directions(_signed(weight, sign), group)
            if among_KD.shape[0] < 2:
                raise ValueError("there is a single prototype, which has no neighbour; expected K >= 2")
            nearest = _nearest_rows(among_KD, own)
            distance = torch.cat([torch.linalg.vector_norm(gap, dim=1) for _, _, gap in _gaps(among_KD, own, nearest)])
        total = -(distance + eps).log().sum()
        loss = (total if group is None else sum_over_ranks(total, group)) / among_KD.shape[0]
        return loss, nearest, distance

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        weight, sign, ctx.eps, ctx.group = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(weight, sign, *output[1:])

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
        weight, sign, nearest, distance = ctx.saved_tensors
        with torch.no_grad(), no_autocast(weight.device):
            stored = _signed(weight, sign)
            among_KD, own = _directions(stored, ctx.group)
            # at distance 0 the norm has no derivative; 0 is the mean of the derivatives around it
            slope = torch.where(distance > 0, (distance + ctx.eps) * distance, torch.inf).reciprocal()
            slope *= -upstream / among_KD.shape[0]
            gradient_KD = torch.zeros_like(among_KD)
            for at, to, gap in _gaps(among_KD, own, nearest):
                push = gap * slope[at.start - own.start : at.stop - own.start, None]
                gradient_KD[at] += push
                _add_rows(gradient_KD, to, push.neg_())
            if ctx.group is not None:
                gradient_KD = sum_over_ranks(gradient_KD, ctx.group)[own].clone()
            pull_back_to_stored(stored, gradient_KD.new_ones(()), gradient_KD, None)
            gradient = in_range(gradient_KD, weight.dtype).to(weight.dtype)
        return once_differentiable([gradient], [weight, upstream], "PrototypeKoLeoLoss")[0], None, None, None


def _signed(weight: Tensor, sign: Tensor | None) -> Prototypes:
    """Prototypes whose effective weights are the directions."""
    return normalized_prototypes(weight) if sign is None else weight_norm_prototypes(sign, weight)


def _directions(stored: Prototypes, group: ProcessGroup | None) -> tuple[Tensor, slice]:
    """[K, D] unit rows of all ranks, and which of them are this rank's."""
    gain = stored.gain()
    assert gain is not None, f"{stored.kind} prototypes are not of norm 1"
    own_KD = stored.weight.to(gain.dtype) * gain[:, None]
    among_KD, start = (own_KD, 0) if group is None else gather_rows(own_KD, group)
    return among_KD, slice(start, start + own_KD.shape[0])


def _nearest_rows(among_KD: Tensor, own: slice) -> Tensor:
    """int64: for each row of ``own``, the other row with the largest dot product. A tile of two own blocks serves both."""
    count = among_KD.shape[0]
    best_K = among_KD.new_full((count,), -torch.inf)
    index_K = torch.zeros(count, dtype=torch.int64, device=among_KD.device)
    own_tiles = _cut(own, TILE)
    foreign = _cut(slice(0, own.start), TILE) + _cut(slice(own.stop, count), TILE)
    for i, rows in enumerate(own_tiles):
        for columns in own_tiles[i:] + foreign:
            tile_KK = among_KD[rows] @ among_KD[columns].T
            if rows == columns:
                tile_KK.fill_diagonal_(-torch.inf)
            _improve(best_K[rows], index_K[rows], tile_KK, columns.start, 1)
            if columns in own_tiles[i + 1 :]:
                _improve(best_K[columns], index_K[columns], tile_KK, rows.start, 0)
    return index_K[own]


def _improve(best: Tensor, index: Tensor, tile: Tensor, first: int, dim: int) -> None:
    """Update the best so far with a tile's maxima along ``dim``, in which the tile begins at prototype ``first``."""
    top = tile.amax(dim)
    # amax is vectorised and argmax is not: run argmax only on the rows or columns that improve, which become fewer
    better = (top > best).nonzero().flatten()
    best[better] = top[better]
    index[better] = tile.index_select(1 - dim, better).argmax(dim) + first


def _gaps(among_KD: Tensor, own: slice, nearest: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Blocks of ``own`` rows: their slice, their neighbours, and the differences from them."""
    for at in _cut(own, BLOCK):
        to = nearest[at.start - own.start : at.stop - own.start]
        yield at, to, among_KD[at] - among_KD[to]


def _add_rows(total: Tensor, index: Tensor, rows: Tensor) -> None:
    """``total[index] += rows`` with repeated indices, in the same order every time."""
    if total.device.type == "cpu":
        total.index_add_(0, index, rows)  # index_put_ adds atomically on a CPU, index_add_ on a GPU
    else:
        total.index_put_((index,), rows, accumulate=True)


def _cut(span: slice, size: int) -> list[slice]:
    """Consecutive slices of at most ``size``."""
    return [slice(at, min(at + size, span.stop)) for at in range(span.start, span.stop, size)]
