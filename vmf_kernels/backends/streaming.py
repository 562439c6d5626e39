"""Streaming backend in plain torch: blocks of prototypes, an online softmax, and a workspace of bounded size.

Blocks are laid out [prototypes, rows]: both products with the prototypes then run on tall matrices, which a CPU BLAS
multiplies fast even with few rows. Rows of all queries are processed together, in chunks whose unnormalised probabilities
fit the workspace, so that the column sums need no second product for the logits. No memory grows with rows x prototypes.

Legend: R rows of a chunk, K prototypes, B prototypes of a block, D embedding dim.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from vmf_kernels.backends.base_two import LN_2, LOG2_E
from vmf_kernels.backends.contract import Assignment, Query
from vmf_kernels.prototypes import Keys
from vmf_kernels.ranks import has_all_prototypes, max_over_ranks, sum_over_ranks

LEAST_SHIFT = -1e30  # lower bound of a maximum's shift: 2^LEAST_SHIFT is 0, and its product with a mass is finite
# Measured with bench/bench_head.py on 2 cores of an EPYC 9004 at K = 65,536, D = 256, fp32:
BLOCK_PROTOTYPES = 2048  # with 160 rows, 1.3 MiB: fits L2
# 96 rows of probabilities. The allocator maps 32 MiB or more anew each time; fewer rows make the products slower
WORKSPACE_BYTES = 24 * 2**20
WORKSPACE_SHARE = 0.5  # of the memory of all rows' logits: a small batch must save memory too
LEAST_WORKSPACE_BYTES = 16 * 2**20  # with less, reading the prototypes limits the products
LEAST_CHUNK_ROWS = 16


def assign(
    queries: Sequence[Query],
    values: Keys | None = None,
    vectors_KD: Tensor | None = None,
    group: ProcessGroup | None = None,
) -> list[Assignment]:
    """Soft assignments as in ``composed.Assign``, computed in chunks of the queries' concatenated rows."""
    parts: list[list[Assignment]] = [[] for _ in queries]
    shared = _Shared.of(queries[0].keys, group)
    overwrite = True
    for chunk in _chunks(queries, shared.prototypes):
        out = None if vectors_KD is None else _Vectors(vectors_KD, overwrite)
        for index, part in zip(chunk, _assign_chunk(list(chunk.values()), values, shared, out), strict=True):
            parts[index].append(part)
        overwrite = False
    return [_joined(part) for part in parts]


def column_log_sum_exp(rows_RD: Tensor, keys: Keys, offset_R: Tensor) -> Tensor:
    """[K] ``log sum_r exp(l_rk - offset_r)``, chunk by chunk; -inf for 0 rows."""
    dtype, count = keys.scale.dtype, keys.weight.shape[0]
    total_K = torch.full((count,), -torch.inf, dtype=dtype, device=rows_RD.device)
    for chunk in _row_chunks(rows_RD.shape[0], count, dtype) if rows_RD.shape[0] else ():
        x_DR = rows_RD[chunk].to(dtype).T * keys.scale
        for block in _blocks(keys):
            logits_BR = _prototype_block(keys, block) @ x_DR - offset_R[chunk]
            if keys.bias is not None:
                logits_BR += keys.bias[block, None]
            total_K[block] = torch.logaddexp(total_K[block], logits_BR.logsumexp(dim=1))
    return total_K


class _Shared(NamedTuple):
    """What all ranks of the prototype group must agree on."""

    group: ProcessGroup | None  # None for one rank
    prototypes: int  # the largest number that a rank has: chunks of rows must be the same on every rank

    @classmethod
    def of(cls, keys: Keys, group: ProcessGroup | None) -> _Shared:
        count = keys.weight.shape[0]
        if has_all_prototypes(group):
            return cls(None, count)
        return cls(group, int(max_over_ranks(keys.scale.new_tensor(count), group)))


