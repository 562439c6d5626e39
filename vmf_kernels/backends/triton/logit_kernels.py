"""Kernels of the cross-entropy from stored logits; ``backends.triton.logits`` launches them.

A program owns one tile of prototypes and a group of images. So every sum over rows (usage, bias gradient) stays in its
registers. Every sum over prototypes is written as one partial sum per tile, which a second kernel merges in the order of the
tiles: no atomics, the same bits every time. A program of the forward pass is one warp, so its sums over a tile are shuffles
without a barrier.

Legend: S / T student / teacher rows, G / V teacher / student views, B images, K prototypes. Row v * B + b is view v of image
b. Everything logarithmic is base 2; sums are fp32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vmf_kernels.backends.triton.blocks import LN_2, LOG2_E
from vmf_kernels.prototypes import LOWEST_BIAS

LOWEST_NATS = tl.constexpr(LOWEST_BIAS)
LOWEST = tl.constexpr(LOWEST_BIAS * 1.4426950408889634)  # stands for -inf, whose product with 0 would be NaN
OUTSIDE = tl.constexpr(2 * LOWEST_BIAS * 1.4426950408889634)  # past the last prototype: 2^(OUTSIDE - any score) is 0


@triton.jit
def load_scale(p_temperature):
    """log2(e) / tau, fp32: one factor turns a logit into a base-2 score."""
    return (1.0 / tl.load(p_temperature) * LOG2_E).to(tl.float32)


@triton.jit
def load_bias(p_bias, o_k, m_k):
    """[BLOCK_K] base-2 bias, or 0 without a bias; -inf becomes LOWEST."""
    if p_bias is None:
        b_scaled = 0.0
    else:
        b_bias = tl.load(p_bias + o_k, mask=m_k, other=0.0).to(tl.float32)
        b_scaled = tl.maximum(b_bias, LOWEST_NATS, propagate_nan=tl.PropagateNan.ALL) * LOG2_E
    return b_scaled


@triton.jit
def load_scores(p_logits, row, stride, o_k, m_k, scale, b_bias, WHOLE: tl.constexpr):
    """[BLOCK_K] base-2 scores of a tile of one row, fp32; -inf past the last prototype."""
    p_row = p_logits + tl.cast(row, tl.int64) * stride  # rows * K may exceed 2^31
    b_logits = tl.load(p_row + o_k) if WHOLE else tl.load(p_row + o_k, mask=m_k, other=-float("inf"))
    return b_logits.to(tl.float32) * scale + b_bias


@triton.jit
def moments(b_scores, m_k, WHOLE: tl.constexpr):
    """A tile's maximum and, relative to it, [BLOCK_K] scores, their mass ``sum 2^score`` and spread ``sum 2^score score``."""
    # propagate NaN: a NaN logit must make the loss NaN
    b_scores = tl.maximum(b_scores, LOWEST, propagate_nan=tl.PropagateNan.ALL)
    if not WHOLE:
        b_scores = tl.where(m_k, b_scores, OUTSIDE)
    top = tl.max(b_scores, axis=0)
    b_deviation = b_scores - top
    b_unnormalized = tl.exp2(b_deviation)
    return top, b_deviation, tl.sum(b_unnormalized, axis=0), tl.sum(b_unnormalized * b_deviation, axis=0)


@triton.jit
def load_teachers(
    p_logits, stride, p_top, p_log_mass, i_b, images, o_k, m_k, scale, b_bias, G: tl.constexpr, WHOLE: tl.constexpr
):
    """Probabilities of one image's teacher rows in a tile: a tuple of G times [BLOCK_K].

    Computed from maximum and log-mass, or from their sum in ``p_top``, whose rounding depends on the row's common offset.
    """
    q = ()
    for g in tl.static_range(G):
        b_scores = load_scores(p_logits, g * images + i_b, stride, o_k, m_k, scale, b_bias, WHOLE)
        b_deviation = b_scores - tl.load(p_top + i_b * G + g)
        if p_log_mass is not None:
            b_deviation -= tl.load(p_log_mass + i_b * G + g)
        q = q + (tl.exp2(b_deviation),)
    return q


