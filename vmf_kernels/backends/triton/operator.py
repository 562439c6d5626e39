"""The operator as a sequence of launches, on Triton's kernels, or with other kernels in place of those that read prototypes.

Legend: R rows, S / T student / teacher rows, K prototypes, D embedding dim.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from vmf_kernels.backends.base_two import LOG2_E
from vmf_kernels.backends.contract import LossInputs, LossOutputs, RowInputs
from vmf_kernels.backends.prepared import prepared_of
from vmf_kernels.backends.triton import launch
from vmf_kernels.backends.triton.passes import (
    Columns,
    Parts,
    Side,
    column_pass,
    padded_rows,
    row_pass,
)
from vmf_kernels.backends.triton.prototypes import (
    Network,
    PackedPrototypes,
    pack_networks,
    pack_prototypes,
    pull_back,
    with_bias,
)
from vmf_kernels.backends.triton.rows import (
    finish_students,
    merge_log_sum_exp,
    merge_offsets,
    merge_teachers,
    pack_rows,
    padded_features,
    sum_losses,
)
from vmf_kernels.backends.triton.tiles import Layout, Tile, tile_of
from vmf_kernels.prototypes import LOWEST_BIAS, Prototypes


class Kernels(Protocol):
    """The kernels that read prototypes. All implementations share Triton's kernels for the smaller steps between them."""

    def pack_prototypes(self, network: Network, dtype: torch.dtype, *, keeps_norms: bool = False) -> PackedPrototypes:
        """See ``prototypes.pack_prototypes``."""

    def pack_networks(
        self, student: Network, teacher: Network, dtype: torch.dtype
    ) -> tuple[PackedPrototypes, PackedPrototypes]:
        """See ``prototypes.pack_networks``."""

    def pull_back(
        self, prototypes: Prototypes, temperature: Tensor, gradient_KD: Tensor, bias_gradient_K: Tensor
    ) -> Tensor | None:
        """See ``prototypes.pull_back``."""

    def tile(self, name: str, features: Tensor, layout: Layout, rows: int | None = None) -> Tile:
        """The tile of a pass, to which rows and prototypes are padded; ``rows`` if the pass does not run over the features."""

    def row_pass(
        self,
        rows: Tensor,
        keys: PackedPrototypes,
        values: PackedPrototypes | None,
        name: str,
        tile: Tile,
        group: ProcessGroup | None = None,
    ) -> Parts:
        """See ``passes.row_pass``."""

    def column_pass(
        self,
        student: Side | None,
        teacher: Side,
        cotangents: Tensor,
        unit: Tensor,
        total: Tensor,
        out: Columns,
        tile: Tile,
    ) -> None:
        """See ``passes.column_pass``."""


class TritonKernels:
    """``Kernels`` of this folder."""

    pack_prototypes = staticmethod(pack_prototypes)
    pack_networks = staticmethod(pack_networks)
    pull_back = staticmethod(pull_back)
    row_pass = staticmethod(row_pass)
    column_pass = staticmethod(column_pass)

    def tile(self, name: str, features: Tensor, layout: Layout, rows: int | None = None) -> Tile:
        """From the table of tiles."""
        target = launch.target_of(features.device)
        return tile_of(name, target, layout.precision, layout.width, features.shape[0] if rows is None else rows)


TRITON = TritonKernels()


def cross_entropy(inputs: LossInputs, kernels: Kernels = TRITON) -> LossOutputs:
    """Loss, statistics and gradients: preparation, row pass and merge of both networks, then the column pass."""
    features, teacher_features = inputs.student_features, inputs.teacher_features
    dtype = product_dtype(features, teacher_features)
    with launch.on_device(features):
        student, teacher = kernels.pack_networks(
            Network(inputs.student, inputs.student_temperature),
            Network(inputs.teacher, inputs.teacher_temperature, inputs.teacher_bias),
            dtype,
        )
        layout = student.layout
        own = "student" if inputs.feature_gradient else "scores"  # only equation (4) has the student's barycentre
        own_tile = kernels.tile(own, features, layout)
        teacher_tile = kernels.tile("teacher", teacher_features, layout)
        column_tile = kernels.tile("columns", features, layout)
        padded = (
            padded_rows(len(features), [own_tile, column_tile]),
            padded_rows(len(teacher_features), [teacher_tile, column_tile]),
        )
        rows = pack_rows(inputs, dtype, layout, padded)

        parts = kernels.row_pass(rows.teacher, teacher, student, "teacher", teacher_tile, inputs.prototype_group)
        teachers = merge_teachers(parts, rows.teacher_mass, rows.unit, layout, has_value_bias=student.has_bias)
        del parts  # tens of MiB, which the student's can take over
        values = student if inputs.feature_gradient else None
        parts = kernels.row_pass(rows.student, student, values, own, own_tile, inputs.prototype_group)
        students = finish_students(inputs, parts, rows, teachers, layout, has_value_bias=student.has_bias)
        del parts
        totals = sum_losses(students, teachers, rows.teacher_mass)

        sides = Side(rows.student, student, students.offset), Side(rows.teacher, teacher, teachers.offset)
        out = _column_buffers(inputs, rows.unit)
        asked = sides[0] if inputs.prototype_gradient else None
        kernels.column_pass(asked, sides[1], rows.cotangents, rows.unit, totals.weight, out, column_tile)
        magnitude_gradient = None
        if out.vectors is not None and out.bias_gradient is not None:
            magnitude_gradient = kernels.pull_back(
                inputs.student, inputs.student_temperature, out.vectors, out.bias_gradient
            )
    return LossOutputs(
        totals.loss,
        totals.summary,
        out.usage,
        students.feature_gradient,
        features.new_empty(0, dtype=torch.float32) if out.vectors is None else out.vectors,
        features.new_empty(0, dtype=torch.float32) if magnitude_gradient is None else magnitude_gradient,
    )


