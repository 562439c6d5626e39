"""Launches for rows before and after the passes: packing them with their weights, merging their parts.

Legend: S / T student / teacher rows, R rows of either, K prototypes, D embedding dim.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vmf_kernels.backends.contract import LossInputs
from vmf_kernels.backends.triton import launch
from vmf_kernels.backends.triton.pairing_kernels import finish_students_kernel, pack_rows_kernel, sum_losses_kernel
from vmf_kernels.backends.triton.passes import SPLITS_AT_ONCE, Parts
from vmf_kernels.backends.triton.row_kernels import merge_kernel, merge_log_sum_exp_kernel
from vmf_kernels.backends.triton.tiles import Layout

MERGE_WARPS = 4
SUMS_AT_ONCE = 1024
# The unit makes the largest weight of a row about 2^FP16_HEADROOM, near the largest fp16 number: otherwise the probabilities
# of a row that is spread over 65,536 prototypes would be subnormal in fp16
FP16_HEADROOM = 14
LEAST_LARGEST = 2.0**-100  # lower bound of the largest weight: if all weights are 0, the unit must stay finite


class PackedRows(NamedTuple):
    """Both networks' rows, cast to the dtype of the products and padded to whole tiles."""

    student: Tensor  # [S padded, D padded]
    teacher: Tensor  # [T padded, D padded]
    cotangents: Tensor  # [T padded, D padded] minus the mean student row of each teacher row
    student_mass: Tensor  # [S padded] n_s; 0 for padding
    teacher_mass: Tensor  # [T padded] n_t; 0 for padding
    unit: Tensor  # [] power of two that keeps weighted probabilities in the range of the dtype


class Merged(NamedTuple):
    """Teacher rows after the row pass."""

    offset: Tensor  # [T] base 2, of the column pass
    entropy: Tensor  # [T] n_t H(q_t), nats
    expected_bias: Tensor  # [T] nats; not written if the student's prototypes have no bias
    barycentre: Tensor  # [T, D padded]


class Finished(NamedTuple):
    """Student rows after the row pass."""

    offset: Tensor  # [S] base 2, of the column pass
    loss: Tensor  # [S] float64 shares of the loss, nats
    entropy: Tensor  # [S] n_s H(p_s), nats
    feature_gradient: Tensor  # [S rows, D]; 0 elements if not requested


class Totals(NamedTuple):
    """Sums over all rows."""

    loss: Tensor  # []
    summary: Tensor  # [3]
    weight: Tensor  # [] sum of the pair weights


def pack_rows(inputs: LossInputs, dtype: torch.dtype, layout: Layout, padded: tuple[int, int]) -> PackedRows:
    """Cast, pad and weigh the rows of both networks; ``padded`` are their numbers with padding."""
    student, teacher = (
        rows if rows.stride(1) == 1 else rows.contiguous()
        for rows in (inputs.student_features, inputs.teacher_features)
    )
    view_weights, image_weights = inputs.pairing.view_weights.contiguous(), inputs.pairing.image_weights
    new = student.new_empty
    packed = PackedRows(
        student=new(padded[0], layout.width, dtype=dtype),
        teacher=new(padded[1], layout.width, dtype=dtype),
        cotangents=new(padded[1], layout.width, dtype=dtype),
        student_mass=new(padded[0], dtype=torch.float32),
        teacher_mass=new(padded[1], dtype=torch.float32),
        unit=new((), dtype=torch.float32),
    )
    launch.run(
        pack_rows_kernel,
        (sum(padded),),
        student,
        teacher,
        view_weights,
        view_weights if image_weights is None else image_weights.contiguous(),
        *packed,
        teacher.shape[0] // view_weights.shape[0],
        view_weights.shape[1],
        view_weights.shape[0],
        padded[0],
        student.stride(0),
        teacher.stride(0),
        student.shape[1],
        COLUMNS=1 << (layout.width - 1).bit_length(),
        WIDTH=layout.width,
        HAS_IMAGE_WEIGHTS=image_weights is not None,
        HAS_COTANGENTS=inputs.prototype_gradient,
        num_warps=MERGE_WARPS,
    )
    if dtype == torch.float16:
        largest = torch.maximum(packed.student_mass.amax(), packed.teacher_mass.amax())
        exponent = FP16_HEADROOM - largest.clamp(min=LEAST_LARGEST).log2().ceil()
        packed = packed._replace(unit=exponent.exp2())
    return packed