@triton.jit
def weighted_teachers(q, p_pair_weights, v, views, G: tl.constexpr):
    """[BLOCK_K] ``sum_g w_gv q_g``: the target of student view v."""
    b_target = tl.load(p_pair_weights + v) * q[0]
    for g in tl.static_range(1, G):
        b_target += tl.load(p_pair_weights + g * views + v) * q[g]
    return b_target


@triton.jit(do_not_specialize=["rows", "rows_per_group"])
def teacher_tiles_kernel(
    p_logits,
    stride,
    p_bias,
    p_temperature,
    p_partials,  # [3, T, tiles] maximum, mass, spread
    rows,
    prototypes,
    rows_per_group,
    WHOLE: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The contribution of each tile of a teacher row to its softmax. Grid (tiles, groups of rows)."""
    i_tile, tiles = tl.program_id(0), tl.num_programs(0)
    o_k = i_tile * BLOCK_K + tl.arange(0, BLOCK_K)
    m_k = o_k < prototypes
    scale, b_bias = load_scale(p_temperature), load_bias(p_bias, o_k, m_k)
    step = tl.cast(rows, tl.int64) * tiles
    first = tl.program_id(1) * rows_per_group
    for row in tl.range(first, tl.minimum(first + rows_per_group, rows)):
        b_scores = load_scores(p_logits, row, stride, o_k, m_k, scale, b_bias, WHOLE)
        top, _, mass, spread = moments(b_scores, m_k, WHOLE)
        p_row = p_partials + tl.cast(row, tl.int64) * tiles + i_tile
        tl.store(p_row, top)
        tl.store(p_row + step, mass)
        tl.store(p_row + 2 * step, spread)


@triton.jit(do_not_specialize=["images", "images_per_group"])
def student_tiles_kernel(
    p_student,
    student_stride,
    p_student_bias,
    p_student_temperature,
    p_teacher,
    teacher_stride,
    p_teacher_bias,
    p_teacher_temperature,
    p_teacher_softmax,  # [2, B, G] maximum, log-mass
    p_pair_weights,  # [G, V]
    p_teacher_mass,  # [G] sum of the pair weights over the students
    p_image_weights,  # [B]
    p_partials,  # [4, S, tiles] maximum, mass, spread, alignment with the teachers
    p_teacher_sums,  # [T, tiles] summed teacher probability
    p_usage,  # [groups, K] weighted sum of the teachers' probabilities
    images,
    prototypes,
    views,
    images_per_group,
    G: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The contribution of each tile of a student row to its softmax and to its loss. Grid (tiles, groups of images).

    The teacher's log-sum-exp is final, and so are its probabilities: this second read of the teacher gives both loss and
    usage. The student is read once.
    """
    i_tile, tiles = tl.program_id(0), tl.num_programs(0)
    o_k = i_tile * BLOCK_K + tl.arange(0, BLOCK_K)
    m_k = o_k < prototypes
    scale, b_bias = load_scale(p_student_temperature), load_bias(p_student_bias, o_k, m_k)
    t_scale, b_t_bias = load_scale(p_teacher_temperature), load_bias(p_teacher_bias, o_k, m_k)
    step = tl.cast(images, tl.int64) * views * tiles
    p_top, p_log_mass = p_teacher_softmax, p_teacher_softmax + images * G
    b_usage = tl.zeros([BLOCK_K], tl.float32)
    first = tl.program_id(1) * images_per_group
    for i_b in tl.range(first, tl.minimum(first + images_per_group, images)):
        q = load_teachers(
            p_teacher, teacher_stride, p_top, p_log_mass, i_b, images, o_k, m_k, t_scale, b_t_bias, G, WHOLE
        )
        for v in tl.range(0, views):
            row = tl.cast(v, tl.int64) * images + i_b
            b_scores = load_scores(p_student, row, student_stride, o_k, m_k, scale, b_bias, WHOLE)
            top, b_deviation, mass, spread = moments(b_scores, m_k, WHOLE)
            alignment = tl.sum(weighted_teachers(q, p_pair_weights, v, views, G) * b_deviation, axis=0)
            p_row = p_partials + row * tiles + i_tile
            tl.store(p_row, top)
            tl.store(p_row + step, mass)
            tl.store(p_row + 2 * step, spread)
            tl.store(p_row + 3 * step, alignment)
        # after the students, because a compiler moves no loads above a store
        weight = tl.load(p_image_weights + i_b)
        for g in tl.static_range(G):
            b_usage += (weight * tl.load(p_teacher_mass + g)) * q[g]
            tl.store(p_teacher_sums + tl.cast(g * images + i_b, tl.int64) * tiles + i_tile, tl.sum(q[g], axis=0))
    tl.store(p_usage + tl.cast(tl.program_id(1), tl.int64) * prototypes + o_k, b_usage, mask=m_k)


@triton.jit
def merged_moments(p_row, step, tiles, BLOCK_T: tl.constexpr):
    """A row's maximum and, relative to it, mass and spread, merged from its tiles in a fixed order."""
    o_t = tl.arange(0, BLOCK_T)
    b_top = tl.full([BLOCK_T], LOWEST, tl.float32)
    for i_t in tl.range(0, tiles, BLOCK_T):
        b_top = tl.maximum(b_top, tl.load(p_row + i_t + o_t, mask=i_t + o_t < tiles, other=LOWEST))
    top = tl.max(b_top, axis=0)
    b_mass, b_spread = tl.zeros([BLOCK_T], tl.float32), tl.zeros([BLOCK_T], tl.float32)
    for i_t in tl.range(0, tiles, BLOCK_T):
        m_t = i_t + o_t < tiles
        b_shift = tl.load(p_row + i_t + o_t, mask=m_t, other=LOWEST) - top
        b_decay = tl.exp2(b_shift)
        b_tile_mass = tl.load(p_row + step + i_t + o_t, mask=m_t, other=0.0)
        b_mass += b_decay * b_tile_mass
        b_spread += b_decay * (tl.load(p_row + 2 * step + i_t + o_t, mask=m_t, other=0.0) + b_shift * b_tile_mass)
    return top, tl.sum(b_mass, axis=0), tl.sum(b_spread, axis=0)


@triton.jit(do_not_specialize=["images", "tiles"])
def merge_teacher_kernel(
    p_partials,  # [3, T, tiles]
    p_teacher_mass,  # [G]
    p_image_weights,  # [B]
    p_softmax,  # [2, B, G] maximum, log-mass
    p_lse,  # [B, G] their sum
    p_entropy,  # [T] weighted, nats
    images,
    tiles,
    G: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Softmax statistics of one teacher row from its tiles. Grid (T,)."""
    row, rows = tl.program_id(0), tl.num_programs(0)
    i_g, i_b = row // images, row % images
    step = tl.cast(rows, tl.int64) * tiles
    top, mass, spread = merged_moments(p_partials + tl.cast(row, tl.int64) * tiles, step, tiles, BLOCK_T)
    weight = tl.load(p_image_weights + i_b) * tl.load(p_teacher_mass + i_g)
    o_row = i_b * G + i_g
    tl.store(p_softmax + o_row, top)
    tl.store(p_softmax + rows + o_row, tl.log2(mass))
    tl.store(p_lse + o_row, top + tl.log2(mass))
    tl.store(p_entropy + row, weight * (tl.log2(mass) - spread / mass) * LN_2)


@triton.jit(do_not_specialize=["images", "tiles"])
def merge_student_kernel(
    p_partials,  # [4, S, tiles]
    p_teacher_sums,  # [T, tiles]
    p_pair_weights,  # [G, V]
    p_student_mass,  # [V] sum of the pair weights over the teachers
    p_image_weights,  # [B]
    p_lse,  # [B, V]
    p_terms,  # [2, S] weighted cross-entropy and entropy, nats
    images,
    tiles,
    views,
    G: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Softmax statistics and loss of one student row from its tiles. Grid (S,)."""
    row, rows = tl.program_id(0), tl.num_programs(0)
    i_v, i_b = row // images, row % images
    step = tl.cast(rows, tl.int64) * tiles
    p_row = p_partials + tl.cast(row, tl.int64) * tiles
    top, mass, spread = merged_moments(p_row, step, tiles, BLOCK_T)
    o_t = tl.arange(0, BLOCK_T)
    b_alignment = tl.zeros([BLOCK_T], tl.float32)
    for i_t in tl.range(0, tiles, BLOCK_T):
        m_t = i_t + o_t < tiles
        # a tile's alignment is relative to the tile's maximum: sum_k target (score - top) needs the target's sum in the tile
        b_target = tl.zeros([BLOCK_T], tl.float32)
        for g in tl.static_range(G):
            p_sums = p_teacher_sums + tl.cast(g * images + i_b, tl.int64) * tiles + i_t
            b_target += tl.load(p_pair_weights + g * views + i_v) * tl.load(p_sums + o_t, mask=m_t, other=0.0)
        b_shift = tl.load(p_row + i_t + o_t, mask=m_t, other=LOWEST) - top
        b_alignment += tl.load(p_row + 3 * step + i_t + o_t, mask=m_t, other=0.0) + b_shift * b_target
    weight, student_mass = tl.load(p_image_weights + i_b), tl.load(p_student_mass + i_v)
    # log p relative to the row's maximum, so that a common offset of the row has no effect
    cross = student_mass * tl.log2(mass) - tl.sum(b_alignment, axis=0)
    tl.store(p_lse + tl.cast(i_b, tl.int64) * views + i_v, top + tl.log2(mass))
    tl.store(p_terms + row, weight * cross * LN_2)
    tl.store(p_terms + rows + row, weight * student_mass * (tl.log2(mass) - spread / mass) * LN_2)


@triton.jit(do_not_specialize=["images", "images_per_group"])
def gradient_kernel(
    p_loss_gradient,  # []
    p_student,
    student_stride,
    p_student_bias,
    p_student_temperature,
    p_student_lse,  # [B, V]
    p_teacher,
    teacher_stride,
    p_teacher_bias,
    p_teacher_temperature,
    p_teacher_lse,  # [B, G]
    p_pair_weights,  # [G, V]
    p_student_mass,  # [V]
    p_image_weights,  # [B]
    p_gradient,  # [S, K]
    p_bias_gradient,  # [groups, K] or None
    images,
    prototypes,
    views,
    images_per_group,
    G: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``w_b (n_v p_vb - sum_g w_gv q_gb) / tau`` times the loss's gradient. Grid (tiles, groups of images)."""
    i_tile = tl.program_id(0)
    o_k = i_tile * BLOCK_K + tl.arange(0, BLOCK_K)
    m_k = o_k < prototypes
    scale, b_bias = load_scale(p_student_temperature), load_bias(p_student_bias, o_k, m_k)
    t_scale, b_t_bias = load_scale(p_teacher_temperature), load_bias(p_teacher_bias, o_k, m_k)
    loss_gradient = tl.load(p_loss_gradient).to(tl.float32)
    to_logits = (1.0 / tl.load(p_student_temperature)).to(tl.float32)
    b_bias_gradient = tl.zeros([BLOCK_K], tl.float32)
    first = tl.program_id(1) * images_per_group
    for i_b in tl.range(first, tl.minimum(first + images_per_group, images)):
        q = load_teachers(
            p_teacher, teacher_stride, p_teacher_lse, None, i_b, images, o_k, m_k, t_scale, b_t_bias, G, WHOLE
        )
        # scaled in fp32 before the cast: under a GradScaler the unscaled gradient would underflow in fp16
        weight = tl.load(p_image_weights + i_b) * loss_gradient
        for v in tl.range(0, views):
            row = tl.cast(v, tl.int64) * images + i_b
            b_scores = load_scores(p_student, row, student_stride, o_k, m_k, scale, b_bias, WHOLE)
            b_p = tl.exp2(b_scores - tl.load(p_student_lse + tl.cast(i_b, tl.int64) * views + v))
            b_target = weighted_teachers(q, p_pair_weights, v, views, G)
            b_score_gradient = (tl.load(p_student_mass + v) * b_p - b_target) * weight
            b_bias_gradient += b_score_gradient
            b_gradient = (b_score_gradient * to_logits).to(p_gradient.dtype.element_ty)
            tl.store(p_gradient + row * prototypes + o_k, b_gradient, mask=m_k)
    if p_bias_gradient is not None:
        p_sum = p_bias_gradient + tl.cast(tl.program_id(1), tl.int64) * prototypes
        tl.store(p_sum + o_k, b_bias_gradient, mask=m_k)
