"""Reductions of [..., K] logits that are not stored (extremes, their indices, sums, means), a tile of logits at a time.

Results equal those of stored logits, also for ties and NaN: the first of equal logits is taken, and NaN is the extreme.

Legend: R rows, K prototypes (of this rank, if they are split over ranks), D embedding dim, N rows that are reduced to one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.autograd import forward_ad

from vmf_kernels.prototypes import Prototypes, accumulation_dtype, refuse_freed, refuse_severed
from vmf_kernels.tensors import may_require_grad, no_autocast

TILE_ROWS, TILE_PROTOTYPES = 512, 8192  # 16 MiB of fp32 logits
NOT_OVER_ROWS = (
    "{name} over rows, for each prototype, has no gradient here; expected {name} of logits.detach(), or of "
    "logits.materialize() where the gradient is needed"
)
Dims = int | Sequence[int] | None
Extreme = tuple[Tensor, Tensor]  # values and their indices


def extreme(features: Tensor, prototypes: Prototypes, *, largest: bool) -> Extreme:
    """[...] the largest or smallest logit of each row, and the index of its prototype.

    Values are differentiable: the gradient is that of the logit at the index.

    Args:
        features: [..., D].
        prototypes: K prototypes of dim D.
        largest: True for the largest, False for the smallest.
    """
    values, indices = [], []
    with torch.no_grad():
        for rows in _row_tiles(features, prototypes):
            best: Extreme | None = None
            for at, tile in _tiles(rows, prototypes):
                best = _better(best, _extreme_of(tile, 1, largest), at.start, largest=largest)
            assert best is not None
            values.append(best[0])
            indices.append(best[1])
    shape = features.shape[:-1]
    index = torch.cat(indices).reshape(shape)
    if _needs_gradient(features, prototypes):
        return _logits_at(features, prototypes, index[..., None])[..., 0], index
    return torch.cat(values).reshape(shape), index


def top(features: Tensor, prototypes: Prototypes, k: int, *, largest: bool, in_order: bool) -> Extreme:
    """[..., k] the k largest or smallest logits of each row, and the indices of their prototypes; differentiable.

    Raises:
        RuntimeError: k is not in 0 to K.
    """
    if not 0 <= k <= prototypes.count:
        raise RuntimeError(f"topk of {k} among {prototypes.count} prototypes; expected k from 0 to {prototypes.count}")
    values, indices = [], []
    with torch.no_grad():
        for rows in _row_tiles(features, prototypes):
            best = rows.new_empty(rows.shape[0], 0), rows.new_empty(rows.shape[0], 0, dtype=torch.int64)
            for at, tile in _tiles(rows, prototypes):
                found = tile.topk(min(k, tile.shape[1]), dim=1, largest=largest)
                both = torch.cat([best[0], found.values], dim=1), torch.cat([best[1], found.indices + at.start], dim=1)
                kept = both[0].topk(min(k, both[0].shape[1]), dim=1, largest=largest, sorted=in_order)
                best = kept.values, both[1].gather(1, kept.indices)
            values.append(best[0])
            indices.append(best[1])
    shape = (*features.shape[:-1], k)
    index = torch.cat(indices).reshape(shape)
    if _needs_gradient(features, prototypes):
        return _logits_at(features, prototypes, index), index
    return torch.cat(values).reshape(shape), index


def extreme_over_rows(features: Tensor, dims: Sequence[int], prototypes: Prototypes, name: str) -> Extreme:
    """[..., K] the largest ("max" in the name) or smallest logit of each prototype over dims of rows, and its index there.

    Raises:
        RuntimeError: a gradient would be lost.
        IndexError: there are no rows.
    """
    if _needs_gradient(features, prototypes):
        raise RuntimeError(NOT_OVER_ROWS.format(name=name))
    moved = features.movedim(tuple(dims), tuple(range(len(dims))))
    rows_NMD = moved.reshape(math.prod(moved.shape[: len(dims)]), -1, features.shape[-1])
    if rows_NMD.shape[0] == 0:
        raise IndexError(f"{name} over no rows of logits of shape {(*features.shape[:-1], prototypes.count)}")
    largest = "max" in name
    parts: list[list[Extreme]] = []
    with torch.no_grad():
        refuse_freed(prototypes.weight, prototypes.magnitude)
        for kept_NMD in torch.split(rows_NMD, TILE_ROWS, dim=1):
            over = max(TILE_ROWS // max(kept_NMD.shape[1], 1), 1)
            parts.append([])
            for block in _blocks(prototypes):
                best: Extreme | None = None
                for i, some_NMD in enumerate(torch.split(kept_NMD, over)):
                    best = _better(best, _extreme_of(_logits(some_NMD, block), 0, largest), i * over, largest=largest)
                assert best is not None
                parts[-1].append(best)
    joined = [torch.cat([torch.cat([best[side] for best in row], dim=1) for row in parts]) for side in (0, 1)]
    shape = (*moved.shape[len(dims) : -1], prototypes.count)
    return joined[0].reshape(shape), joined[1].reshape(shape)


def total(features: Tensor, prototypes: Prototypes, row_dims: Sequence[int], *, over_prototypes: bool) -> Tensor:
    """Sum of the logits over dims of rows (which keep size 1) and, if asked, over the prototypes; differentiable.

    The sum is linear, ``<sum of rows, sum of prototypes>``, so no tile of logits is computed.

    Returns:
        [..., K], or [..., 1] if summed over the prototypes; fp32 (fp64 for fp64 features or prototypes).
    """
    refuse_freed(prototypes.weight, prototypes.magnitude)
    dtype = accumulation_dtype(torch.promote_types(features.dtype, prototypes.weight.dtype))
    rows = features.to(dtype)
    if row_dims:
        rows = features.sum(tuple(row_dims), keepdim=True, dtype=dtype)
    with no_autocast(rows.device):  # the caller's autocast would round to half precision
        blocks = (block.effective_weight().to(dtype) for block in _blocks(prototypes))
        if over_prototypes:
            weight_D = torch.stack([weight_KD.sum(dim=0) for weight_KD in blocks]).sum(dim=0)
            return (rows @ weight_D)[..., None]
        return torch.cat([rows @ weight_KD.T for weight_KD in blocks], dim=-1)


def split_dims(dims: Dims, ndim: int) -> tuple[list[int], bool]:
    """(sorted dims of rows, whether the dim of the prototypes is included) for an argument ``dim=``; None and () mean all.

    Raises:
        IndexError: there is no such dim.
        RuntimeError: a dim comes twice.
    """
    asked = list(dims) if isinstance(dims, Sequence) else [] if dims is None else [dims]
    for dim in asked:
        if not -ndim <= dim < ndim:
            raise IndexError(f"dim is {dim}; expected one from {-ndim} to {ndim - 1}")
    resolved = sorted(dim % ndim for dim in asked) if asked else list(range(ndim))
    if len(set(resolved)) < len(resolved):
        raise RuntimeError(f"dim is {tuple(asked)}, which names one twice")
    return [dim for dim in resolved if dim < ndim - 1], ndim - 1 in resolved


def _row_tiles(features: Tensor, prototypes: Prototypes) -> tuple[Tensor, ...]:
    refuse_freed(prototypes.weight, prototypes.magnitude)
    return torch.split(features.detach().reshape(-1, features.shape[-1]), TILE_ROWS)


def _tiles(rows_RD: Tensor, prototypes: Prototypes) -> Iterator[tuple[slice, Tensor]]:
    """Tiles of logits: the range of prototypes, and their [R, k] logits."""
    start = 0
    for block in _blocks(prototypes):
        yield slice(start, start + block.count), _logits(rows_RD, block)
        start += block.count


def _blocks(prototypes: Prototypes) -> Iterator[Prototypes]:
    weights = torch.split(prototypes.weight, TILE_PROTOTYPES)
    if prototypes.magnitude is None:
        yield from (replace(prototypes, weight=weight) for weight in weights)
        return
    for weight, magnitude in zip(weights, torch.split(prototypes.magnitude, TILE_PROTOTYPES), strict=True):
        yield replace(prototypes, weight=weight, magnitude=magnitude)


def _logits(features: Tensor, prototypes: Prototypes) -> Tensor:
    """As ``PrototypeLogits.materialize``."""
    dtype = torch.promote_types(features.dtype, prototypes.weight.dtype)
    return (features.to(dtype) @ prototypes.effective_weight().to(dtype).T).to(features.dtype)


def _logits_at(features: Tensor, prototypes: Prototypes, index: Tensor) -> Tensor:
    """[..., k] each row's logits at the prototypes ``index`` [..., k], differentiable."""
    flat = index.flatten()
    magnitude = None if prototypes.magnitude is None else prototypes.magnitude.index_select(0, flat)
    chosen = replace(prototypes, weight=prototypes.weight.index_select(0, flat), magnitude=magnitude)
    dtype = torch.promote_types(features.dtype, prototypes.weight.dtype)
    kind = features.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)  # as autocast does for the product that gives all logits
    weight = chosen.effective_weight().to(dtype).reshape(*index.shape, prototypes.dim)
    logits: Tensor = (features.to(dtype)[..., None, :] * weight).sum(dim=-1).to(features.dtype)
    return logits


def _extreme_of(values: Tensor, dim: int, largest: bool) -> Extreme:
    found = values.max(dim) if largest else values.min(dim)
    return found.values, found.indices


def _better(best: Extreme | None, found: Extreme, start: int, *, largest: bool) -> Extreme:
    """The better of two, elementwise; of equal values, the earlier. Indices of ``found`` count from ``start``."""
    values, indices = found[0], found[1] + start
    if best is None:
        return values, indices
    beats = (values > best[0]) if largest else (values < best[0])
    beats |= values.isnan() & ~best[0].isnan()
    return torch.where(beats, values, best[0]), torch.where(beats, indices, best[1])


def _needs_gradient(features: Tensor, prototypes: Prototypes) -> bool:
    refuse_severed(prototypes)
    stored = [t for t in (features, prototypes.weight, prototypes.magnitude) if t is not None]
    if forward_ad._current_level >= 0:  # forward-mode differentiation takes the differentiable way too
        return True
    return torch.is_grad_enabled() and any(may_require_grad(t) for t in stored)
