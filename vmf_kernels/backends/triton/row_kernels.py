"""The row pass: soft assignment of rows to prototypes with an online softmax, in parts that ``merge_kernel`` merges.

Legend: R rows, K prototypes, D embedding dim, all padded to whole tiles; N splits of the prototypes. Base-2 logits
``l = scale <x, w> + bias`` throughout.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vmf_kernels.backends.triton.blocks import (
    LN_2,
    LOG2_E,
    LOWEST,
    add_products,
    inner_products,
    load_block,
    scale_block,
    zero_block,
)


@triton.jit
def assign_rows_kernel(
    rows,
    keys,
    values,
    p_bias,
    p_value_bias,
    p_temperature,
    p_statistics,
    p_barycentre,
    row_count,
    split_size,
    prototype_count,
    N_ROWS: tl.constexpr,
    N_PROTOTYPES: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    VALUE_CHUNKS: tl.constexpr,
    VALUES: tl.constexpr,
    HAS_VALUE_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
):
    """One block of rows against one split of the prototypes: equation (2) of vmf_kernels/README.md, unnormalised.

    Grid (row blocks, splits, parts of the values' columns). Writes [4, N, R] running maximum, mass ``sum 2^(l - max)``, its
    first moment and the summed value bias, and [N, R, D] ``sum 2^(l - max) values``. VALUES: "none", "keys" or "own".
    """
    i_row, i_split, i_part = tl.program_id(0) * N_ROWS, tl.program_id(1), tl.program_id(2)
    width: tl.constexpr = CHUNK * CHUNKS
    i_column = i_part * (CHUNK * VALUE_CHUNKS)
    scale = (1.0 / tl.load(p_temperature) * LOG2_E).to(tl.float32)
    b_rows = load_block(rows, i_row, 0, N_ROWS, CHUNK, CHUNKS, width, TMA)
    top = tl.full([N_ROWS], LOWEST, tl.float32)
    mass = tl.zeros([N_ROWS], tl.float32)
    moment = tl.zeros([N_ROWS], tl.float32)
    value_bias = tl.zeros([N_ROWS], tl.float32)
    barycentre = zero_block(N_ROWS, CHUNK, VALUE_CHUNKS)
    first = i_split * split_size
    last = tl.minimum(first + split_size, prototype_count)
    for i_k in tl.range(first, last, N_PROTOTYPES):
        o_k = i_k + tl.arange(0, N_PROTOTYPES)
        b_keys = load_block(keys, i_k, 0, N_PROTOTYPES, CHUNK, CHUNKS, width, TMA)
        b_logits = inner_products(b_rows, b_keys, CHUNKS, PRECISION) * scale + tl.load(p_bias + o_k)[None, :]
        new_top = tl.maximum(top, tl.max(b_logits, 1))
        shift = top - new_top
        decay = tl.exp2(shift)
        b_deviation = b_logits - new_top[:, None]
        b_p = tl.exp2(b_deviation)
        moment = decay * (moment + shift * mass) + tl.sum(b_p * b_deviation, 1)
        mass = decay * mass + tl.sum(b_p, 1)
        top = new_top
        if HAS_VALUE_BIAS:
            value_bias = decay * value_bias + tl.sum(b_p * tl.load(p_value_bias + o_k)[None, :], 1)
        if VALUES != "none":
            if VALUES == "keys":
                b_values = b_keys
            else:
                b_values = load_block(values, i_k, i_column, N_PROTOTYPES, CHUNK, VALUE_CHUNKS, width, TMA)
            barycentre = scale_block(barycentre, decay[:, None], VALUE_CHUNKS)
            barycentre = add_products(barycentre, b_p, b_values, VALUE_CHUNKS, PRECISION)
    o_row = i_row + tl.arange(0, N_ROWS)
    if i_part == 0:
        p_mine = p_statistics + i_split * row_count + o_row
        step = tl.num_programs(1) * row_count
        tl.store(p_mine, top)
        tl.store(p_mine + step, mass)
        tl.store(p_mine + 2 * step, moment)
        tl.store(p_mine + 3 * step, value_bias)
    if VALUES != "none":
        p_block = p_barycentre + (i_split.to(tl.int64) * row_count + i_row) * width + i_column
        o_tile = tl.arange(0, N_ROWS)[:, None] * width + tl.arange(0, CHUNK)[None, :]
        for chunk in tl.static_range(VALUE_CHUNKS):
            tl.store(p_block + o_tile + chunk * CHUNK, barycentre[chunk])


@triton.jit
def merged_statistics(p_statistics, i_row, row_count, splits, SPLITS: tl.constexpr):
    """(max, mass, moment, value bias) of one row over all its splits, relative to the common maximum."""
    step = splits * row_count
    top = tl.full([], LOWEST, tl.float32)
    for first in tl.range(0, splits, SPLITS):
        o_split = first + tl.arange(0, SPLITS)
        b_top = tl.load(p_statistics + o_split * row_count + i_row, mask=o_split < splits, other=LOWEST)
        top = tl.maximum(top, tl.max(b_top, 0))
    mass = tl.zeros([], tl.float32)
    moment = tl.zeros([], tl.float32)
    value_bias = tl.zeros([], tl.float32)
    for first in tl.range(0, splits, SPLITS):
        o_split = first + tl.arange(0, SPLITS)
        m_split = o_split < splits
        p_mine = p_statistics + o_split * row_count + i_row
        shift = tl.load(p_mine, mask=m_split, other=LOWEST) - top
        weight = tl.exp2(shift)
        b_mass = tl.load(p_mine + step, mask=m_split, other=0.0)
        # a split far below the others has weight 0, and its shift may be too large for a product
        b_moment = tl.load(p_mine + 2 * step, mask=m_split, other=0.0) + tl.where(weight > 0, shift, 0.0) * b_mass
        mass += tl.sum(weight * b_mass, 0)
        moment += tl.sum(weight * b_moment, 0)
        value_bias += tl.sum(weight * tl.load(p_mine + 3 * step, mask=m_split, other=0.0), 0)
    return top, mass, moment, value_bias


@triton.jit
def merged_chunk(
    p_statistics,
    p_barycentre,
    i_row,
    i_column,
    top,
    row_count,
    splits,
    SPLITS: tl.constexpr,
    CHUNK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """[CHUNK] columns of one row's barycentre, summed over the splits in a fixed order, relative to ``top``."""
    o_column = i_column + tl.arange(0, CHUNK)
    total = tl.zeros([CHUNK], tl.float32)
    for first in tl.range(0, splits, SPLITS):
        o_split = first + tl.arange(0, SPLITS)
        m_split = o_split < splits
        weight = tl.exp2(tl.load(p_statistics + o_split * row_count + i_row, mask=m_split, other=LOWEST) - top)
        p_tile = p_barycentre + (o_split.to(tl.int64) * row_count + i_row)[:, None] * WIDTH + o_column[None, :]
        total += tl.sum(weight[:, None] * tl.load(p_tile, mask=m_split[:, None], other=0.0), 0)
    return total


@triton.jit
def row_offset(log_sum_exp, weight, unit):
    """Base-2 offset that makes ``2^(l - offset)`` the probability times ``unit * weight``; +inf for weight 0."""
    return log_sum_exp - tl.log2(unit * weight)


@triton.jit(do_not_specialize=["row_count", "splits"])
def merge_kernel(
    p_statistics,
    p_barycentre,
    p_weight,
    p_unit,
    p_offset,
    p_entropy,
    p_expected_bias,
    p_merged,
    row_count,
    splits,
    SPLITS: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    HAS_VALUES: tl.constexpr,
    HAS_VALUE_BIAS: tl.constexpr,
):
    """Merge the parts of one row.

    Writes [R] the offset of the column pass and, with values, [R] the entropy times the row's weight and the expected value
    bias (nats), and [R, D] the barycentre.
    """
    i_row = tl.program_id(0)
    top, mass, moment, value_bias = merged_statistics(p_statistics, i_row, row_count, splits, SPLITS)
    log_mass = tl.log2(mass)
    weight = tl.load(p_weight + i_row)
    tl.store(p_offset + i_row, row_offset(top + log_mass, weight, tl.load(p_unit)))
    if HAS_VALUES:
        tl.store(p_entropy + i_row, weight * (log_mass - moment / mass) * LN_2)
        if HAS_VALUE_BIAS:
            tl.store(p_expected_bias + i_row, value_bias / mass * LN_2)
        width: tl.constexpr = CHUNK * CHUNKS
        for chunk in tl.static_range(CHUNKS):
            b_barycentre = merged_chunk(
                p_statistics, p_barycentre, i_row, chunk * CHUNK, top, row_count, splits, SPLITS, CHUNK, width
            )
            o_column = chunk * CHUNK + tl.arange(0, CHUNK)
            tl.store(p_merged + i_row.to(tl.int64) * width + o_column, b_barycentre / mass)


@triton.jit(do_not_specialize=["row_count", "splits"])
def merge_log_sum_exp_kernel(
    p_statistics, p_bias, p_log_sum_exp, row_count, splits, SPLITS: tl.constexpr, HAS_BIAS: tl.constexpr
):
    """[R] log-sum-exp of one row, nats, plus the row's own base-2 bias if it has one."""
    i_row = tl.program_id(0)
    top, mass, _, _ = merged_statistics(p_statistics, i_row, row_count, splits, SPLITS)
    log_sum_exp = top + tl.log2(mass)
    if HAS_BIAS:
        log_sum_exp += tl.load(p_bias + i_row)
    tl.store(p_log_sum_exp + i_row, log_sum_exp * LN_2)
