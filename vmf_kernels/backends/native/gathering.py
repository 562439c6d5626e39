"""The gathering pass, in the form that the module takes: from the stored logits of a chunk to the sums over its rows.

Legend: S / T student / teacher rows, G / V their views, B images, K prototypes, D embedding dim.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from vmf_kernels.backends.native import module
from vmf_kernels.backends.native.scores import Logits, NativeKeys, Softmax


class PullBack(NamedTuple):
    """Pulls the gradient back to the stored prototypes, with equation (7); once per call."""

    keys: NativeKeys
    norm: Tensor | None  # [K] norms of the stored rows; None if a score finds them
    slope: Tensor | None  # [K] derivative of the bias by the norm
    magnitude_gradient: Tensor | None  # [K]

    def for_module(self) -> Any:
        """The module's form of it; this object must outlive the result."""
        keys = self.keys
        return module.built().PullBack(
            prototypes=keys.prototypes,
            norms=keys.norms,
            norm=self.norm if keys.found is None else keys.found[0],
            magnitude=keys.magnitude,
            slope=self.slope,
            magnitude_gradient=self.magnitude_gradient,
        )


class Pairs(NamedTuple):
    """Weights of the pairs of a gathering pass."""

    by_view: Tensor  # [G, V]
    by_image: Tensor | None  # [B]
    images: int


class Students(NamedTuple):
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
        native, run = module.built(), module.execution(products)
        task = self.task(by_teacher, by_student)
        memory, start = module.workspace(native.gather_workspace(task, run))
        sums = native.gather(task, run, start)
        del memory
        return sums

    def task(self, by_teacher: Softmax | None = None, by_student: Softmax | None = None) -> Any:
        """The module's form of it; the tensors that it points to must outlive it."""
        students = {}
        if self.students is not None:
            students = self.students._asdict()
            students["pull_back"] = None if self.students.pull_back is None else self.students.pull_back.for_module()
        return module.built().Gather(
            weight=self.keys.weight,
            found=self.keys.found,
            logits=self.logits,
            teacher_column=self.teachers.column,
            images=self.pairs.images,
            student_sums=None if by_student is None else by_student.sums,
            teacher_sums=None if by_teacher is None else by_teacher.sums,
            view_weights=self.pairs.by_view,
            image_weights=self.pairs.by_image,
            scale=self.keys.scale[0],
            usage=self.teachers.usage,
            columns=self.teachers.columns,
            **students,
        )