@dataclass
class _OnlineSoftmax:
    """Running sums of one chunk over the blocks seen so far, relative to the running maximum; base-2 logits."""

    max_R: Tensor
    mass_R: Tensor  # sum of 2^(l - max)
    deviation_R: Tensor  # sum of 2^(l - max) (l - max), for the entropy
    barycentre_DR: Tensor | None

    @classmethod
    def empty(cls, like: Tensor, rows: int, values: Keys | None) -> _OnlineSoftmax:
        zero = like.new_zeros(rows)
        return cls(
            # the lowest finite number, not -inf: (-inf) - (-inf) would be NaN
            max_R=zero + torch.finfo(like.dtype).min,
            mass_R=zero,
            deviation_R=zero,
            barycentre_DR=None if values is None else like.new_zeros(values.weight.shape[1], rows),
        )

    def absorb(self, logits_BR: Tensor, out_BR: Tensor) -> Tensor:
        """Add a block of logits (overwritten); write 2^(l - max) to ``out_BR`` and return it."""
        new_max = torch.maximum(self.max_R, logits_BR.amax(dim=0))
        shift = (self.max_R - new_max).clamp(min=LEAST_SHIFT)
        decay = shift.exp2()
        deviation_BR = logits_BR.sub_(new_max)
        p_BR = torch.exp2(deviation_BR, out=out_BR)
        # nansum: a logit of -inf must add nothing, but -inf times its probability of 0 is NaN. A logit that is NaN itself
        # makes the mass NaN
        moment_R = deviation_BR.mul_(p_BR).nansum(dim=0)
        self.deviation_R = decay * (self.deviation_R + shift * self.mass_R) + moment_R
        self.mass_R = decay * self.mass_R + p_BR.sum(dim=0)
        self.max_R = new_max
        if self.barycentre_DR is not None:
            self.barycentre_DR *= decay
        return p_BR

    def gather(self, p_BR: Tensor, values_BD: Tensor) -> None:
        """Add a block's share to the barycentre."""
        if self.barycentre_DR is not None:
            self.barycentre_DR.addmm_(values_BD.T, p_BR)

    def merge_over_ranks(self, group: ProcessGroup) -> None:
        """Extend the sums to the prototypes of all ranks; ranks exchange one maximum and D + 2 sums per row."""
        top_R = max_over_ranks(self.max_R.clone(), group)
        shift = self.max_R - top_R
        decay = shift.exp2()
        # a rank far below the others has weight 0, and its shift may be too large for a product
        deviation_R = decay * (self.deviation_R + torch.where(decay > 0, shift, 0.0) * self.mass_R)
        parts = [decay * self.mass_R, deviation_R]
        if self.barycentre_DR is not None:
            parts.extend(decay * self.barycentre_DR)
        sums = sum_over_ranks(torch.stack(parts), group)
        self.max_R = top_R  # not max - shift: every rank must have the same bits
        self.mass_R, self.deviation_R = sums[0], sums[1]
        if self.barycentre_DR is not None:
            self.barycentre_DR = sums[2:]

    def results(self, segments: list[slice]) -> list[Assignment]:
        """One assignment for each segment of the chunk's rows, nats."""
        log_mass = self.mass_R.log2()
        lse_R = (self.max_R + log_mass) * LN_2
        entropy_R = (log_mass - self.deviation_R / self.mass_R) * LN_2
        barycentre_RD = None if self.barycentre_DR is None else (self.barycentre_DR / self.mass_R).T.contiguous()
        return [
            Assignment(lse_R[mine], entropy_R[mine], None if barycentre_RD is None else barycentre_RD[mine])
            for mine in segments
        ]


class _Vectors(NamedTuple):
    """The buffer of the prototypes' gradient, to which each chunk adds its share."""

    vectors_KD: Tensor
    overwrite: bool  # the first chunk writes instead of adding, so that [K, D] need not be cleared or read

    def add(self, block: slice, p_BR: Tensor, cotangents_RD: Tensor) -> None:
        target = self.vectors_KD[block]
        torch.addmm(target, p_BR, cotangents_RD, beta=0 if self.overwrite else 1, out=target)


def _assign_chunk(
    segments: list[Query], values: Keys | None, shared: _Shared, out: _Vectors | None
) -> list[Assignment]:
    keys, like = segments[0].keys, segments[0].keys.scale
    count, blocks, columns = keys.weight.shape[0], list(_blocks(keys)), _columns(segments)
    rows = columns[-1].stop
    state = _OnlineSoftmax.empty(like, rows, values)
    x_DR = [(query.rows.to(like.dtype) * (query.keys.scale * LOG2_E)).T.contiguous() for query in segments]
    has_sums = out is not None or any(query.sums is not None for query in segments)
    workspace_KR = like.new_empty(count, rows) if has_sums else None
    scratch_BR = like.new_empty(1 if has_sums else 2, min(BLOCK_PROTOTYPES, count), rows)
    maxima = []
    for block in blocks:
        b_logits = scratch_BR[0, : block.stop - block.start]
        b_values = None if values is None else _prototype_block(values, block)
        for query, x, mine in zip(segments, x_DR, columns, strict=True):
            known = b_values if query.keys is values else None
            _score(
                query.keys, block, _prototype_block(query.keys, block) if known is None else known, x, b_logits[:, mine]
            )
        b_p = state.absorb(b_logits, scratch_BR[1, : len(b_logits)] if workspace_KR is None else workspace_KR[block])
        maxima.append(state.max_R)
        if b_values is not None:
            state.gather(b_p, b_values)
    if shared.group is not None:
        state.merge_over_ranks(shared.group)
    if workspace_KR is not None:
        # 2^(block max - max) / mass turns a block's unnormalised probabilities into the final ones
        normalizers = [(max_R - state.max_R).exp2() / state.mass_R for max_R in maxima]
        _sum_columns(workspace_KR, segments, list(zip(blocks, normalizers, strict=True)), out)
    return state.results(columns)


