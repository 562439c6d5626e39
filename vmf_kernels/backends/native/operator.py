"""The operator on the compiled module, chunk of rows by chunk.

Of every chunk the logits are stored, both networks' beside each other, [K, rows]; from them and the softmax of each row comes
``G = n p - A^T q``, and with it both gradients, ``dz = G W / tau`` and ``dW = G^T z / tau``: equation (12) of the README.

Legend: R rows, S / T student / teacher rows, G / V their views, B images, K prototypes, D embedding dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from vmf_kernels.backends.contract import LossInputs, LossOutputs
from vmf_kernels.backends.native import module
from vmf_kernels.backends.native.chunks import Chunk, chunks_of, padded, row_ranges
from vmf_kernels.backends.native.scores import (
    LN_2,
    LOG2_E,
    Logits,
    NativeKeys,
    Softmax,
    native_keys,
    score,
)
from vmf_kernels.bessel import vmf_mean_resultant_length
from vmf_kernels.pairing import check_pairing
from vmf_kernels.prototypes import Prototypes
from vmf_kernels.ranks import count_ranks, max_over_ranks, sum_over_ranks
from vmf_kernels.statistics import or_one, weighted_summary


def products_of(*rows: Tensor) -> torch.dtype:
    """Dtype of the products: bf16 for rows that all are, where the machine has the instructions, else fp32."""
    same = all(x.dtype == torch.bfloat16 for x in rows)
    return torch.bfloat16 if same and module.has_bf16_products() else torch.float32


def cross_entropy(inputs: LossInputs) -> LossOutputs:
    """Loss, statistics and gradients."""
    images = check_pairing(inputs.pairing, len(inputs.teacher_features), len(inputs.student_features))
    step = _Step.of(inputs, images)
    group = inputs.prototype_group
    chunks = chunks_of(step.views, images, _most_prototypes(step.student.prototypes, group), step.free_columns)
    for index, (chunk, logits) in enumerate(zip(chunks, step.rooms_for(chunks), strict=True)):
        step.run(chunk, logits, first=index == 0, last=index == len(chunks) - 1)
    return step.outputs()


def usage(
    features: Tensor,
    prototypes: Prototypes,
    temperature: Tensor,
    bias: Tensor | None,
    group: ProcessGroup | None,
) -> Tensor:
    """[K] mean probability of each prototype."""
    products = products_of(features)
    keys = native_keys(prototypes, temperature, bias, products)
    x_RD, result = module.fp32(features), torch.zeros(prototypes.count, dtype=torch.float32)
    for rows in row_ranges(len(x_RD), _most_prototypes(prototypes.count, group)):
        count = rows.stop - rows.start
        logits = Logits.empty(keys.prototypes, padded(count))
        softmax = score(x_RD[rows], keys, products, logits).merged_over_ranks(group)
        mass = torch.full((count,), 1 / len(x_RD), dtype=torch.float32)
        _gather(keys, logits, products, _Teachers(softmax, mass, 0, result))
    return result


def row_log_sum_exp(
    features: Tensor,
    prototypes: Prototypes,
    temperature: Tensor,
    bias: Tensor | None,
    group: ProcessGroup | None,
) -> Tensor:
    """[R] log-sum-exp over the prototypes, nats."""
    products = products_of(features)
    keys = native_keys(prototypes, temperature, bias, products)
    x_RD = module.fp32(features)
    parts = [
        score(x_RD[rows], keys, products).merged_over_ranks(group).log_sum_exp
        for rows in row_ranges(len(x_RD), _most_prototypes(prototypes.count, group))
    ]
    return torch.cat(parts) * LN_2 if parts else x_RD.new_empty(0)


def column_log_sum_exp(features: Tensor, prototypes: Prototypes, temperature: Tensor, offset: Tensor) -> Tensor:
    """[K] ``log sum_r exp(l_rk - offset_r)``: rows and prototypes change places."""
    products = products_of(features)
    own = native_keys(prototypes, temperature, None, products)
    if not len(features):
        return torch.full((prototypes.count,), -torch.inf, dtype=torch.float32)
    x_RD, bias_R = module.fp32(features), (offset.to(torch.float32) * -LOG2_E).contiguous()
    multiplier = own.multiplier.new_full((len(x_RD),), own.factor)
    keys = NativeKeys(x_RD, None, own.row_factor, own.factor, multiplier, bias_R, bias_R, own.scale)
    parts = []
    for block in row_ranges(prototypes.count, len(x_RD)):
        w_BD = own.weight[block].to(torch.float32)
        w_BD = w_BD if own.gain is None else w_BD * own.gain[block, None]
        parts.append(score(w_BD.contiguous(), keys, products).log_sum_exp * LN_2)
    result = torch.cat(parts)
    return result if own.bias is None else result + own.bias


@dataclass
class _Step:
    """One loss: what every chunk reads, and what the chunks add up to."""

    inputs: LossInputs
    views: tuple[int, int]  # G, V
    images: int
    products: torch.dtype
    student: NativeKeys
    teacher: NativeKeys
    student_rows: Tensor  # [V, B, D] fp32
    teacher_rows: Tensor  # [G, B, D of the teacher] fp32
    student_mass: Tensor  # [V, B] n_s
    teacher_mass: Tensor  # [G, B] n_t
    student_entropy: Tensor  # [V, B]
    teacher_entropy: Tensor  # [G, B]
    feature_gradient: Tensor  # [V, B, D]
    weight_gradient: Tensor | None  # [K, D]
    magnitude_gradient: Tensor | None  # [K]
    bias_gradient: Tensor  # [K] beta
    usage: Tensor  # [K] sum_t n_t q_t

    @classmethod
    def of(cls, inputs: LossInputs, images: int) -> _Step:
        pairing, (teacher_views, student_views) = inputs.pairing, inputs.pairing.view_weights.shape
        x_SD, x_TD = module.fp32(inputs.student_features), module.fp32(inputs.teacher_features)
        new, (count, dim) = x_SD.new_zeros, inputs.student.weight.shape
        wanted = inputs.prototype_gradient
        products = products_of(inputs.student_features, inputs.teacher_features)
        return cls(
            inputs,
            (teacher_views, student_views),
            images,
            products,
            native_keys(inputs.student, inputs.student_temperature, None, products),
            native_keys(inputs.teacher, inputs.teacher_temperature, inputs.teacher_bias, products),
            x_SD.reshape(student_views, images, dim),
            x_TD.reshape(teacher_views, images, inputs.teacher.dim),
            pairing.student_mass(images).to(torch.float32).reshape(student_views, images),
            pairing.teacher_mass(images).to(torch.float32).reshape(teacher_views, images),
            new(student_views, images),
            new(teacher_views, images),
            new(student_views, images, dim),
            x_SD.new_empty(count, dim) if wanted else None,
            torch.empty(count, dtype=torch.float32) if wanted and inputs.student.magnitude is not None else None,
            new(count),
            new(count),
        )

    @property
    def free_columns(self) -> int:
        """Of logits that have room in the prototypes' gradient, for as long as nothing has been written there.

        A block's logits are read before its gradient is written.
        """
        dim = self.student.weight.shape[1]
        return 0 if self.weight_gradient is None or dim != padded(dim) else dim

    def rooms_for(self, chunks: list[Chunk]) -> list[Logits]:
        """Where each chunk's logits go."""
        columns = [sum(_columns_of(chunk)) for chunk in chunks]
        rooms = []
        if columns and columns[0] <= self.free_columns and self.weight_gradient is not None:
            rooms.append(Logits([self.weight_gradient], 0))
        rest = columns[len(rooms) :]
        return rooms + (len(rest) * [Logits.empty(self.student.prototypes, max(rest))] if rest else [])

    def run(self, chunk: Chunk, logits: Logits, *, first: bool, last: bool) -> None:
        """Add a chunk's share to every sum; the last one makes the prototypes' gradient that of what is stored."""
        students, teachers = chunk.students_of(self.student_rows), chunk.teachers_of(self.teacher_rows)
        x_SD, x_TD = students.flatten(0, 1), teachers.flatten(0, 1)
        column = _columns_of(chunk)[0]
        group = self.inputs.prototype_group
        by_student = score(x_SD, self.student, self.products, logits).merged_over_ranks(group)
        by_teacher = score(x_TD, self.teacher, self.products, logits.from_column(column)).merged_over_ranks(group)
        chunk.students_of(self.student_entropy).copy_(by_student.entropy.view(students.shape[:2]))
        chunk.teachers_of(self.teacher_entropy).copy_(by_teacher.entropy.view(teachers.shape[:2]))
        # of the pairs in this chunk alone, so that p and q meet before G is rounded for the products
        pairs_GVB, (scale, rest) = self._pairs(chunk), self.student.scale
        x_gradient = torch.empty_like(x_SD)
        _gather(
            self.student,
            logits,
            self.products,
            _Teachers(by_teacher, pairs_GVB.sum(dim=1).flatten(), column, self.usage),
            _Students(
                features=(x_SD if rest == 1 else x_SD * rest).contiguous(),
                softmax=by_student,
                weight=pairs_GVB.sum(dim=0).flatten() * scale,
                coefficient=_over_mass(pairs_GVB, by_teacher.mass / scale),
                feature_gradient=x_gradient,
                weight_gradient=self.weight_gradient,
                bias_gradient=self.bias_gradient,
                first=first,
                pull_back=self._pull_back() if last and self.weight_gradient is not None else None,
            ),
        )
        chunk.students_of(self.feature_gradient).add_(x_gradient.view_as(students), alpha=rest)

    def _pairs(self, chunk: Chunk) -> Tensor:
        """[G, V, B] weights of a chunk's pairs of views, each of one image with itself."""
        pairs, by_image = self.inputs.pairing.view_weights.to(torch.float32), self.inputs.pairing.image_weights
        pairs = pairs[chunk.teacher_views, chunk.student_views]
        images = chunk.images.stop - chunk.images.start
        r_B = pairs.new_ones(images) if by_image is None else by_image[chunk.images].to(torch.float32)
        return pairs[:, :, None] * r_B

    def _pull_back(self) -> _PullBack | None:
        """None where what is stored is the effective prototypes and nothing else depends on their norms."""
        prototypes = self.inputs.student
        if prototypes.kind == "linear":
            return None
        norm = torch.linalg.vector_norm(self.student.weight, dim=1, dtype=torch.float32)
        slope = None
        if prototypes.has_normalizer:
            scale = self.inputs.student_temperature.to(torch.float32).reciprocal()
            slope = -vmf_mean_resultant_length(prototypes.detach().norms() * scale, prototypes.dim) * scale
        magnitude = None if prototypes.magnitude is None else module.fp32(prototypes.magnitude.detach().reshape(-1))
        return _PullBack(prototypes.without_vmf().kind, norm, magnitude, slope, self.magnitude_gradient)

    def outputs(self) -> LossOutputs:
        """Equation (12), and what comes with it."""
        inputs, group = self.inputs, self.inputs.prototype_group
        if group is not None and count_ranks(group) > 1:
            self.feature_gradient = sum_over_ranks(self.feature_gradient, group)
        aligned = (self.feature_gradient.double() * self.student_rows.double()).sum()
        bias = self.student.bias
        biased = aligned.new_zeros(()) if bias is None else (bias.double() * self.bias_gradient.double()).sum()
        if group is not None and count_ranks(group) > 1:
            biased = sum_over_ranks(biased, group)
        student_entropy = (self.student_mass.double() * self.student_entropy.double()).sum()
        teacher_entropy = (self.teacher_mass.double() * self.teacher_entropy.double()).sum()
        loss = (student_entropy + aligned + biased).to(torch.float32)
        total = self.teacher_mass.sum()
        entropies = teacher_entropy.to(torch.float32), student_entropy.to(torch.float32)
        if self.weight_gradient is not None and not self.images:
            self.weight_gradient.zero_()
            if self.magnitude_gradient is not None:
                self.magnitude_gradient.zero_()
        return LossOutputs(
            loss,
            weighted_summary(loss, *entropies, total),
            self.usage / or_one(total),
            self.feature_gradient.flatten(0, 1) if inputs.feature_gradient else loss.new_empty(0),
            loss.new_empty(0) if self.weight_gradient is None else self.weight_gradient,
            loss.new_empty(0) if self.magnitude_gradient is None else self.magnitude_gradient,
        )