def usage(inputs: RowInputs, kernels: Kernels = TRITON) -> Tensor:
    """[K] mean probability of each prototype."""
    features, dtype = inputs.features, product_dtype(inputs.features)
    with launch.on_device(features):
        keys = prepared(inputs, dtype, kernels)
        layout = keys.layout
        tile = kernels.tile("scores", features, layout)
        column_tile = kernels.tile("columns", features, layout)
        count = padded_rows(len(features), [tile, column_tile])
        rows, exists = padded_features(features, count, dtype, layout)
        unit = exists.new_ones(())
        parts = kernels.row_pass(rows, keys, None, "scores", tile, inputs.prototype_group)
        offset = merge_offsets(parts, exists, unit, layout)
        result = exists.new_empty(keys.prototypes)
        total = exists.new_full((), float(len(features)))
        out = Columns(None, None, result)
        kernels.column_pass(None, Side(rows, keys, offset), rows, unit, total, out, column_tile)
    return result


def row_log_sum_exp(inputs: RowInputs, kernels: Kernels = TRITON) -> Tensor:
    """[R] log-sum-exp over the prototypes, nats."""
    features, dtype = inputs.features, product_dtype(inputs.features)
    with launch.on_device(features):
        keys = prepared(inputs, dtype, kernels)
        tile = kernels.tile("scores", features, keys.layout)
        rows, _ = padded_features(features, padded_rows(len(features), [tile]), dtype, keys.layout)
        return merge_log_sum_exp(kernels.row_pass(rows, keys, None, "scores", tile, inputs.prototype_group), None)[
            : len(features)
        ]


def column_log_sum_exp(inputs: RowInputs, offset: Tensor, kernels: Kernels = TRITON) -> Tensor:
    """[K] ``log sum_r exp(l_rk - offset_r)``, by the row pass with rows and prototypes exchanged."""
    features, dtype = inputs.features, product_dtype(inputs.features)
    with launch.on_device(features):
        keys = prepared(inputs, dtype, kernels)
        if not len(features):
            return keys.bias.new_full((keys.prototypes,), -torch.inf)
        tile = kernels.tile("scores", features, keys.layout, rows=keys.prototypes)
        count = -(-len(features) // tile.prototypes) * tile.prototypes
        rows, _ = padded_features(features, count, dtype, keys.layout)
        bias = keys.bias.new_full((count,), 2 * LOWEST_BIAS)
        bias[: len(features)] = offset * -LOG2_E
        swapped = PackedPrototypes(rows, bias, inputs.temperature, len(features), keys.layout, True)
        parts = kernels.row_pass(keys.weight, swapped, None, "scores", tile)
        return merge_log_sum_exp(parts, keys.bias)[: keys.prototypes]


def product_dtype(*rows: Tensor) -> torch.dtype:
    """Dtype of the products: that of the rows, float32 for rows of two dtypes."""
    dtype = rows[0].dtype
    return dtype if all(other.dtype == dtype for other in rows) else torch.float32


def prepared(inputs: RowInputs, dtype: torch.dtype, kernels: Kernels) -> PackedPrototypes:
    """Packed prototypes; kept if other sums over them follow (``backends.prepared``)."""
    network = Network(inputs.prototypes, inputs.temperature, inputs.bias)
    room, key = prepared_of(inputs.prototypes), (type(kernels), dtype)
    if room is None:
        return kernels.pack_prototypes(network, dtype)
    if key in room:
        return with_bias(room[key], network)
    room[key] = kept = kernels.pack_prototypes(network, dtype, keeps_norms=True)
    return kept


def _column_buffers(inputs: LossInputs, like: Tensor) -> Columns:
    """Empty buffers for the results of the column pass, fp32."""
    new, (count, dim) = like.new_empty, inputs.student.weight.shape
    if not inputs.prototype_gradient:
        return Columns(None, None, new(count))
    return Columns(new(count, dim), new(count), new(count))