def padded_features(features: Tensor, count: int, dtype: torch.dtype, layout: Layout) -> tuple[Tensor, Tensor]:
    """([count, D padded] features cast and padded, [count] 1 for a row and 0 for padding)."""
    rows = features.new_zeros(count, layout.width, dtype=dtype)
    rows[: features.shape[0], : features.shape[1]] = features
    exists = torch.zeros(count, dtype=torch.float32, device=features.device)
    exists[: features.shape[0]] = 1.0
    return rows, exists


def merge_teachers(parts: Parts, weight: Tensor, unit: Tensor, layout: Layout, *, has_value_bias: bool) -> Merged:
    """Merge the parts of a row pass with values; ``weight`` is [T]."""
    count, width = weight.shape[0], layout.width
    offset, entropy, expected_bias = weight.new_empty(3, count).unbind()
    merged = Merged(offset, entropy, expected_bias, weight.new_empty(count, width))
    _merge(parts, weight, unit, merged, layout, has_values=True, has_value_bias=has_value_bias)
    return merged


def merge_offsets(parts: Parts, weight: Tensor, unit: Tensor, layout: Layout) -> Tensor:
    """[R] offsets of the column pass after a row pass without values."""
    offset = torch.empty_like(weight)
    unused = Merged(offset, offset, offset, offset)
    _merge(parts, weight, unit, unused, layout, has_values=False, has_value_bias=False)
    return offset


def merge_log_sum_exp(parts: Parts, bias: Tensor | None) -> Tensor:
    """[R] log-sum-exp, nats, plus each row's base-2 bias [R]."""
    count = parts.statistics.shape[2]
    result = parts.statistics.new_empty(count)
    launch.run(
        merge_log_sum_exp_kernel,
        (count,),
        parts.statistics,
        result if bias is None else bias,
        result,
        count,
        parts.splits,
        SPLITS=SPLITS_AT_ONCE,
        HAS_BIAS=bias is not None,
        num_warps=1,
    )
    return result


def finish_students(
    inputs: LossInputs, parts: Parts, rows: PackedRows, teachers: Merged, layout: Layout, *, has_value_bias: bool
) -> Finished:
    """Loss terms and feature gradients from the student's parts and the merged teacher rows."""
    count, (teacher_views, student_views) = rows.student.shape[0], inputs.pairing.view_weights.shape
    (features, dim), image_weights = inputs.student_features.shape, inputs.pairing.image_weights
    new = rows.student_mass.new_empty
    finished = Finished(
        new(count),
        new(count, dtype=torch.float64),
        new(count),
        new(features, dim) if inputs.feature_gradient else new(0),
    )
    view_weights = inputs.pairing.view_weights.contiguous()
    launch.run(
        finish_students_kernel,
        (count,),
        parts.statistics,
        parts.barycentre,
        rows.student,
        rows.student_mass,
        rows.unit,
        view_weights,
        view_weights if image_weights is None else image_weights.contiguous(),
        teachers.barycentre,
        teachers.expected_bias,
        inputs.student_temperature,
        *finished,
        count,
        parts.splits,
        features // student_views,
        student_views,
        teacher_views,
        dim,
        SPLITS=SPLITS_AT_ONCE,
        CHUNK=layout.chunk,
        CHUNKS=layout.chunks,
        HAS_IMAGE_WEIGHTS=image_weights is not None,
        HAS_VALUE_BIAS=has_value_bias,
        HAS_GRADIENT=inputs.feature_gradient,
        num_warps=MERGE_WARPS,
    )
    return finished


def sum_losses(students: Finished, teachers: Merged, teacher_mass: Tensor) -> Totals:
    """Loss, summary and total weight, in one program that adds in the order of the rows."""
    new = teacher_mass.new_empty
    totals = Totals(new(()), new(3), new(()))
    launch.run(
        sum_losses_kernel,
        (1,),
        students.loss,
        students.entropy,
        teachers.entropy,
        teacher_mass,
        *totals,
        students.loss.shape[0],
        teacher_mass.shape[0],
        N=SUMS_AT_ONCE,
        num_warps=MERGE_WARPS,
    )
    return totals


def _merge(
    parts: Parts, weight: Tensor, unit: Tensor, out: Merged, layout: Layout, *, has_values: bool, has_value_bias: bool
) -> None:
    launch.run(
        merge_kernel,
        (weight.shape[0],),
        parts.statistics,
        parts.barycentre,
        weight,
        unit,
        *out,
        weight.shape[0],
        parts.splits,
        SPLITS=SPLITS_AT_ONCE,
        CHUNK=layout.chunk,
        CHUNKS=layout.chunks,
        HAS_VALUES=has_values,
        HAS_VALUE_BIAS=has_value_bias,
        num_warps=MERGE_WARPS,
    )
