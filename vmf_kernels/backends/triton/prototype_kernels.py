"""Preparation of the prototypes in one pass over the weights, and its backward pass; memory speed limits both.

Legend: K prototypes, D embedding dim; kappa concentration, nu order of the Bessel functions (``vmf_kernels/bessel.py``).
"""

from __future__ import annotations

import triton
import triton.language as tl

from vmf_kernels.backends.triton.blocks import LOG2_E

LARGEST = tl.constexpr(1e18)  # of kappa/nu: its square stays finite, and the expansion is linear long before


@triton.jit
def log1p(x):
    """log(1 + x) for x >= 0: the rounding of 1 + x is divided out again."""
    y = 1.0 + x
    return tl.where(y == 1.0, x, tl.log(y) * (x / (y - 1.0)))


@triton.jit
def polynomial(t, COEFFICIENTS: tl.constexpr):
    """Value at ``t`` of the polynomial with these coefficients of t^0, t^1, ... (Horner)."""
    last: tl.constexpr = len(COEFFICIENTS) - 1
    value = tl.full(t.shape, COEFFICIENTS[last], tl.float32)
    for i in tl.static_range(last):
        value = value * t + COEFFICIENTS[last - 1 - i]
    return value


@triton.jit
def debye_log_constant(kappa, ORDER: tl.constexpr, COEFFICIENTS: tl.constexpr):
    """log C(kappa) - log C(0) by the uniform expansion: ``bessel._debye_log_constant``."""
    z = tl.minimum(kappa / ORDER, LARGEST)
    s = tl.sqrt(1.0 + z * z)
    d = z * (z / (1.0 + s))
    q = polynomial(1.0 / s, COEFFICIENTS)
    return ORDER * (log1p(d * 0.5) - d) + log1p(d) * 0.5 + (d / s) * q


@triton.jit
def debye_ratio(kappa, ORDER: tl.constexpr, SLOPES: tl.constexpr):
    """I_{nu+1}/I_nu by the uniform expansion: ``bessel._debye_ratio``."""
    z = tl.minimum(kappa / ORDER, LARGEST)
    s = tl.sqrt(1.0 + z * z)
    t = 1.0 / s
    return z / (1.0 + s) - (z * t) * t * (polynomial(t, SLOPES) / ORDER)


@triton.jit
def log_vmf_constant(kappa, ORDER: tl.constexpr, STEPS: tl.constexpr, COEFFICIENTS: tl.constexpr, SLOPES: tl.constexpr):
    """log C_D(kappa) - log C_D(0), nats: the expansion at ORDER, then STEPS of the recurrence down to D/2 - 1."""
    log_constant = debye_log_constant(kappa, ORDER, COEFFICIENTS)
    if STEPS > 0:
        ratio = debye_ratio(kappa, ORDER, SLOPES)
        for step in tl.static_range(STEPS):
            scaled = kappa * ratio
            log_constant -= log1p(scaled / (2 * (ORDER - step)))
            ratio = kappa / (2 * (ORDER - step) + scaled)
    return log_constant


@triton.jit
def mean_resultant_length(kappa, ORDER: tl.constexpr, STEPS: tl.constexpr, SLOPES: tl.constexpr):
    """A_D(kappa), minus the slope of ``log_vmf_constant``."""
    ratio = debye_ratio(kappa, ORDER, SLOPES)
    for step in tl.static_range(STEPS):
        ratio = kappa / (2 * (ORDER - step) + kappa * ratio)
    return ratio


@triton.jit
def reciprocal_or_zero(norm):
    """1/norm; 0 for a row of zeros, which has no direction: it stays zero and gets no gradient."""
    return tl.where(norm > 0, 1.0 / norm, 0.0)


@triton.jit
def base_2_bias(
    norm,
    o_k,
    p_extra_bias,
    p_temperature,
    prototype_count,
    lowest_bias,
    VMF: tl.constexpr,
    HAS_EXTRA_BIAS: tl.constexpr,
    ORDER: tl.constexpr,
    STEPS: tl.constexpr,
    COEFFICIENTS: tl.constexpr,
    SLOPES: tl.constexpr,
):
    """``log2(e) (extra bias + log C_D(||w_k||/tau))`` of prototypes ``o_k``; that of the padding is lower than any other."""
    m_k = o_k < prototype_count
    bias = tl.zeros(o_k.shape, tl.float32)
    if HAS_EXTRA_BIAS:
        bias = tl.load(p_extra_bias + o_k, mask=m_k, other=0.0).to(tl.float32)
    if VMF:
        kappa = norm * (1.0 / tl.load(p_temperature).to(tl.float32))
        bias += log_vmf_constant(kappa, ORDER, STEPS, COEFFICIENTS, SLOPES)
    bias = tl.where(bias < lowest_bias, lowest_bias, bias)  # not maximum, which would hide a NaN
    return tl.where(m_k, bias, 2 * lowest_bias) * LOG2_E  # far below the bias of a prototype that a -inf excludes


