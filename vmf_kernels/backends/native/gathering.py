"""The gathering pass, in the form that the module takes: from the stored logits of a chunk to the sums over its rows.

Legend: S / T student / teacher rows, G / V their views, B images, K prototypes, D embedding dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vmf_kernels.backends.native import module
from vmf_kernels.backends.native.chunks import padded
from vmf_kernels.backends.native.scores import Logits, NativeKeys, Softmax


@dataclass(frozen=True)
class PullBack:
    """Pulls the gradient back to the stored prototypes, with equation (7); once per call."""

    keys: NativeKeys
    norm: Tensor | None  # [K] norms of the stored rows; None if the keys have them
    slope: Tensor | None  # [K] derivative of the bias by the norm
    magnitude_gradient: Tensor | None  # [K]

    def for_module(self) -> Any:
        """The module's form of it; this object must outlive the result."""
        count = self.keys.prototypes
        return module.built().PullBack(
            norms=module.norms_named(self.keys.norms),
            norm=self.keys.for_module()[0] if self.norm is None else module.address(self.norm, count),
            magnitude=module.address(self.keys.magnitude, count),
            slope=module.address(self.slope, count),
            magnitude_gradient=module.address(self.magnitude_gradient, count),
        )


class Pairs(NamedTuple):
    """Weights of the pairs of a gathering pass."""

    by_view: Tensor  # [G, V]
    by_image: Tensor | None  # [B]
    images: int


@dataclass(frozen=True)
class Students:
    """The student's side of a gathering pass."""

    features: Tensor  # [S, D], multiplied by the second factor of 1 / tau_s (``split_scale``)
    feature_gradient: Tensor  # [S, D]
    weight_gradient: Tensor | None  # [K, D]
    bias_gradient: Tensor  # [K]
    first: bool
    pull_back: PullBack | None


class Teachers(NamedTuple):
    """The teacher's side of a gathering pass."""

    column: int  # the first column of its rows among the logits
    usage: Tensor  # [K], to which the pass adds
    columns: Tensor | None = None  # [2, K] maximum and mass, base 2, of the sums with the keys' other bias; likewise


class Gathering(NamedTuple):
    """From stored logits to the sums over rows; without students, only the usage."""

    keys: NativeKeys
    logits: Logits
    pairs: Pairs
    teachers: Teachers
    students: Students | None = None

    def run(self, products: torch.dtype, by_teacher: Softmax, by_student: Softmax | None = None) -> Any:
        """The module's ``Sums``, from both networks' sums over the prototypes."""
        native, run, task = module.built(), module.execution(products), self.task(by_teacher, by_student)
        memory, start = module.workspace(native.gather_workspace(task, run))
        sums = native.gather(task, run, start)
        del memory
        return sums

    def task(self, by_teacher: Softmax | None = None, by_student: Softmax | None = None) -> Any:
        """The module's form of it; the tensors that it points to must outlive it."""
        address, mine, (by_view, by_image, images) = module.address, self.students, self.pairs
        count, dim = self.keys.weight.shape
        teacher_views, student_views = by_view.shape
        rows = (0 if mine is None else student_views * images), teacher_views * images
        top, mass, moment = (0, 0, 0) if by_student is None else by_student.for_module(rows[0])
        columns = address(self.teachers.columns, 2 * count)
        teacher_top, teacher_mass, teacher_moment = (0, 0, 0) if by_teacher is None else by_teacher.for_module(rows[1])
        return module.built().Gather(
            weight=module.weight_of(self.keys.weight),
            gain=self.keys.for_module()[1],
            logits=self.logits.for_module(count, self.teachers.column + padded(rows[1])),
            teacher_column=self.teachers.column,
            student_rows=rows[0],
            teacher_rows=rows[1],
            images=images,
            student_views=student_views,
            teacher_views=teacher_views,
            student_top=top,
            student_mass=mass,
            student_moment=moment,
            teacher_top=teacher_top,
            teacher_mass=teacher_mass,
            teacher_moment=teacher_moment,
            view_weights=address(by_view, teacher_views * student_views),
            image_weights=address(by_image, images),
            features=0 if mine is None else address(mine.features, rows[0] * dim),
            scale=self.keys.scale[0],
            feature_gradient=0 if mine is None else address(mine.feature_gradient, rows[0] * dim),
            weight_gradient=0 if mine is None else address(mine.weight_gradient, count * dim),
            bias_gradient=0 if mine is None else address(mine.bias_gradient, count),
            usage=address(self.teachers.usage, count),
            first=mine is not None and mine.first,
            pull_back=None if mine is None or mine.pull_back is None else mine.pull_back.for_module(),
            column_top=columns,
            column_mass=columns and columns + 4 * count,
        )