@dataclass(frozen=True)
class _PullBack:
    """Equation (7) of a whole call."""

    kind: str
    norm: Tensor  # [K] of the stored rows
    magnitude: Tensor | None  # [K]
    slope: Tensor | None  # [K] slope of the bias in the norm
    magnitude_gradient: Tensor | None  # [K]

    def for_module(self) -> Any:
        norms = module.built().Norms
        kinds = {"linear": norms.free, "normalized": norms.fixed, "weight_norm": norms.magnitude}
        return module.built().PullBack(
            norms=kinds[self.kind],
            norm=module.address(self.norm),
            magnitude=module.address(self.magnitude),
            slope=module.address(self.slope),
            magnitude_gradient=module.address(self.magnitude_gradient),
        )


@dataclass(frozen=True)
class _Students:
    """The student's side of a gathering pass."""

    features: Tensor  # [S, D] times the other factor
    softmax: Softmax
    weight: Tensor  # [S] n_s times the first factor of 1 / tau_s, as are the coefficients
    coefficient: Tensor  # [G, S]
    feature_gradient: Tensor  # [S, D]
    weight_gradient: Tensor | None  # [K, D]
    bias_gradient: Tensor  # [K]
    first: bool
    pull_back: _PullBack | None


class _Teachers(NamedTuple):
    """The teacher's side of a gathering pass."""

    softmax: Softmax
    weight: Tensor  # [T] n_t
    column: int  # of the logits, that its rows start at
    usage: Tensor  # [K] added to


