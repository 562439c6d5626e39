"""KoLeo: spread the features of a batch, or the prototypes of a head, by their nearest-neighbour distances.

Legend: B images of a rank, C crops, N images of all ranks, K prototypes of all ranks, D embedding dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import functional

from vmf_kernels.once import once_differentiable
from vmf_kernels.prototypes import (
    Prototypes,
    accumulation_dtype,
    linear_prototypes,
    normalized_prototypes,
    pull_back_to_stored,
    refuse_freed,
    refuse_severed,
    weight_norm_prototypes,
)
from vmf_kernels.ranks import gather_counts, gather_rows, sum_over_ranks
from vmf_kernels.tensors import no_autocast

TILE = 2048  # prototypes a side of a tile of similarities: 16 MiB of fp32, which the allocator reuses rather than maps anew
NO_MATRIX = -1  # stands for the number of rows of what has none
BLOCK = 4096  # prototypes whose distances are formed at once: 4 MiB of fp32 at D = 256


class KoLeoLoss(nn.Module):
    """Kozachenko-Leonenko regulariser: ``-mean_i log(min_{j != i} ||x_i - x_j|| + eps)`` over L2-normalised rows.

    Meant for the student's class tokens before the head. Formed in fp32 (fp64 for fp64 features) whatever autocast says: in
    fp16 eps rounds to 0 and two equal images give infinity. The gradient of fp16 features is cut off at fp16's range, which
    that of three equal rows leaves. Neighbours are sought among this rank's rows; on a GPU their products follow
    ``torch.set_float32_matmul_precision``, and below "highest" near ones are told apart less well.

    Args:
        eps: added to the distance and to its components, > 0.
        topk: nearest neighbours of a row, over which the logarithm is averaged, >= 1.
        crops: crops C whose losses are summed, >= 1. Rows are view-major; two crops of an image are never neighbours.

    Raises:
        ValueError: ``eps`` is not positive, or ``topk`` or ``crops`` below 1.
    Source: Sablayrolles et al., "Spreading vectors for similarity search", ICLR 2019, section 3.2; top-k:
        facebookresearch/dinov3 dinov3/loss/koleo_loss.py; sum over crops: facebookresearch/dinov2.
    """

    _whose = "rows"

    def __init__(self, eps: float = 1e-8, *, topk: int = 1, crops: int = 1) -> None:
        super().__init__()
        self.eps, self.topk, self.crops = _checked_eps(eps), topk, crops
        for name, count in (("topk", topk), ("crops", crops)):
            if count < 1:
                raise ValueError(f"{name} is {count}; expected an int >= 1")

    def forward(self, features: Tensor) -> Tensor:
        """[C * B, D] features to a [] loss, nats.

        Raises:
            ValueError: ``features`` is not such a matrix, or has a crop of ``topk`` rows or fewer, too few neighbours.
        """
        counts = self._counts(features.shape[0] if features.ndim == 2 else NO_MATRIX, features.device)
        self._check(features, counts)
        with no_autocast(features.device):
            rows_RD = functional.normalize(_widened(features), dim=-1, eps=self.eps)
            rows_BCD = rows_RD.reshape(self.crops, rows_RD.shape[0] // self.crops, rows_RD.shape[1]).transpose(0, 1)
            among_NCD, start = self._candidates(rows_BCD, [count // self.crops for count in counts])
            losses = [self._of_crop(rows_BCD[:, c], among_NCD[:, c], start) for c in range(self.crops)]
            return torch.stack(losses).sum()

    def _counts(self, rows: int, device: torch.device) -> list[int]:
        """Rows of each rank among whose rows neighbours are sought, ``NO_MATRIX`` where it has none."""
        return [rows]

    def _check(self, features: Tensor, counts: list[int]) -> None:
        """Raise ValueError unless all ranks' rows fit; by ``counts`` alone, so that all raise or none is left waiting."""
        wrong = any(count == NO_MATRIX or count % self.crops for count in counts)
        if wrong or sum(counts) // self.crops <= self.topk:
            rows = "B" if self.crops == 1 else f"{self.crops} * B"
            others = "" if len(counts) == 1 else f" and the ranks {counts} rows"
            raise ValueError(
                f"features have shape {tuple(features.shape)}{others}; expected [{rows}, D] with B >= {self.topk + 1} "
                f"{self._whose}"
            )

    def _candidates(self, rows_BCD: Tensor, counts: list[int]) -> tuple[Tensor, int]:
        """[N, C, D] rows among which neighbours are sought, and where ``rows_BCD`` begin; ``counts`` are the ranks' B."""
        return rows_BCD, 0

    def _of_crop(self, rows_BD: Tensor, among_ND: Tensor, start: int) -> Tensor:
        if not rows_BD.shape[0]:
            return among_ND[:0].sum()  # 0, through the gather whose backward pass the other ranks wait for
        with torch.no_grad():
            similarity_BN = rows_BD @ among_ND.T
            similarity_BN.diagonal(start).fill_(-torch.inf)
            # of equal neighbours argmax takes the first, topk any
            one = self.topk == 1
            nearest = similarity_BN.argmax(1, keepdim=True) if one else similarity_BN.topk(self.topk).indices
        # eps inside the norm as well: its slope at 0 distance is undefined
        distance = functional.pairwise_distance(rows_BD[:, None], among_ND[nearest], p=2, eps=self.eps)
        return -(distance + self.eps).log().mean()


