"""The same cross-entropy for codebases that keep their head: from stored logits, in one fused pass and one gradient pass.

Every student logit is read once in forward and once in backward. Only their gradient, of the size of the logits, is stored.

Legend: S / T student / teacher rows, G / V teacher / student views, B images, K prototypes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vmf_kernels.arguments import check_bias, temperature_tensor
from vmf_kernels.backends.stored.choice import check_stored_backend_name, choose_stored_backend
from vmf_kernels.backends.stored.contract import Side, StoredInputs
from vmf_kernels.ops.operators import OperatorFunction, operator
from vmf_kernels.ops.prototype_cross_entropy import CrossEntropy
from vmf_kernels.ops.ready_gradients import Form, cast_to, formed, no_gradients, once_differentiable, saveable
from vmf_kernels.pairing import Pairing, check_pairing, check_weights
from vmf_kernels.prototypes import accumulation_dtype
from vmf_kernels.statistics import AssignmentStatistics, or_one, weighted_summary
from vmf_kernels.tensors import refuse_gradients

NAME = "logit_cross_entropy"


def logit_cross_entropy(
    student_logits: Tensor,
    teacher_logits: Tensor,
    pair_weights: Tensor,
    *,
    student_temperature: float | Tensor = 0.1,
    teacher_temperature: float | Tensor = 0.04,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    image_weights: Tensor | None = None,
    backend: str = "auto",
) -> CrossEntropy:
    """Weighted sum over pairs of rows of ``-sum_k q_t(k) log p_s(k)`` from stored logits.

    Here ``p = softmax(l_s / tau_s + student_bias)`` and ``q = softmax(l_t / tau_t + teacher_bias)``. It equals
    ``prototype_cross_entropy``, which computes the same from features and prototypes. Gradients flow to the student's logits,
    in their dtype, and to ``student_bias``; never to the teacher.

    Args:
        student_logits: [V * B, K] rows, view-major, not divided by the temperature; any floating dtype and strides.
        teacher_logits: [G * B, K] likewise.
        pair_weights, image_weights: [G, V] and [B] or None, as in ``prototype_cross_entropy``.
        student_temperature, teacher_temperature: positive; a float or a tensor of one element.
        student_bias, teacher_bias: [K] nats, e.g. vMF log-normalisers and minus the centre, or None.
        backend: "torch", also named "streaming", runs anywhere. "triton" runs on NVIDIA GPUs, for rows of adjacent elements,
            at most fp32 and at most 8 teacher views; "auto" uses it for CUDA tensors that it can run on. Other backends need
            features and prototypes, and raise.

    Raises:
        ValueError: shapes, weights, temperatures or the backend's name do not fit; the text says what was given and expected.
        RuntimeError: a second derivative is computed, or the named backend cannot run.
    Source: Caron et al., "Emerging properties in self-supervised vision transformers", ICCV 2021, section 3.1.

    Example:
        >>> student, teacher = torch.randn(6, 512, requires_grad=True), torch.randn(4, 512)  # 3 and 2 views of 2 images
        >>> result = logit_cross_entropy(student, teacher, multi_crop_weights(2, 3) / 2)
        >>> result.loss.backward()
        >>> tuple(student.grad.shape), tuple(result.statistics.usage.shape)
        ((6, 512), (512,))
    """
    check_stored_backend_name(backend)
    _check_logits(student_logits, teacher_logits)
    check_bias(student_bias, student_logits.shape[1], "student_bias")
    check_bias(teacher_bias, student_logits.shape[1], "teacher_bias")
    refuse_gradients(
        pair_weights=pair_weights,
        image_weights=image_weights,
        student_temperature=student_temperature,
        teacher_temperature=teacher_temperature,
        teacher_bias=teacher_bias,
    )
    device, dtype = student_logits.device, accumulation_dtype(student_logits.dtype)
    weights = pair_weights.detach().to(device=device, dtype=dtype)
    images = None if image_weights is None else image_weights.detach().to(device=device, dtype=dtype)
    pairing = Pairing(weights, images)
    check_pairing(pairing, teacher_logits.shape[0], student_logits.shape[0])
    check_weights(pairing)
    arguments = _Arguments(
        student_logits=student_logits,
        student_bias=student_bias,
        teacher_logits=teacher_logits.detach(),
        teacher_bias=None if teacher_bias is None else teacher_bias.detach(),
        view_weights=weights,
        image_weights=images,
        student_temperature=temperature_tensor(student_temperature, "student_temperature", device),
        teacher_temperature=temperature_tensor(teacher_temperature, "teacher_temperature", device),
        backend=backend,
    )
    loss, summary, usage, _, _ = _logit_op(*arguments)
    return CrossEntropy(loss, AssignmentStatistics.of_op(summary, usage))


def _check_logits(student: Tensor, teacher: Tensor) -> None:
    for logits, side in ((student, "student"), (teacher, "teacher")):
        if logits.ndim != 2 or not logits.is_floating_point() or logits.shape[1] < 1:
            raise ValueError(
                f"{side} logits are {logits.dtype} of shape {tuple(logits.shape)}; "
                "expected a floating-point matrix [rows, K] with K >= 1 prototypes"
            )
    if student.shape[1] != teacher.shape[1]:
        raise ValueError(
            f"student logits have {student.shape[1]} columns but teacher logits {teacher.shape[1]}; "
            "both networks must have the same number of prototypes K"
        )
    if student.device != teacher.device:
        raise ValueError(
            f"student logits are on {student.device} but teacher logits on {teacher.device}; expected one device"
        )


class _Arguments(NamedTuple):
    student_logits: Tensor
    student_bias: Tensor | None
    teacher_logits: Tensor
    teacher_bias: Tensor | None
    view_weights: Tensor
    image_weights: Tensor | None
    student_temperature: Tensor
    teacher_temperature: Tensor
    backend: str = "auto"

    def inputs(self) -> StoredInputs:
        """The arguments for a backend."""
        images = self.student_logits.shape[0] // self.view_weights.shape[1]
        return StoredInputs(
            Side(self.student_logits, self.student_bias, self.student_temperature),
            Side(self.teacher_logits, self.teacher_bias, self.teacher_temperature),
            self.view_weights,
            self.view_weights.new_ones(images) if self.image_weights is None else self.image_weights,
        )


class _Upstream(NamedTuple):
    """Inputs of the backward pass besides the arguments."""

    loss_gradient: Tensor
    student_lse: Tensor
    teacher_lse: Tensor


class _Gradient(OperatorFunction):
    """Gradients at the student's logits and at its bias."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Sequence[Tensor]:
        outputs = formed(ctx, _logit_op, inputs)
        *tensors, ctx.backend = inputs
        ctx.forms = [Form.of(tensor) for tensor in tensors[:2]]
        ctx.save_for_backward(*(saveable(tensor) for tensor in (*tensors, *outputs[3:])))
        return outputs

    @staticmethod
    def backward(ctx: Any, loss_gradient: Tensor | None, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
        if loss_gradient is None:
            return no_gradients(len(_Arguments._fields))
        *tensors, student_lse, teacher_lse = ctx.saved_tensors
        with torch.no_grad():
            upstream = _Upstream(loss_gradient, student_lse, teacher_lse)
            gradients: Sequence[Tensor] = _logit_backward_op(*tensors, ctx.backend, *upstream)
        gradients = once_differentiable(gradients, tensors[:2], NAME)
        others = no_gradients(len(_Arguments._fields) - 2)
        return (*cast_to(ctx.forms, gradients, ctx.needs_input_grad[:2]), *others)


def _fake_logit(args: _Arguments) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    teacher_views, views = args.view_weights.shape
    (rows, count), empty = args.student_logits.shape, args.view_weights.new_empty
    images = rows // views
    return empty(()), empty(3), empty(count), empty(images, views), empty(images, teacher_views)


def _fake_logit_backward(args: _Arguments, upstream: _Upstream) -> tuple[Tensor, Tensor]:
    gradient = torch.empty_like(args.student_logits, memory_format=torch.contiguous_format)
    return gradient, args.view_weights.new_empty(args.student_logits.shape[1])


@operator(NAME, _Arguments, fake=_fake_logit, gradient=_Gradient)
def _logit_op(args: _Arguments) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss [], statistics [3], usage [K], base-2 log-sum-exp of the student [B, V] and of the teacher [B, G])."""
    inputs = args.inputs()
    sums = choose_stored_backend(args.backend, inputs).forward(inputs)
    total = inputs.image_weights.sum() * args.view_weights.sum()
    loss, teacher_entropy, student_entropy = sums.terms.unbind()
    summary = weighted_summary(loss, teacher_entropy, student_entropy, total.double())
    dtype = args.view_weights.dtype
    return loss.to(dtype), summary.to(dtype), sums.usage / or_one(total), sums.student_lse, sums.teacher_lse


@operator(f"{NAME}_backward", _Arguments, _Upstream, fake=_fake_logit_backward)
def _logit_backward_op(args: _Arguments, upstream: _Upstream) -> tuple[Tensor, Tensor]:
    """Gradient at the student's logits [S, K], in their dtype, and at its bias [K]."""
    inputs = args.inputs()
    return choose_stored_backend(args.backend, inputs).backward(inputs, *upstream)
