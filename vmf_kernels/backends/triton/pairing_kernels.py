"""Kernels for rows before and after the passes: cast and padding, pairing of views, the loss and its feature gradient.

Legend: S / T student / teacher rows, G / V teacher / student views, B images, D embedding dim. Rows are view-major. Teacher
view g and student view v of the same image are paired with weight ``a_gv r_b`` (``vmf_kernels/pairing.py``).
"""

from __future__ import annotations

import triton
import triton.language as tl

from vmf_kernels.backends.triton.blocks import LN_2
from vmf_kernels.backends.triton.row_kernels import merged_chunk, merged_statistics, row_offset

# Numbers that change from step to step (masked patches); one compiled kernel must work for all values.
VARYING = ["images", "student_views", "teacher_views", "student_padded", "row_count", "splits"]


@triton.jit
def image_weight(p_image_weights, i_image, HAS_IMAGE_WEIGHTS: tl.constexpr):
    """r_b, or 1."""
    weight = 1.0
    if HAS_IMAGE_WEIGHTS:
        weight = tl.load(p_image_weights + i_image)
    return weight


@triton.jit(do_not_specialize=VARYING)
def pack_rows_kernel(
    p_student,
    p_teacher,
    p_view_weights,
    p_image_weights,
    p_student_rows,
    p_teacher_rows,
    p_cotangents,
    p_student_mass,
    p_teacher_mass,
    p_unit,
    images,
    student_views,
    teacher_views,
    student_padded,
    student_stride,
    teacher_stride,
    dim,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_IMAGE_WEIGHTS: tl.constexpr,
    HAS_COTANGENTS: tl.constexpr,
):
    """Cast one row, pad it with zeros, write its weight ``n`` (0 for padding). Grid: padded student rows, then teacher rows.

    For a teacher row it also writes the cotangent ``-sum_v a_gv z_vb / sum_v a_gv``, minus the mean of its student rows. This
    is of order one for any weights, so it stays in the range of fp16. Writes ``unit`` = 1.
    """
    i_program = tl.program_id(0)
    o_column = tl.arange(0, COLUMNS)
    m_dim, m_width = o_column < dim, o_column < WIDTH
    if i_program == 0:
        tl.store(p_unit, 1.0)
    if i_program < student_padded:
        i_row = i_program.to(tl.int64)
        exists = i_row < student_views * images
        b_row = tl.load(p_student + i_row * student_stride + o_column, mask=m_dim & exists, other=0.0)
        tl.store(p_student_rows + i_row * WIDTH + o_column, b_row.to(p_student_rows.dtype.element_ty), mask=m_width)
        mass = 0.0
        if exists:
            view = i_row // images
            for g in tl.range(0, teacher_views):
                mass += tl.load(p_view_weights + g * student_views + view)
            mass *= image_weight(p_image_weights, i_row % images, HAS_IMAGE_WEIGHTS)
        tl.store(p_student_mass + i_row, mass)
    else:
        i_row = (i_program - student_padded).to(tl.int64)
        exists = i_row < teacher_views * images
        b_row = tl.load(p_teacher + i_row * teacher_stride + o_column, mask=m_dim & exists, other=0.0)
        tl.store(p_teacher_rows + i_row * WIDTH + o_column, b_row.to(p_teacher_rows.dtype.element_ty), mask=m_width)
        mass = 0.0
        b_partners = tl.zeros([COLUMNS], tl.float32)
        if exists:
            image = i_row % images
            for v in tl.range(0, student_views):
                weight = tl.load(p_view_weights + (i_row // images) * student_views + v)
                mass += weight
                if HAS_COTANGENTS:
                    p_partner = p_student + (v * images + image) * student_stride
                    b_partners += weight * tl.load(p_partner + o_column, mask=m_dim, other=0.0).to(tl.float32)
            if HAS_COTANGENTS:
                b_partners = b_partners / tl.where(mass == 0, 1.0, mass)
            mass *= image_weight(p_image_weights, image, HAS_IMAGE_WEIGHTS)
        if HAS_COTANGENTS:
            tl.store(
                p_cotangents + i_row * WIDTH + o_column, (-b_partners).to(p_cotangents.dtype.element_ty), mask=m_width
            )
        tl.store(p_teacher_mass + i_row, mass)


@triton.jit(do_not_specialize=VARYING)
def finish_students_kernel(
    p_statistics,
    p_barycentre,
    p_rows,
    p_mass,
    p_unit,
    p_view_weights,
    p_image_weights,
    p_teacher_barycentre,
    p_teacher_bias,
    p_temperature,
    p_offset,
    p_loss,
    p_entropy,
    p_feature_gradient,
    row_count,
    splits,
    images,
    student_views,
    teacher_views,
    dim,
    SPLITS: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    HAS_IMAGE_WEIGHTS: tl.constexpr,
    HAS_VALUE_BIAS: tl.constexpr,
    HAS_GRADIENT: tl.constexpr,
):
    """One student row: equations (3) and (4).

    Writes its share of the loss (fp64, nats) and of the students' entropy, its offset for the column pass, and [D] its gradient
    ``(n_s o_s - sum_t a_ts m_t)/tau_s``.
    """
    i_row = tl.program_id(0)
    width: tl.constexpr = CHUNK * CHUNKS
    top, mass, moment, _ = merged_statistics(p_statistics, i_row, row_count, splits, SPLITS)
    log_mass = tl.log2(mass)
    weight = tl.load(p_mass + i_row)
    tl.store(p_offset + i_row, row_offset(top + log_mass, weight, tl.load(p_unit)))
    tl.store(p_entropy + i_row, weight * (log_mass - moment / mass) * LN_2)
    exists = i_row < student_views * images
    view, image = i_row // tl.maximum(images, 1), i_row % tl.maximum(images, 1)
    scale = 1.0 / tl.load(p_temperature)
    image_factor = 0.0
    if exists:
        image_factor = image_weight(p_image_weights, image, HAS_IMAGE_WEIGHTS)
    alignment = 0.0
    bias = 0.0
    if HAS_VALUE_BIAS & exists:
        for g in tl.range(0, teacher_views):
            pair = tl.load(p_view_weights + g * student_views + view)
            bias += pair * tl.load(p_teacher_bias + g * images + image)
    for chunk in tl.static_range(CHUNKS):
        o_column = chunk * CHUNK + tl.arange(0, CHUNK)
        b_target = tl.zeros([CHUNK], tl.float32)
        if exists:
            for g in tl.range(0, teacher_views):
                pair = tl.load(p_view_weights + g * student_views + view)
                p_target = p_teacher_barycentre + (g * images + image).to(tl.int64) * width
                b_target += pair * tl.load(p_target + o_column)
        b_target = b_target * image_factor
        b_row = tl.load(p_rows + i_row.to(tl.int64) * width + o_column).to(tl.float32)
        alignment += tl.sum(b_target * b_row, 0)
        if HAS_GRADIENT:
            b_own = merged_chunk(
                p_statistics, p_barycentre, i_row, chunk * CHUNK, top, row_count, splits, SPLITS, CHUNK, width
            )
            b_gradient = (weight * (b_own / mass) - b_target) * scale.to(tl.float32)
            m_column = (o_column < dim) & exists
            tl.store(p_feature_gradient + i_row.to(tl.int64) * dim + o_column, b_gradient, mask=m_column)
    # fp64: the three terms nearly cancel if the logits share a large offset
    drawn = alignment.to(tl.float64) * scale + (bias * image_factor).to(tl.float64)
    tl.store(p_loss + i_row, weight.to(tl.float64) * (top + log_mass).to(tl.float64) * LN_2 - drawn)


@triton.jit(do_not_specialize=["student_count", "teacher_count"])
def sum_losses_kernel(
    p_loss_terms,
    p_student_entropy,
    p_teacher_entropy,
    p_teacher_mass,
    p_loss,
    p_summary,
    p_total,
    student_count,
    teacher_count,
    N: tl.constexpr,
):
    """One program: loss [], [3] mean teacher entropy, student entropy and KL, and the sum of all pair weights []; nats.

    Sums run in fp64 in the order of the rows.
    """
    loss = tl.zeros([N], tl.float64)
    student_entropy = tl.zeros([N], tl.float64)
    for first in tl.range(0, student_count, N):
        o_row = first + tl.arange(0, N)
        m_row = o_row < student_count
        loss += tl.load(p_loss_terms + o_row, mask=m_row, other=0.0)
        student_entropy += tl.load(p_student_entropy + o_row, mask=m_row, other=0.0).to(tl.float64)
    teacher_entropy = tl.zeros([N], tl.float64)
    mass = tl.zeros([N], tl.float64)
    for first in tl.range(0, teacher_count, N):
        o_row = first + tl.arange(0, N)
        m_row = o_row < teacher_count
        teacher_entropy += tl.load(p_teacher_entropy + o_row, mask=m_row, other=0.0).to(tl.float64)
        mass += tl.load(p_teacher_mass + o_row, mask=m_row, other=0.0).to(tl.float64)
    total = tl.sum(mass, 0)
    divisor = tl.where(total == 0, 1.0, total)
    teacher_mean = tl.sum(teacher_entropy, 0) / divisor
    tl.store(p_total, total.to(tl.float32))
    tl.store(p_loss, tl.sum(loss, 0).to(tl.float32))
    tl.store(p_summary, teacher_mean.to(tl.float32))
    tl.store(p_summary + 1, (tl.sum(student_entropy, 0) / divisor).to(tl.float32))
    tl.store(p_summary + 2, (tl.sum(loss, 0) / divisor - teacher_mean).to(tl.float32))