def _over_mass(pairs_GVB: Tensor, mass_T: Tensor) -> Tensor:
    """[G, S] the pairs' weights over the mass of their teacher row, which turns 2^(l - top) into a probability."""
    return (pairs_GVB * mass_T.view(len(pairs_GVB), 1, -1).reciprocal()).flatten(1).contiguous()


def _gather(
    keys: NativeKeys, logits: Logits, products: torch.dtype, teachers: _Teachers, students: _Students | None = None
) -> None:
    """From stored logits to the sums over rows; without students the usage alone."""
    native, run = module.built(), module.execution(products)
    teacher_factor = teachers.weight / teachers.softmax.mass
    student_factor = None if students is None else students.weight / students.softmax.mass
    views = 1 if students is None else len(students.coefficient)
    mine = students
    pull_back = None if mine is None or mine.pull_back is None else mine.pull_back.for_module()
    task = native.Gather(
        weight=module.weight_of(keys.weight),
        gain=module.address(keys.gain),
        logits=logits.for_module(),
        teacher_column=teachers.column,
        student_rows=0 if mine is None else len(mine.features),
        teacher_rows=len(teachers.weight),
        images=len(teachers.weight) // views,
        teacher_views=views,
        student_top=module.address(None if mine is None else mine.softmax.top),
        student_factor=module.address(student_factor),
        teacher_top=module.address(teachers.softmax.top),
        teacher_factor=module.address(teacher_factor),
        coefficient=module.address(None if mine is None else mine.coefficient),
        features=module.address(None if mine is None else mine.features),
        scale=keys.scale[0],
        feature_gradient=module.address(None if mine is None else mine.feature_gradient),
        weight_gradient=module.address(None if mine is None else mine.weight_gradient),
        bias_gradient=module.address(None if mine is None else mine.bias_gradient),
        usage=module.address(teachers.usage),
        first=mine is not None and mine.first,
        pull_back=pull_back,
    )
    memory = module.run_with_workspace(run, native.gather_workspace(task, run))
    native.gather(task, run)
    del memory


def _columns_of(chunk: Chunk) -> tuple[int, int]:
    """Columns of the logits that a chunk's students and teachers take."""
    images = chunk.images.stop - chunk.images.start
    student, teacher = (part.stop - part.start for part in (chunk.student_views, chunk.teacher_views))
    return padded(student * images), padded(teacher * images)


def _most_prototypes(count: int, group: ProcessGroup | None) -> int:
    """K of the rank that has most: chunks of rows must be the same everywhere."""
    if group is None or count_ranks(group) == 1:
        return count
    return int(max_over_ranks(torch.tensor(float(count)), group))
