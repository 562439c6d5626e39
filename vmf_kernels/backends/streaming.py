"""Streaming backend in plain torch: blocks of prototypes, an online softmax, and a workspace of bounded size.

Blocks are laid out [prototypes, rows]: both products with the prototypes then run on tall matrices, which is where a
CPU BLAS is fast when there are few rows. Rows go through in chunks whose unnormalised probabilities fit
``WORKSPACE_BYTES``, so that the column sums need no second product for the logits; nothing grows with rows x prototypes.

Legend: R rows of a chunk, K prototypes, B prototypes of a block, D embedding dim.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vmf_kernels.backends.contract import Assignment, ColumnSums
from vmf_kernels.prototypes import Keys, accumulation_dtype

LOG2_E = 1.4426950408889634
LN_2 = math.log(2.0)
BLOCK_PROTOTYPES = 2048  # with 160 rows 1.3 MiB of fp32: fits L2 (bench/bench_head.py, 2 cores of an EPYC 9004)
WORKSPACE_BYTES = 40 * 2**20  # 160 rows of 65,536 fp32 probabilities, and still in a 32 MiB L3 for the most part
LEAST_CHUNK_ROWS = 16  # fewer rows make the products memory-bound on the prototypes


def unsupported(rows: Tensor, weight: Tensor) -> str | None:
    """None: every floating dtype on every device is supported."""
    return None


def assign(rows_RD: Tensor, keys: Keys, values: Keys | None = None, columns: ColumnSums | None = None) -> Assignment:
    """Soft assignment as in ``contract``, chunk by chunk of rows."""
    dtype = accumulation_dtype(rows_RD.dtype)
    parts = []
    for chunk in _row_chunks(rows_RD.shape[0], keys.weight.shape[0], dtype):
        mine = None if columns is None else _columns_of(columns, chunk)
        parts.append(_assign_chunk(rows_RD[chunk], keys, values, mine))
    if len(parts) == 1:
        return parts[0]
    return Assignment(
        log_sum_exp=torch.cat([part.log_sum_exp for part in parts]),
        entropy=torch.cat([part.entropy for part in parts]),
        barycentre=_cat([part.barycentre for part in parts]),
        expected_bias=_cat([part.expected_bias for part in parts]),
    )


def column_log_sum_exp(rows_RD: Tensor, keys: Keys, offset_R: Tensor) -> Tensor:
    """[K] ``log sum_r exp(l_rk - offset_r)``, chunk by chunk; -inf for 0 rows."""
    dtype = accumulation_dtype(rows_RD.dtype)
    total_K = torch.full((keys.weight.shape[0],), -torch.inf, dtype=dtype, device=rows_RD.device)
    if rows_RD.shape[0] == 0:
        return total_K
    for chunk in _row_chunks(rows_RD.shape[0], keys.weight.shape[0], dtype):
        x_DR = rows_RD[chunk].to(dtype).T * keys.scale
        for block in _blocks(keys):
            logits_BR = _prototype_block(keys, block, dtype) @ x_DR - offset_R[chunk]
            if keys.bias is not None:
                logits_BR += keys.bias[block, None]
            total_K[block] = torch.logaddexp(total_K[block], logits_BR.logsumexp(dim=1))
    return total_K


@dataclass
class _OnlineSoftmax:
    """Running sums of one chunk over the blocks seen so far, relative to the running maximum; base-2 logits."""

    max_R: Tensor
    mass_R: Tensor  # sum of 2^(l - max)
    deviation_R: Tensor  # sum of 2^(l - max) (l - max), for the entropy
    barycentre_DR: Tensor | None
    bias_R: Tensor | None

    @classmethod
    def empty(cls, rows: Tensor, values: Keys | None) -> _OnlineSoftmax:
        count, dim = rows.shape
        zero = rows.new_zeros(count)
        return cls(
            # the lowest finite number, not -inf: (-inf) - (-inf) would be NaN
            max_R=zero + torch.finfo(rows.dtype).min,
            mass_R=zero,
            deviation_R=zero,
            barycentre_DR=None if values is None else rows.new_zeros(dim, count),
            bias_R=None if values is None or values.bias is None else zero,
        )

    def absorb(self, logits_BR: Tensor, out_BR: Tensor) -> Tensor:
        """Take in a block of logits (overwritten); write 2^(l - max) to ``out_BR`` and return it."""
        new_max = torch.maximum(self.max_R, logits_BR.amax(dim=0))
        shift = self.max_R - new_max
        decay = shift.exp2()
        deviation_BR = logits_BR.sub_(new_max)
        p_BR = torch.exp2(deviation_BR, out=out_BR)
        self.deviation_R = decay * (self.deviation_R + shift * self.mass_R) + deviation_BR.mul_(p_BR).sum(dim=0)
        self.mass_R = decay * self.mass_R + p_BR.sum(dim=0)
        self.max_R = new_max
        if self.barycentre_DR is not None:
            self.barycentre_DR *= decay
        if self.bias_R is not None:
            self.bias_R = self.bias_R * decay
        return p_BR

    def result(self) -> Assignment:
        log_mass = self.mass_R.log2()
        return Assignment(
            log_sum_exp=(self.max_R + log_mass) * LN_2,
            entropy=(log_mass - self.deviation_R / self.mass_R) * LN_2,
            barycentre=None if self.barycentre_DR is None else (self.barycentre_DR / self.mass_R).T.contiguous(),
            expected_bias=None if self.bias_R is None else self.bias_R / self.mass_R,
        )


def _assign_chunk(rows: Tensor, keys: Keys, values: Keys | None, columns: ColumnSums | None) -> Assignment:
    dtype = accumulation_dtype(rows.dtype)
    rows_RD = rows.to(dtype)
    x_DR = (rows_RD * (keys.scale * LOG2_E)).T.contiguous()
    count, blocks = keys.weight.shape[0], list(_blocks(keys))
    state = _OnlineSoftmax.empty(rows_RD, values)
    workspace_KR = None if columns is None else rows_RD.new_empty(count, rows.shape[0])
    scratch_BR = rows_RD.new_empty(2, min(BLOCK_PROTOTYPES, count), rows.shape[0])
    maxima = []
    for block in blocks:
        b_keys = _prototype_block(keys, block, dtype)
        b_logits = torch.mm(b_keys, x_DR, out=scratch_BR[0, : b_keys.shape[0]])
        if keys.bias is not None:
            b_logits.add_((keys.bias[block] * LOG2_E)[:, None])
        b_out = scratch_BR[1, : b_keys.shape[0]] if workspace_KR is None else workspace_KR[block]
        b_p = state.absorb(b_logits, b_out)
        maxima.append(state.max_R)
        if values is not None and state.barycentre_DR is not None:
            b_values = b_keys if values.weight is keys.weight else _prototype_block(values, block, dtype)
            state.barycentre_DR.addmm_(b_values.T, b_p)
            if values.bias is not None and state.bias_R is not None:
                state.bias_R = state.bias_R + values.bias[block] @ b_p
    if columns is not None and workspace_KR is not None:
        for block, max_R in zip(blocks, maxima, strict=True):
            # 2^(block max - max) / mass turns a block's unnormalised probabilities into the final ones
            _add_columns(workspace_KR[block], (max_R - state.max_R).exp2() / state.mass_R, columns, block)
    return state.result()


def _add_columns(p_BR: Tensor, normalizer_R: Tensor, columns: ColumnSums, block: slice) -> None:
    if columns.cotangents is not None and columns.vectors is not None:
        columns.vectors[block].addmm_(p_BR, columns.cotangents * normalizer_R[:, None])
    for weights_R, sums_K in zip(columns.weights, columns.sums, strict=True):
        sums_K[block].addmv_(p_BR, weights_R * normalizer_R)


def _prototype_block(keys: Keys, block: slice, dtype: torch.dtype) -> Tensor:
    weight_BD = keys.weight[block].to(dtype)
    return weight_BD if keys.gain is None else weight_BD * keys.gain[block, None]


def _blocks(keys: Keys) -> Iterator[slice]:
    count = keys.weight.shape[0]
    for start in range(0, count, BLOCK_PROTOTYPES):
        yield slice(start, min(start + BLOCK_PROTOTYPES, count))


def _row_chunks(rows: int, prototypes: int, dtype: torch.dtype) -> Iterator[slice]:
    """Chunks of nearly equal size whose probabilities fit the workspace; one empty chunk for 0 rows."""
    most = max(WORKSPACE_BYTES // (prototypes * dtype.itemsize), LEAST_CHUNK_ROWS)
    chunks = max(1, math.ceil(rows / most))
    size = max(1, math.ceil(rows / chunks))
    for start in range(0, max(rows, 1), size):
        yield slice(start, min(start + size, rows))


def _cat(parts: list[Tensor | None]) -> Tensor | None:
    present = [part for part in parts if part is not None]
    return torch.cat(present) if present else None


def _columns_of(columns: ColumnSums, chunk: slice) -> ColumnSums:
    cotangents = None if columns.cotangents is None else columns.cotangents[chunk]
    return columns._replace(cotangents=cotangents, weights=columns.weights[:, chunk])
