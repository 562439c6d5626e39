"""The column pass: sums over rows for each prototype, equations (5) and (6); one program owns a block of prototypes.

Programs write to separate memory, each in the order of the rows and without atomics, so results are bitwise repeatable.

Legend: S / T student / teacher rows, K prototypes, D embedding dim, all padded to whole tiles. The offset of row r contains its
weight: ``2^(l - offset_r) = unit n_r p_r`` with ``offset_r = lse_r - log2(unit n_r)``; a row without weight has offset +inf.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vmf_kernels.backends.triton.blocks import (
    LOG2_E,
    add_products,
    inner_products,
    load_block,
    scale_block,
    zero_block,
)


@triton.jit
def weighted_probabilities(b_keys, b_bias, b_rows, b_offset, scale, CHUNKS: tl.constexpr, PRECISION: tl.constexpr):
    """[N_PROTOTYPES, N_ROWS] ``unit n_r p_r(k)``, fp32."""
    b_logits = inner_products(b_keys, b_rows, CHUNKS, PRECISION) * scale + (b_bias[:, None] - b_offset[None, :])
    return tl.exp2(b_logits)


@triton.jit
def gather_rows(
    vectors,
    keys,
    b_bias,
    rows,
    cotangents,
    p_offset,
    scale,
    row_count,
    i_k,
    i_column,
    N_ROWS: tl.constexpr,
    N_PROTOTYPES: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    VALUE_CHUNKS: tl.constexpr,
    COTANGENTS: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
):
    """(vectors + ``sum_r unit n_r p_r cotangent_r``, ``sum_r unit n_r p_r``) for one block of prototypes.

    COTANGENTS: "none", "rows" (the rows themselves) or "own".
    """
    width: tl.constexpr = CHUNK * CHUNKS
    b_keys = load_block(keys, i_k, 0, N_PROTOTYPES, CHUNK, CHUNKS, width, TMA)
    mass = tl.zeros([N_PROTOTYPES], tl.float32)
    for i_row in tl.range(0, row_count, N_ROWS):
        b_rows = load_block(rows, i_row, 0, N_ROWS, CHUNK, CHUNKS, width, TMA)
        b_offset = tl.load(p_offset + i_row + tl.arange(0, N_ROWS))
        b_p = weighted_probabilities(b_keys, b_bias, b_rows, b_offset, scale, CHUNKS, PRECISION)
        mass += tl.sum(b_p, 1)
        if COTANGENTS != "none":
            if COTANGENTS == "rows":
                b_cotangents = b_rows
            else:
                b_cotangents = load_block(cotangents, i_row, i_column, N_ROWS, CHUNK, VALUE_CHUNKS, width, TMA)
            vectors = add_products(vectors, b_p, b_cotangents, VALUE_CHUNKS, PRECISION)
    return vectors, mass


@triton.jit
def store_vectors(
    p_vectors,
    vectors,
    i_k,
    i_column,
    factor,
    prototype_count,
    dim,
    N_PROTOTYPES: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Store ``factor * vectors`` into [K, D], without the padding."""
    o_k = i_k + tl.arange(0, N_PROTOTYPES)
    vectors = scale_block(vectors, factor, CHUNKS)
    for chunk in tl.static_range(CHUNKS):
        o_column = i_column + chunk * CHUNK + tl.arange(0, CHUNK)
        m_tile = (o_k < prototype_count)[:, None] & (o_column < dim)[None, :]
        tl.store(p_vectors + o_k.to(tl.int64)[:, None] * dim + o_column[None, :], vectors[chunk], mask=m_tile)


@triton.jit
def store_masses(
    p_usage,
    p_bias_gradient,
    usage,
    bias_gradient,
    p_total,
    i_k,
    prototype_count,
    unit,
    N_PROTOTYPES: tl.constexpr,
    HAS_STUDENTS: tl.constexpr,
):
    """Store [K] mean teacher probability and, with students, [K] beta of equation (6)."""
    o_k = i_k + tl.arange(0, N_PROTOTYPES)
    m_k = o_k < prototype_count
    total = tl.load(p_total)
    total = tl.where(total == 0, 1.0, total)
    tl.store(p_usage + o_k, usage / unit / total, mask=m_k)
    if HAS_STUDENTS:
        tl.store(p_bias_gradient + o_k, bias_gradient / unit, mask=m_k)


@triton.jit
def gather_columns_kernel(
    student_keys,
    student_rows,
    teacher_keys,
    teacher_rows,
    cotangents,
    p_student_bias,
    p_teacher_bias,
    p_student_offset,
    p_teacher_offset,
    p_student_temperature,
    p_teacher_temperature,
    p_unit,
    p_total,
    p_vectors,
    p_bias_gradient,
    p_usage,
    student_count,
    teacher_count,
    prototype_count,
    dim,
    N_ROWS: tl.constexpr,
    N_PROTOTYPES: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    VALUE_CHUNKS: tl.constexpr,
    HAS_STUDENTS: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
):
    """Equations (5) and (6): students push the block's prototypes, teachers pull them.

    Grid (blocks of prototypes, parts of the vectors' columns). Writes [K, D]
    ``(sum_s n_s p_s z_s + sum_t n_t q_t cotangent_t) / tau_s``, where a cotangent is minus the mean student row of a teacher
    row; [K] beta; [K] mean teacher probability. Without students, only the last.
    """
    i_k, i_part = tl.program_id(0) * N_PROTOTYPES, tl.program_id(1)
    i_column = i_part * (CHUNK * VALUE_CHUNKS)
    o_k = i_k + tl.arange(0, N_PROTOTYPES)
    unit = tl.load(p_unit)
    vectors = zero_block(N_PROTOTYPES, CHUNK, VALUE_CHUNKS)
    student_mass = tl.zeros([N_PROTOTYPES], tl.float32)
    if HAS_STUDENTS:
        student_temperature = tl.load(p_student_temperature)
        vectors, student_mass = gather_rows(
            vectors,
            student_keys,
            tl.load(p_student_bias + o_k),
            student_rows,
            student_rows,
            p_student_offset,
            (1.0 / student_temperature * LOG2_E).to(tl.float32),
            student_count,
            i_k,
            i_column,
            N_ROWS,
            N_PROTOTYPES,
            CHUNK,
            CHUNKS,
            VALUE_CHUNKS,
            "rows" if VALUE_CHUNKS == CHUNKS else "own",
            PRECISION,
            TMA,
        )
    vectors, teacher_mass = gather_rows(
        vectors,
        teacher_keys,
        tl.load(p_teacher_bias + o_k),
        teacher_rows,
        cotangents,
        p_teacher_offset,
        (1.0 / tl.load(p_teacher_temperature) * LOG2_E).to(tl.float32),
        teacher_count,
        i_k,
        i_column,
        N_ROWS,
        N_PROTOTYPES,
        CHUNK,
        CHUNKS,
        VALUE_CHUNKS,
        "own" if HAS_STUDENTS else "none",
        PRECISION,
        TMA,
    )
    if HAS_STUDENTS:
        factor = (1.0 / (student_temperature * unit)).to(tl.float32)
        store_vectors(
            p_vectors, vectors, i_k, i_column, factor, prototype_count, dim, N_PROTOTYPES, CHUNK, VALUE_CHUNKS
        )
    if i_part == 0:
        store_masses(
            p_usage,
            p_bias_gradient,
            teacher_mass,
            student_mass - teacher_mass,
            p_total,
            i_k,
            prototype_count,
            unit,
            N_PROTOTYPES,
            HAS_STUDENTS,
        )