@triton.jit
def effective_block(
    p_weight,
    p_magnitude,
    p_packed,
    o_k,
    prototype_count,
    dim,
    stride,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    KIND: tl.constexpr,
):
    """Write [., WIDTH] ``w_k`` of prototypes ``o_k``, cast, padded with zeros; return their norms. README, equation (1)."""
    o_column = tl.arange(0, COLUMNS)
    m_k = o_k < prototype_count
    o_row = o_k.to(tl.int64)[:, None]
    m_tile = m_k[:, None] & (o_column < dim)[None, :]
    b_weight = tl.load(p_weight + o_row * stride + o_column[None, :], mask=m_tile, other=0.0).to(tl.float32)
    norm = tl.sqrt(tl.sum(b_weight * b_weight, 1))
    if KIND == "weight_norm":
        magnitude = tl.load(p_magnitude + o_k, mask=m_k, other=0.0).to(tl.float32)
        b_weight = b_weight * (magnitude * reciprocal_or_zero(norm))[:, None]
        norm = tl.abs(magnitude)
    elif KIND == "normalized":
        b_weight = b_weight * reciprocal_or_zero(norm)[:, None]
    p_tile = p_packed + o_row * WIDTH + o_column[None, :]
    tl.store(p_tile, b_weight.to(p_packed.dtype.element_ty), mask=(o_column < WIDTH)[None, :])
    return norm


@triton.jit
def pack_prototypes_kernel(
    p_weight,
    p_magnitude,
    p_extra_bias,
    p_temperature,
    p_packed,
    p_bias,
    p_norm,
    prototype_count,
    dim,
    stride,
    lowest_bias,
    N: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    KIND: tl.constexpr,
    VMF: tl.constexpr,
    HAS_EXTRA_BIAS: tl.constexpr,
    KEEPS_NORMS: tl.constexpr,
    ORDER: tl.constexpr,
    STEPS: tl.constexpr,
    COEFFICIENTS: tl.constexpr,
    SLOPES: tl.constexpr,
):
    """Pack N stored prototypes for the passes: effective, cast, padded with zeros to whole tiles, with their bias.

    Writes [K padded, WIDTH] ``w_k``, [K padded] ``base_2_bias`` and, if KEEPS_NORMS, [K padded] norms. KIND: "linear",
    "normalized" or "weight_norm".
    """
    o_k = tl.program_id(0) * N + tl.arange(0, N)
    norm = effective_block(p_weight, p_magnitude, p_packed, o_k, prototype_count, dim, stride, COLUMNS, WIDTH, KIND)
    if KEEPS_NORMS:
        tl.store(p_norm + o_k, norm)
    bias = base_2_bias(
        norm,
        o_k,
        p_extra_bias,
        p_temperature,
        prototype_count,
        lowest_bias,
        VMF,
        HAS_EXTRA_BIAS,
        ORDER,
        STEPS,
        COEFFICIENTS,
        SLOPES,
    )
    tl.store(p_bias + o_k, bias)


@triton.jit
def pack_networks_kernel(
    p_student_weight,
    p_student_magnitude,
    p_student_temperature,
    p_student_packed,
    p_student_bias,
    student_stride,
    p_teacher_weight,
    p_teacher_magnitude,
    p_teacher_extra_bias,
    p_teacher_temperature,
    p_teacher_packed,
    p_teacher_bias,
    teacher_stride,
    prototype_count,
    dim,
    lowest_bias,
    N: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    STUDENT_KIND: tl.constexpr,
    TEACHER_KIND: tl.constexpr,
    STUDENT_VMF: tl.constexpr,
    TEACHER_VMF: tl.constexpr,
    HAS_EXTRA_BIAS: tl.constexpr,
    ORDER: tl.constexpr,
    STEPS: tl.constexpr,
    COEFFICIENTS: tl.constexpr,
    SLOPES: tl.constexpr,
):
    """``pack_prototypes_kernel`` for both networks, of the same K and D. Grid (blocks of prototypes, networks)."""
    o_k = tl.program_id(0) * N + tl.arange(0, N)
    if tl.program_id(1) == 0:
        norm = effective_block(
            p_student_weight,
            p_student_magnitude,
            p_student_packed,
            o_k,
            prototype_count,
            dim,
            student_stride,
            COLUMNS,
            WIDTH,
            STUDENT_KIND,
        )
        bias = base_2_bias(
            norm,
            o_k,
            p_student_temperature,  # not read: the student's logits have no other bias
            p_student_temperature,
            prototype_count,
            lowest_bias,
            STUDENT_VMF,
            False,
            ORDER,
            STEPS,
            COEFFICIENTS,
            SLOPES,
        )
        tl.store(p_student_bias + o_k, bias)
    else:
        norm = effective_block(
            p_teacher_weight,
            p_teacher_magnitude,
            p_teacher_packed,
            o_k,
            prototype_count,
            dim,
            teacher_stride,
            COLUMNS,
            WIDTH,
            TEACHER_KIND,
        )
        bias = base_2_bias(
            norm,
            o_k,
            p_teacher_extra_bias,
            p_teacher_temperature,
            prototype_count,
            lowest_bias,
            TEACHER_VMF,
            HAS_EXTRA_BIAS,
            ORDER,
            STEPS,
            COEFFICIENTS,
            SLOPES,
        )
        tl.store(p_teacher_bias + o_k, bias)