def _score(keys: Keys, block: slice, b_keys: Tensor, x_DR: Tensor, out_BR: Tensor) -> None:
    """Write a block of base-2 logits."""
    if out_BR.is_contiguous():
        torch.mm(b_keys, x_DR, out=out_BR)
    else:  # mm into a strided out would make a copy anyway
        out_BR.copy_(b_keys @ x_DR)
    if keys.bias is not None:
        out_BR.add_((keys.bias[block] * LOG2_E)[:, None])


def _sum_columns(
    workspace_KR: Tensor, segments: list[Query], normalizers: list[tuple[slice, Tensor]], out: _Vectors | None
) -> None:
    cotangents = [query.cotangents for query in segments if query.cotangents is not None]
    cotangents_RD = None if out is None else torch.cat(cotangents)
    columns = _columns(segments)
    for block, normalizer_R in normalizers:
        p_BR = workspace_KR[block]
        if out is not None and cotangents_RD is not None:
            out.add(block, p_BR, cotangents_RD * normalizer_R[:, None])
        for query, mine in zip(segments, columns, strict=True):
            if query.weights is not None and query.sums is not None:
                for weights_R, sums_K in zip(query.weights, query.sums, strict=True):
                    sums_K[block].addmv_(p_BR[:, mine], weights_R * normalizer_R[mine])


def _prototype_block(keys: Keys, block: slice) -> Tensor:
    weight_BD = keys.weight[block].to(keys.scale.dtype)
    return weight_BD if keys.gain is None else weight_BD * keys.gain[block, None]


def _blocks(keys: Keys) -> Iterator[slice]:
    count = keys.weight.shape[0]
    for start in range(0, count, BLOCK_PROTOTYPES):
        yield slice(start, min(start + BLOCK_PROTOTYPES, count))


def _chunks(queries: Sequence[Query], prototypes: int) -> Iterator[dict[int, Query]]:
    """Chunks of the queries' rows, each a map from query index to the rows it holds. Queries of 0 rows are in the first."""
    ends = list(itertools.accumulate(query.rows.shape[0] for query in queries))
    for chunk in _row_chunks(ends[-1], prototypes, queries[0].keys.scale.dtype):
        segments = {}
        for index, (query, end) in enumerate(zip(queries, ends, strict=True)):
            start = end - query.rows.shape[0]
            mine = slice(max(chunk.start, start) - start, min(chunk.stop, end) - start)
            if mine.start < mine.stop or (chunk.start == 0 and start == end):
                segments[index] = _rows_of(query, slice(mine.start, max(mine.start, mine.stop)))
        yield segments


def _row_chunks(rows: int, prototypes: int, dtype: torch.dtype) -> Iterator[slice]:
    """Chunks of nearly equal size whose probabilities fit the workspace; one empty chunk for 0 rows."""
    row_bytes = prototypes * dtype.itemsize
    budget = min(WORKSPACE_BYTES, max(LEAST_WORKSPACE_BYTES, int(WORKSPACE_SHARE * rows * row_bytes)))
    most = max(budget // row_bytes, LEAST_CHUNK_ROWS)
    size = max(1, math.ceil(rows / max(1, math.ceil(rows / most))))
    for start in range(0, max(rows, 1), size):
        yield slice(start, min(start + size, rows))


def _columns(segments: list[Query]) -> list[slice]:
    """Where each segment's rows lie among the chunk's columns."""
    ends = list(itertools.accumulate(query.rows.shape[0] for query in segments))
    return [slice(end - query.rows.shape[0], end) for query, end in zip(segments, ends, strict=True)]


def _rows_of(query: Query, rows: slice) -> Query:
    return query._replace(
        rows=query.rows[rows],
        cotangents=None if query.cotangents is None else query.cotangents[rows],
        weights=None if query.weights is None else query.weights[:, rows],
    )


def _joined(parts: list[Assignment]) -> Assignment:
    if len(parts) == 1:
        return parts[0]
    return Assignment(
        log_sum_exp=torch.cat([part.log_sum_exp for part in parts]),
        entropy=torch.cat([part.entropy for part in parts]),
        barycentre=_cat([part.barycentre for part in parts]),
    )


def _cat(parts: list[Tensor | None]) -> Tensor | None:
    present = [part for part in parts if part is not None]
    return torch.cat(present) if present else None
