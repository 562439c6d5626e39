"""The operator on the compiled module, one chunk of rows after the other.

The logits of a chunk are stored as [K, rows], with both networks side by side. They and the softmax of each row give
``G = n p - A^T q``, and G gives both gradients, ``dz = G W / tau`` and ``dW = G^T z / tau``: equation (12) of
vmf_kernels/README.md.

Legend: R rows, S / T student / teacher rows, G / V their views, B images, K prototypes, D embedding dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from vmf_kernels.backends.base_two import LN_2
from vmf_kernels.backends.contract import LossInputs, LossOutputs, RowInputs
from vmf_kernels.backends.native import module
from vmf_kernels.backends.native.chunks import Chunk, chunks_of, padded, row_ranges
from vmf_kernels.backends.native.columns import no_columns, sums_of_columns
from vmf_kernels.backends.native.gathering import Gathering, Pairs, PullBack, Students, Teachers
from vmf_kernels.backends.native.scores import (
    Logits,
    NativeKeys,
    native_keys,
    score,
    score_task,
)
from vmf_kernels.backends.uncentered import UncenteredSums, question_on
from vmf_kernels.bessel import vmf_mean_resultant_length
from vmf_kernels.pairing import check_pairing
from vmf_kernels.ranks import has_all_prototypes, max_over_ranks, sum_over_ranks


def products_of(*rows: Tensor) -> torch.dtype:
    """Dtype of the products: bf16 where the machine has the instructions and all rows allow it, else fp32.

    Rows of bf16 do, and rows of fp32 where torch's own products of fp32 matrices may be taken in bf16 on a CPU
    (``torch.set_float32_matmul_precision("medium")``).
    """
    if not module.has_bf16_products():
        return torch.float32
    allowed = {torch.bfloat16, torch.float32} if _fp32_in_bf16() else {torch.bfloat16}
    return torch.bfloat16 if all(x.dtype in allowed for x in rows) else torch.float32


def _fp32_in_bf16() -> bool:
    """Whether torch may multiply fp32 matrices in bf16 on a CPU; "none" follows the setting for all of oneDNN, and of torch."""
    settings: tuple[Any, ...] = (torch.backends.mkldnn.matmul, torch.backends.mkldnn, torch.backends)  # type: ignore[attr-defined]
    chosen = next((s.fp32_precision for s in settings if s.fp32_precision != "none"), "none")
    return bool(chosen == "bf16")


def cross_entropy(inputs: LossInputs) -> LossOutputs:
    """Loss, statistics and gradients."""
    images = check_pairing(inputs.pairing, len(inputs.teacher_features), len(inputs.student_features))
    if inputs.student.count != inputs.teacher.count:  # both networks' logits lie side by side
        raise ValueError(
            f"networks have {inputs.student.count} and {inputs.teacher.count} prototypes; expected the same number"
        )
    step = _Step.of(inputs, images)
    group = inputs.prototype_group
    chunks = chunks_of(step.views, images, _most_prototypes(step.student.prototypes, group), step.free_columns)
    for index, (chunk, logits) in enumerate(zip(chunks, step.rooms_for(chunks), strict=True)):
        step.run(chunk, logits, first=index == 0, last=index == len(chunks) - 1)
    if not chunks:
        step.clear()
    return step.outputs()


def usage(inputs: RowInputs) -> Tensor:
    """[K] mean probability of each prototype."""
    products, count, group = products_of(inputs.features), inputs.prototypes.count, inputs.prototype_group
    keys = native_keys(inputs.prototypes, inputs.temperature, inputs.bias, products).keeping_gains()
    x_RD, result = module.fp32(inputs.features), module.new(count).zero_()
    one_by_one = module.new(1, 1).fill_(1 / max(len(x_RD), 1))
    for rows in row_ranges(len(x_RD), _most_prototypes(count, group)):
        taken = rows.stop - rows.start
        logits = Logits.empty(keys.prototypes, padded(taken))
        softmax = score(x_RD[rows], keys, products, logits).merged_over_ranks(group)
        Gathering(keys, logits, Pairs(one_by_one, None, taken), Teachers(0, result)).run(products, softmax)
    return result


def row_log_sum_exp(inputs: RowInputs) -> Tensor:
    """[R] log-sum-exp over the prototypes, nats."""
    products, group = products_of(inputs.features), inputs.prototype_group
    keys = native_keys(inputs.prototypes, inputs.temperature, inputs.bias, products)
    x_RD = module.fp32(inputs.features)
    parts = [
        score(x_RD[rows], keys, products).merged_over_ranks(group).log_sum_exp
        for rows in row_ranges(len(x_RD), _most_prototypes(inputs.prototypes.count, group))
    ]
    return torch.cat(parts) * LN_2 if parts else x_RD.new_empty(0)


def column_log_sum_exp(inputs: RowInputs, offset: Tensor) -> Tensor:
    """[K] ``log sum_r exp(l_rk - offset_r)``, computed with rows and prototypes exchanged."""
    features, prototypes = inputs.features, inputs.prototypes
    products = products_of(features)
    own = native_keys(prototypes, inputs.temperature, inputs.bias, products)
    if not len(features):
        return module.new(prototypes.count).fill_(-torch.inf)
    x_RD, bias_R = module.fp32(features), -module.fp32(offset)
    keys = NativeKeys(x_RD, "linear", None, own.row_factor, own.factor, bias_R, own.scale)
    gain = prototypes.gain()
    parts = []
    for block in row_ranges(prototypes.count, len(x_RD)):
        w_BD = own.weight[block].to(torch.float32)
        w_BD = w_BD if gain is None else w_BD * gain[block, None]
        parts.append(score(w_BD.contiguous(), keys, products).log_sum_exp * LN_2)
    result = torch.cat(parts)
    return result if own.bias is None else result + own.bias


@dataclass
class _Step:
    """One call of the loss: what every chunk reads, and the sums to which the chunks add."""

    inputs: LossInputs
    views: tuple[int, int]  # G, V
    images: int
    products: torch.dtype
    student: NativeKeys
    teacher: NativeKeys
    student_rows: Tensor  # [S, D] fp32
    teacher_rows: Tensor  # [T, D of the teacher] fp32
    view_weights: Tensor  # [G, V] fp32
    image_weights: Tensor | None  # [B] fp32
    feature_gradient: Tensor  # [S, D]
    weight_gradient: Tensor | None  # [K, D]
    magnitude_gradient: Tensor | None  # [K]
    bias_gradient: Tensor  # [K] beta
    usage: Tensor  # [K] sum_t n_t q_t
    sums: list[tuple[float, float, float]]  # of every chunk: sum_s n_s H(p_s), sum_t n_t H(q_t), sum_t n_t
    question: UncenteredSums | None  # on the teacher's bias
    columns: Tensor | None  # [2, K] of the answer, as ``Teachers``

    @classmethod
    def of(cls, inputs: LossInputs, images: int) -> _Step:
        pairing, (teacher_views, student_views) = inputs.pairing, inputs.pairing.view_weights.shape
        x_SD = module.fp32(inputs.student_features)
        count, dim = inputs.student.weight.shape
        wanted = inputs.prototype_gradient
        products = products_of(inputs.student_features, inputs.teacher_features)
        by_image = pairing.image_weights
        student = native_keys(inputs.student, inputs.student_temperature, None, products)
        question = None
        if has_all_prototypes(inputs.prototype_group):
            question = question_on(inputs.teacher_bias)
        else:  # then rows have no sums over all prototypes before the gathering pass
            student = student.keeping_gains()
        return cls(
            inputs,
            (teacher_views, student_views),
            images,
            products,
            student,
            native_keys(
                inputs.teacher,
                inputs.teacher_temperature,
                inputs.teacher_bias,
                products,
                also_without_extra=question is not None,
            ),
            x_SD,
            module.fp32(inputs.teacher_features),
            module.fp32(pairing.view_weights),
            None if by_image is None else module.fp32(by_image),
            module.new(*x_SD.shape),
            module.new(count, dim) if wanted else None,
            module.new(count) if wanted and inputs.student.magnitude is not None else None,
            module.new(count),
            module.new(count),
            [],
            question,
            None if question is None else no_columns(count),
        )

    @property
    def free_columns(self) -> int:
        """Columns of logits that fit into the buffer of the prototypes' gradient, before the first chunk writes to it.

        The logits of a block are read before its gradient is written.
        """
        dim = int(self.student.weight.shape[1])
        return 0 if self.weight_gradient is None or dim != padded(dim) else dim

    def rooms_for(self, chunks: list[Chunk]) -> list[Logits]:
        """Memory for the logits of each chunk."""
        columns = [sum(_columns_of(chunk)) for chunk in chunks]
        rooms = []
        if columns and columns[0] <= self.free_columns and self.weight_gradient is not None:
            rooms.append(Logits([self.weight_gradient], 0))
        rest = columns[len(rooms) :]
        return rooms + (len(rest) * [Logits.empty(self.student.prototypes, max(rest))] if rest else [])

    def run(self, chunk: Chunk, logits: Logits, *, first: bool, last: bool) -> None:
        """Add a chunk's share to every sum; the last one pulls the gradient back to the stored prototypes."""
        whole = _sizes(chunk) == (*self.views, self.images)
        x_SD, x_TD, x_gradient = self.student_rows, self.teacher_rows, self.feature_gradient
        if not whole:
            x_SD = chunk.students_of(self._by_view(x_SD)).flatten(0, 1).contiguous()
            x_TD = chunk.teachers_of(x_TD.view(self.views[0], self.images, -1)).flatten(0, 1).contiguous()
            x_gradient = module.new(*x_SD.shape)
        column = _columns_of(chunk)[0]
        counts = chunk.student_views.start == 0  # of the chunks with its teacher rows, one adds to the columns
        teacher = self.teacher if counts else self.teacher._replace(other_bias=None)
        rest = self.student.scale[1]
        gathering = Gathering(
            self.student,
            logits,
            self._pairs(chunk),
            Teachers(column, self.usage, self.columns if counts else None),
            Students(
                features=x_SD if rest == 1 else x_SD * rest,
                feature_gradient=x_gradient,
                weight_gradient=self.weight_gradient,
                bias_gradient=self.bias_gradient,
                first=first,
                pull_back=self._pull_back() if last and self.weight_gradient is not None else None,
            ),
        )
        group = self.inputs.prototype_group
        if has_all_prototypes(group):
            native, run = module.built(), module.execution(self.products)
            tasks = score_task(x_SD, self.student, None), score_task(x_TD, teacher, None), gathering.task()
            memory, start = module.workspace(native.step_workspace(*tasks, run))
            sums = native.step(*tasks, run, start)
            del memory
        else:
            by_student = score(x_SD, self.student, self.products, logits).merged_over_ranks(group)
            at_teachers = logits.from_column(column)
            by_teacher = score(x_TD, self.teacher, self.products, at_teachers).merged_over_ranks(group)
            sums = gathering.run(self.products, by_teacher, by_student)
        self.sums.append((sums.student_entropy, sums.teacher_entropy, sums.weight))
        if rest != 1:
            x_gradient.mul_(rest)
        if not whole:
            mine = chunk.students_of(self._by_view(self.feature_gradient))
            # the pairs of a student row may be in several chunks, if its image has too many views for one
            (mine.copy_ if self._is_new(chunk) else mine.add_)(x_gradient.view(mine.shape))

    def _by_view(self, rows_SD: Tensor) -> Tensor:
        """[V, B, D] of the student's rows."""
        return rows_SD.view(self.views[1], self.images, -1)

    def _is_new(self, chunk: Chunk) -> bool:
        """Whether no earlier chunk had its student rows: then it has the first of the teacher's views."""
        return bool(chunk.teacher_views.start == 0)

    def _pairs(self, chunk: Chunk) -> Pairs:
        """The pairs of this chunk only, so that p - q is formed before G is rounded for the products."""
        by_view, by_image, sizes = self.view_weights, self.image_weights, _sizes(chunk)
        if sizes[:2] != self.views:
            by_view = by_view[chunk.teacher_views, chunk.student_views].contiguous()
        if sizes[2] != self.images and by_image is not None:
            by_image = by_image[chunk.images]
        return Pairs(by_view, by_image, sizes[2])

    def _pull_back(self) -> PullBack | None:
        """None if the stored prototypes are the effective ones and nothing else depends on their norms."""
        prototypes = self.inputs.student
        if prototypes.kind == "linear":
            return None
        norm = slope = None
        if self.student.norms == "linear":
            norm = torch.linalg.vector_norm(self.student.weight, dim=1, dtype=torch.float32)
        if prototypes.has_normalizer:
            scale = self.inputs.student_temperature.to(torch.float32).reciprocal()
            slope = -vmf_mean_resultant_length(prototypes.detach().norms() * scale, prototypes.dim) * scale
        return PullBack(self.student, norm, slope, self.magnitude_gradient)

    def outputs(self) -> LossOutputs:
        """The loss by equation (12), its statistics and gradients."""
        inputs, group = self.inputs, self.inputs.prototype_group
        shared = not has_all_prototypes(group)
        if self.question is not None and self.columns is not None:
            self.question.total = sums_of_columns(self.columns, self.teacher)
        if shared:
            self.feature_gradient = sum_over_ranks(self.feature_gradient, group)
        native, loss, summary = module.built(), module.new(), module.new(3)
        aligned = native.dot(self.feature_gradient, self.student_rows, self.feature_gradient.numel())
        biased, bias = 0.0, self.student.bias
        if bias is not None:
            biased = native.dot(bias, self.bias_gradient, bias.numel())
        if shared:
            biased = float(sum_over_ranks(torch.tensor(biased, dtype=torch.float64, device=module.CPU), group))
        student_entropy, teacher_entropy, total = map(math.fsum, zip(*self.sums, strict=True))
        value = student_entropy + aligned + biased
        total = total or 1.0  # if no pair has weight, every weighted sum is 0 as well
        means = teacher_entropy / total, student_entropy / total, (value - teacher_entropy) / total
        native.conclude(self.usage, self.usage.numel(), total, loss, value, summary, means)
        return LossOutputs(
            loss,
            summary,
            self.usage,
            self.feature_gradient if inputs.feature_gradient else module.new(0),
            module.new(0) if self.weight_gradient is None else self.weight_gradient,
            module.new(0) if self.magnitude_gradient is None else self.magnitude_gradient,
        )

    def clear(self) -> None:
        """Sums over no chunk."""
        self.sums.append((0.0, 0.0, 0.0))
        for total in (self.bias_gradient, self.usage, self.weight_gradient, self.magnitude_gradient):
            if total is not None:
                total.zero_()


def _columns_of(chunk: Chunk) -> tuple[int, int]:
    """How many columns of the logits a chunk's student rows and teacher rows take."""
    teacher, student, images = _sizes(chunk)
    return padded(student * images), padded(teacher * images)


def _sizes(chunk: Chunk) -> tuple[int, int, int]:
    """Teacher views, student views and images."""
    teacher, student, images = (
        part.stop - part.start for part in (chunk.teacher_views, chunk.student_views, chunk.images)
    )
    return teacher, student, images


def _most_prototypes(count: int, group: ProcessGroup | None) -> int:
    """K of the rank with the most: chunks of rows must be the same on every rank."""
    if has_all_prototypes(group):
        return count
    return int(max_over_ranks(torch.tensor(count, dtype=torch.float64, device=module.CPU), group))