class DistributedKoLeoLoss(KoLeoLoss):
    """``KoLeoLoss`` whose neighbours are sought among the rows of all ranks of a group, crop by crop.

    Each rank returns the mean over its own rows, as DDP expects: averaged over ranks of equally many rows this is the loss of
    all rows in one process, and so are the gradients; otherwise weigh each rank's loss by its share of the rows. Gradients
    flow to the neighbours on other ranks. A rank may have 0 rows; its loss is 0 and its backward pass still has to run, as
    every rank's does: features require a gradient on all ranks or on none. With one rank, or no process group, it equals
    ``KoLeoLoss``.

    Args:
        eps: as for ``KoLeoLoss``.
        topk: likewise.
        crops: likewise.
        group: ranks among whose rows neighbours are sought; None for all.

    Raises:
        ValueError: as ``KoLeoLoss``; what the rows are counted over is all ranks, and all raise where one's do not fit.
        RuntimeError: it is differentiated twice on more than one rank.
    Source: facebookresearch/dinov3 dinov3/loss/koleo_loss.py (its groups of ranks are ``group`` here).
    """

    _whose = "rows over all ranks"

    def __init__(self, eps: float = 1e-8, *, topk: int = 1, crops: int = 1, group: ProcessGroup | None = None) -> None:
        super().__init__(eps, topk=topk, crops=crops)
        self.group = group

    def _counts(self, rows: int, device: torch.device) -> list[int]:
        return gather_counts(rows, device, self.group)

    def _candidates(self, rows_BCD: Tensor, counts: list[int]) -> tuple[Tensor, int]:
        return gather_rows(rows_BCD, self.group, counts)


class PrototypeKoLeoLoss(nn.Module):
    """KoLeo of prototypes: ``-1/K sum_k log(min_{j != k} ||mu_k - mu_j|| + eps)`` with ``mu_k = w_k / ||w_k||``.

    Neighbours come from tiles of similarities, each pair once; no [K, K] tensor exists. Formed in fp32 (fp64 for fp64
    prototypes) whatever autocast says; repeats are bitwise equal. Only directions get a gradient, each from its own term and
    from those it is the neighbour of; magnitudes get none. A zero prototype stands at the origin and gets no gradient, and two
    that coincide get none from each other, as no direction parts them. Neighbours nearer than some 5e-4 (1e-8 in fp64) are told
    apart as well as a product of unit vectors can: a little farther one may be taken (below the "highest" of
    ``torch.set_float32_matmul_precision``, on a GPU, those nearer than some 5e-2).

    Args:
        eps: added to the distance, > 0.
        group: ranks that hold a block of the prototypes each; every rank then returns the loss of all of them, and its own
            get that loss's gradient; they require one on all ranks or on none, as its backward pass is collective. None for
            prototypes that are whole on this rank.

    Raises:
        ValueError: ``eps`` is not positive.
    Source: Govindarajan et al., "On partial prototype collapse in the DINO family of self-supervised methods", BMVC 2024
        (arXiv:2410.14060); the formula is a reconstruction from KoLeo's.
    """

    def __init__(self, eps: float = 1e-8, *, group: ProcessGroup | None = None) -> None:
        super().__init__()
        self.eps, self.group = _checked_eps(eps), group

    def forward(self, prototypes: Prototypes | Tensor) -> Tensor:
        """K prototypes, or a [K, D] tensor of them, to a [] loss, nats.

        Raises:
            ValueError: the tensor is not a floating-point matrix with D >= 2, or there is a single prototype.
            RuntimeError: the memory of the prototypes has been freed, here or in the backward pass.
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
    """The loss of prototypes ``weight`` [K, D] of signs [K] or [K, 1]; keeps neighbours and distances for its backward pass."""

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
            # at distance 0 the norm has no slope, and 0 is the mean of those around
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
            gradient = _in_range(gradient_KD, weight.dtype).to(weight.dtype)
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
    """For each row of ``own`` the other row of largest dot product, int64; a tile of two blocks of own rows serves both."""
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
    """Enter a tile's maxima along ``dim``, where it begins at prototype ``first``, if they beat the best so far."""
    top = tile.amax(dim)
    # amax is vectorised and argmax is not: it runs on the rows or columns that improve, ever fewer
    better = (top > best).nonzero().flatten()
    best[better] = top[better]
    index[better] = tile.index_select(1 - dim, better).argmax(dim) + first


def _gaps(among_KD: Tensor, own: slice, nearest: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Blocks of ``own`` rows: where they are, their neighbours, and the differences to those."""
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


def _widened(features: Tensor) -> Tensor:
    """``features`` in the dtype sums are formed in; their gradient stays in the range of their own."""
    dtype = features.dtype
    wide = features.to(accumulation_dtype(dtype))
    if dtype == torch.float16 and wide.requires_grad:
        wide.register_hook(lambda gradient: _in_range(gradient, dtype))  # type: ignore[no-untyped-call]
    return wide


def _in_range(gradient: Tensor, dtype: torch.dtype) -> Tensor:
    """``gradient`` within the range of fp16 for fp16: three equal rows have one of order 1 / eps."""
    most = torch.finfo(dtype).max
    return gradient.clamp(-most, most) if dtype == torch.float16 else gradient


def _checked_eps(eps: float) -> float:
    if not eps > 0:
        raise ValueError(f"eps is {eps}; expected a number > 0")
    return eps
