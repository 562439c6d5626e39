"""Backends made of a soft assignment and a column log-sum-exp in plain torch.

Numbers in brackets are equations of vmf_kernels/README.md.

Legend: R rows, S / T student / teacher rows, K prototypes, D embedding dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from vmf_kernels.backends.contract import Assignment, LossInputs, LossOutputs, Query, RowInputs
from vmf_kernels.pairing import check_pairing
from vmf_kernels.prototypes import Keys, Prototypes, accumulation_dtype, prepare_keys, pull_back_to_stored
from vmf_kernels.ranks import sum_over_ranks
from vmf_kernels.statistics import or_one, weighted_summary


class Assign(Protocol):
    """Soft assignments, one per query. Adds to the sums of the queries and overwrites ``vectors_KD``.

    ``vectors_KD[k] = sum over queries and rows of p_rk cotangent_r`` is the operator's backward pass, equation (5). If the
    prototypes are split over the ranks of a group, results reduced over prototypes include those of all ranks.
    """

    def __call__(  # noqa: D102
        self,
        queries: list[Query],
        values: Keys | None = None,
        vectors_KD: Tensor | None = None,
        group: ProcessGroup | None = None,
    ) -> list[Assignment]: ...


class ColumnLogSumExp(Protocol):
    """[K] ``log sum_r exp(l_rk - offset_r)`` over rows [R, D]."""

    def __call__(self, rows_RD: Tensor, keys: Keys, offset_R: Tensor) -> Tensor: ...  # noqa: D102


@dataclass(frozen=True)
class ComposedBackend:
    """A ``contract.Backend`` made of two passes; any floating dtype, any device."""

    assign: Assign
    columns: ColumnLogSumExp

    def unsupported(self, rows: Tensor, weight: Tensor) -> str | None:
        """None: every floating dtype on every device is supported."""
        return None

    def cross_entropy(self, inputs: LossInputs) -> LossOutputs:
        """See ``contract.Backend``."""
        dtype = accumulation_dtype(inputs.student_features.dtype)
        x_SD, x_TD = inputs.student_features.to(dtype), inputs.teacher_features.to(dtype)
        student_keys = prepare_keys(inputs.student, inputs.student_temperature, None, dtype)
        teacher_keys = prepare_keys(inputs.teacher, inputs.teacher_temperature, inputs.teacher_bias, dtype)
        images = check_pairing(inputs.pairing, len(x_TD), len(x_SD))
        n_S, n_T = inputs.pairing.student_mass(images), inputs.pairing.teacher_mass(images)

        sums = _ColumnBuffers.allocate(inputs.student, dtype, inputs.prototype_gradient)
        asked = sums.student_query(x_SD, student_keys, n_S)
        answered = sums.teacher_query(x_TD, teacher_keys, n_T, -inputs.pairing.to_teachers(x_SD) * student_keys.scale)
        group = inputs.prototype_group
        if inputs.feature_gradient or inputs.prototype_gradient:
            by_teacher, by_student = self.assign([answered, asked], student_keys, sums.vectors, group)
        else:  # only gradients need the student's barycentre, which is half of its work
            (by_student,) = self.assign([asked], group=group)
            (by_teacher,) = self.assign([answered], student_keys, group=group)

        barycentre_SD = inputs.pairing.to_students(_present(by_teacher.barycentre))
        loss = _loss(by_student, n_S, (barycentre_SD * x_SD).sum(dim=1), student_keys.scale)
        if student_keys.bias is not None:
            loss = loss - n_T.double().sum() * sums.mean_bias(student_keys.bias, group)
        feature_grad = x_SD.new_empty(0)
        if inputs.feature_gradient:
            feature_grad = student_keys.scale * (n_S[:, None] * _present(by_student.barycentre) - barycentre_SD)  # (4)
        weight_grad, magnitude_grad = x_SD.new_empty(0), x_SD.new_empty(0)
        if sums.vectors is not None:
            weight_grad = sums.vectors
            pulled = pull_back_to_stored(inputs.student, inputs.student_temperature, weight_grad, sums.bias_gradient)
            magnitude_grad = magnitude_grad if pulled is None else pulled
        entropies = (n_T * by_teacher.entropy).sum(), (n_S * by_student.entropy).sum()
        summary = weighted_summary(loss.to(dtype), *entropies, n_T.sum())
        return LossOutputs(loss.to(dtype), summary, sums.usage(n_T), feature_grad, weight_grad, magnitude_grad)

    def usage(self, inputs: RowInputs) -> Tensor:
        """See ``contract.Backend``."""
        features, keys = inputs.features, _keys(inputs)
        mean = keys.scale.new_full((1, features.shape[0]), 1 / features.shape[0])
        usage = mean.new_zeros(inputs.prototypes.count)
        self.assign([Query(features, keys, None, mean, usage[None])], group=inputs.prototype_group)
        return usage

    def row_log_sum_exp(self, inputs: RowInputs) -> Tensor:
        """See ``contract.Backend``."""
        query = Query(inputs.features, _keys(inputs))
        return self.assign([query], group=inputs.prototype_group)[0].log_sum_exp

    def column_log_sum_exp(self, inputs: RowInputs, offset: Tensor) -> Tensor:
        """See ``contract.Backend``."""
        return self.columns(inputs.features, _keys(inputs), offset)


def _keys(inputs: RowInputs) -> Keys:
    dtype = accumulation_dtype(inputs.features.dtype)
    return prepare_keys(inputs.prototypes, inputs.temperature, inputs.bias, dtype)


class _ColumnBuffers(NamedTuple):
    """Sums over rows that both networks contribute to: equations (5) and (6)."""

    vectors: Tensor | None  # [K, D] gradient at the student's effective prototypes
    mass_2K: Tensor  # sum_s n_s p_s(k), sum_t n_t q_t(k)
    student_mass_wanted: bool

    @classmethod
    def allocate(cls, prototypes: Prototypes, dtype: torch.dtype, prototype_gradient: bool) -> _ColumnBuffers:
        weight = prototypes.weight
        return cls(
            weight.new_empty(weight.shape, dtype=dtype) if prototype_gradient else None,
            weight.new_zeros(2, prototypes.count, dtype=dtype),
            prototype_gradient and prototypes.has_normalizer,
        )

    @property
    def bias_gradient(self) -> Tensor:
        """[K] beta."""
        return self.mass_2K[0] - self.mass_2K[1]

    def usage(self, n_T: Tensor) -> Tensor:
        """[K] mean teacher probability; zeros if no pair has weight."""
        return self.mass_2K[1] / or_one(n_T.sum())

    def mean_bias(self, bias_K: Tensor, group: ProcessGroup | None) -> Tensor:
        """[] fp64 ``sum_t n_t e_t / sum_t n_t`` of equation (3), over the prototypes of all ranks.

        The divisor is the sum of the masses, not that of the weights, so that a common rounding error of all masses cancels.
        """
        mass_K = self.mass_2K[1].double()
        sums = torch.stack([mass_K @ bias_K.double(), mass_K.sum()])
        weighted, total = (sums if group is None else sum_over_ranks(sums, group)).unbind()
        return weighted / or_one(total)

    def student_query(self, x_SD: Tensor, keys: Keys, n_S: Tensor) -> Query:
        cotangents = None if self.vectors is None else n_S[:, None] * x_SD * keys.scale
        if not self.student_mass_wanted:
            return Query(x_SD, keys, cotangents)
        return Query(x_SD, keys, cotangents, n_S[None], self.mass_2K[:1])

    def teacher_query(self, x_TD: Tensor, keys: Keys, n_T: Tensor, cotangents_TD: Tensor) -> Query:
        return Query(x_TD, keys, None if self.vectors is None else cotangents_TD, n_T[None], self.mass_2K[1:])


def _loss(student: Assignment, n_S: Tensor, alignment_S: Tensor, scale: Tensor) -> Tensor:
    """[] equation (3) without its biases, in fp64: the terms nearly cancel if the logits share a large offset."""
    return (n_S.double() * student.log_sum_exp.double() - alignment_S.double() * scale.double()).sum()


def _present(barycentre: Tensor | None) -> Tensor:
    assert barycentre is not None, "a pass with values gave no barycentre"
    return barycentre