@triton.jit
def bias_kernel(
    p_norm,
    p_extra_bias,
    p_temperature,
    p_bias,
    prototype_count,
    lowest_bias,
    N: tl.constexpr,
    VMF: tl.constexpr,
    HAS_EXTRA_BIAS: tl.constexpr,
    ORDER: tl.constexpr,
    STEPS: tl.constexpr,
    COEFFICIENTS: tl.constexpr,
    SLOPES: tl.constexpr,
):
    """[K padded] ``base_2_bias`` at another bias or temperature, from norms [K padded] that have been kept."""
    o_k = tl.program_id(0) * N + tl.arange(0, N)
    bias = base_2_bias(
        tl.load(p_norm + o_k),
        o_k,
        p_extra_bias,
        p_temperature,
        prototype_count,
        lowest_bias,
        VMF,
        HAS_EXTRA_BIAS,
        ORDER,
        STEPS,
        COEFFICIENTS,
        SLOPES,
    )
    tl.store(p_bias + o_k, bias)


@triton.jit
def pull_back_kernel(
    p_gradient,
    p_weight,
    p_magnitude,
    p_bias_gradient,
    p_temperature,
    p_magnitude_gradient,
    prototype_count,
    dim,
    stride,
    N: tl.constexpr,
    COLUMNS: tl.constexpr,
    KIND: tl.constexpr,
    VMF: tl.constexpr,
    ORDER: tl.constexpr,
    STEPS: tl.constexpr,
    SLOPES: tl.constexpr,
):
    """From N rows of the gradient at ``w_k`` to the stored weight, in place, and [K] to the magnitude: equation (7)."""
    o_k = tl.program_id(0) * N + tl.arange(0, N)
    o_column = tl.arange(0, COLUMNS)
    m_k = o_k < prototype_count
    o_row = o_k.to(tl.int64)[:, None]
    m_tile = m_k[:, None] & (o_column < dim)[None, :]
    p_tile = p_gradient + o_row * dim + o_column[None, :]
    b_weight = tl.load(p_weight + o_row * stride + o_column[None, :], mask=m_tile, other=0.0).to(tl.float32)
    b_gradient = tl.load(p_tile, mask=m_tile, other=0.0)
    norm = tl.sqrt(tl.sum(b_weight * b_weight, 1))
    inverse_norm = reciprocal_or_zero(norm)
    magnitude = norm
    if KIND == "weight_norm":
        magnitude = tl.load(p_magnitude + o_k, mask=m_k, other=0.0).to(tl.float32)
    radial = tl.zeros([N], tl.float32)  # loss gradient at ||w_k||, through the normaliser
    if VMF:
        scale = 1.0 / tl.load(p_temperature).to(tl.float32)
        length = mean_resultant_length(tl.abs(magnitude) * scale, ORDER, STEPS, SLOPES)
        radial = -tl.load(p_bias_gradient + o_k, mask=m_k, other=0.0) * length * scale
    if KIND == "linear":
        b_gradient += b_weight * (radial * inverse_norm)[:, None]
    else:
        along = tl.sum(b_gradient * b_weight, 1) * inverse_norm
        gain = inverse_norm
        if KIND == "weight_norm":
            gain = magnitude * inverse_norm
            sign = tl.where(magnitude > 0, 1.0, tl.where(magnitude < 0, -1.0, 0.0))
            tl.store(p_magnitude_gradient + o_k, along + radial * sign, mask=m_k)
        b_gradient = (b_gradient - b_weight * (along * inverse_norm)[:, None]) * gain[:, None]
    tl.store(p_tile, b_gradient, mask=m_tile)


@triton.jit
def scale_kernel(p_values, p_factor, count, N: tl.constexpr):
    """Values times a factor, in place. If the factor is 1, the usual gradient of a loss, they are not touched."""
    factor = tl.load(p_factor).to(tl.float32)
    if factor != 1.0:
        o_value = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
        m_value = o_value < count
        tl.store(p_values + o_value, tl.load(p_values + o_value, mask=m_value) * factor, mask=m_value)
