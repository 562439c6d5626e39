"""The same cross-entropy for codebases that keep their head: logits in, one fused pass, one gradient pass.

In torch, images go through in chunks that fit the cache; on NVIDIA GPUs the kernels of ``backends.triton.logits`` take over.
Every student logit is read once forward and once backward, and nothing of the size of the logits is stored but their gradient.

Legend: S / T student / teacher rows, G / V teacher / student views, B images, K prototypes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vmf_kernels.assign import check_bias, temperature_tensor
from vmf_kernels.backends.triton import logits as triton_logits
from vmf_kernels.backends.triton.logits import Side, Sums
from vmf_kernels.cross_entropy import CrossEntropy
from vmf_kernels.once import Form, cast_to, formed, no_gradients, once_differentiable, saveable
from vmf_kernels.operators import OperatorFunction, operator
from vmf_kernels.pairing import Pairing, check_pairing, check_weights
from vmf_kernels.prototypes import accumulation_dtype
from vmf_kernels.statistics import AssignmentStatistics, or_one, weighted_summary
from vmf_kernels.tensors import refuse_gradients

LOG2_E = 1.4426950408889634
LN_2 = math.log(2.0)
NAME = "logit_cross_entropy"
BACKENDS = ("auto", "torch", "triton")
CHUNK_BYTES = 8 * 2**20  # of logits at once: a few such copies stay in a 32 MiB L3


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

    Equals ``p = softmax(l_s / tau_s + student_bias)`` and ``q = softmax(l_t / tau_t + teacher_bias)`` in
    ``prototype_cross_entropy``, to which it is the sibling. Gradients flow to the student's logits, in their dtype, and to
    ``student_bias``; never to the teacher.

    Args:
        student_logits: [V * B, K] rows, view-major, not divided by the temperature; any floating dtype and strides.
        teacher_logits: [G * B, K] likewise.
        pair_weights, image_weights: [G, V] and [B] or None, as there.
        student_temperature, teacher_temperature: positive; a float or a tensor of one element.
        student_bias, teacher_bias: [K] nats, e.g. vMF log-normalisers and minus the centre, or None.
        backend: "torch" runs anywhere; "triton" has kernels for NVIDIA GPUs, rows of adjacent elements, up to fp32 and up to
            8 teacher views; "auto" takes it for CUDA tensors that it can run on.

    Raises:
        ValueError: shapes, weights, temperatures or the backend's name do not fit; says what was got and what was expected.
        RuntimeError: differentiated twice, or the backend asked for cannot run.
    Source: Caron et al., "Emerging properties in self-supervised vision transformers", ICCV 2021, section 3.1.
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; expected one of {', '.join(BACKENDS)}")
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
    loss, summary, usage, _, _ = _logit_op(
        student_logits,
        student_bias,
        teacher_logits.detach(),
        None if teacher_bias is None else teacher_bias.detach(),
        weights,
        images,
        temperature_tensor(student_temperature, "student_temperature", device),
        temperature_tensor(teacher_temperature, "teacher_temperature", device),
        backend,
    )
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


class _Logits(NamedTuple):
    """One network's stored logits and what turns them into base-2 log-probabilities."""

    rows: Tensor  # [views, B, K]
    scale: Tensor  # [] log2(e) / tau
    bias: Tensor | None  # [K], base 2

    @classmethod
    def of(cls, side: Side, views: int, dtype: torch.dtype) -> _Logits:
        # the lowest finite number, not -inf: its product with a zero probability would be NaN
        lowest = torch.finfo(dtype).min
        scaled = None if side.bias is None else (side.bias.reshape(-1).to(dtype) * LOG2_E).clamp(min=lowest)
        return cls(_by_view(side.logits, views), (LOG2_E / side.temperature).to(dtype), scaled)

    def chunk(self, images: slice) -> Tensor:
        """[b, views, K] base-2 logits of some images, a fresh tensor."""
        out = self.rows[:, images].transpose(0, 1).to(self.scale.dtype, copy=True).mul_(self.scale)
        return out if self.bias is None else out.add_(self.bias)


class _Softmax(NamedTuple):
    """Softmax of a chunk over its last dim, with what the loss needs of it; base 2."""

    deviation: Tensor  # [b, views, K] logits minus their maximum
    unnormalized: Tensor  # [b, views, K] 2^deviation
    mass: Tensor  # [b, views] sum of unnormalized
    log_sum_exp: Tensor  # [b, views]

    @classmethod
    def of(cls, logits: Tensor) -> _Softmax:
        top = logits.amax(dim=-1, keepdim=True)
        deviation = logits.sub_(top)
        unnormalized = deviation.exp2()
        mass = unnormalized.sum(dim=-1)
        return cls(deviation, unnormalized, mass, top.squeeze(-1) + mass.log2())

    def entropy(self) -> Tensor:
        """[b, views] nats."""
        spread: Tensor = torch.linalg.vecdot(self.unnormalized, self.deviation)
        nats: Tensor = (self.mass.log2() - spread / self.mass) * LN_2
        return nats


def _by_view(rows: Tensor, views: int) -> Tensor:
    """[views, B, K] view of [views * B, K] rows, whatever their strides."""
    return rows.view(views, rows.shape[0] // views, rows.shape[1])


def _image_chunks(images: int, row_bytes: int) -> Iterator[slice]:
    size = max(1, CHUNK_BYTES // max(row_bytes, 1))
    for start in range(0, images, size):
        yield slice(start, min(start + size, images))


def _takes_triton(backend: str, student: Side, teacher: Side, view_weights: Tensor) -> bool:
    """Whether the kernels run; "auto" never takes them where they are interpreted, on the CPU.

    Raises:
        RuntimeError: they are asked for by name and cannot run; says why.
    """
    if backend == "torch" or (backend == "auto" and student.logits.device.type != "cuda"):
        return False
    reason = triton_logits.unsupported(student.logits, teacher.logits, view_weights)
    if backend == "triton" and reason is not None:
        raise RuntimeError(f"backend 'triton' cannot run here: {reason}")
    return reason is None


def _torch_forward(student: Side, teacher: Side, view_weights: Tensor, weight_B: Tensor) -> Sums:
    """``triton_logits.forward`` in torch, for any floating dtype and strides."""
    (teacher_views, views), count = view_weights.shape, student.logits.shape[1]
    dtype = accumulation_dtype(student.logits.dtype)
    student_rows, teacher_rows = _Logits.of(student, views, dtype), _Logits.of(teacher, teacher_views, dtype)
    images = student_rows.rows.shape[1]
    sums = torch.zeros(3, dtype=torch.float64, device=student.logits.device)
    usage = view_weights.new_zeros(count)
    student_lse, teacher_lse = usage.new_empty(images, views), usage.new_empty(images, teacher_views)
    for chunk in _image_chunks(images, (views + teacher_views) * count * dtype.itemsize):
        s, t = _Softmax.of(student_rows.chunk(chunk)), _Softmax.of(teacher_rows.chunk(chunk))
        q = t.unnormalized / t.mass[..., None]
        # log p relative to the row's maximum: an offset common to the row never enters
        cross = s.mass.log2()[:, None, :] - q @ s.deviation.transpose(1, 2)
        weight_bGV = weight_B[chunk, None, None] * view_weights
        teacher_mass, student_mass = weight_bGV.sum(dim=2), weight_bGV.sum(dim=1)
        sums += torch.stack(
            [(weight_bGV * cross).sum() * LN_2, (teacher_mass * t.entropy()).sum(), (student_mass * s.entropy()).sum()]
        )
        usage += teacher_mass.reshape(-1) @ q.reshape(-1, count)
        student_lse[chunk], teacher_lse[chunk] = s.log_sum_exp, t.log_sum_exp
    return Sums(sums, usage, student_lse, teacher_lse)


def _torch_backward(
    loss_grad: Tensor,
    student: Side,
    teacher: Side,
    view_weights: Tensor,
    weight_B: Tensor,
    student_lse: Tensor,
    teacher_lse: Tensor,
) -> tuple[Tensor, Tensor]:
    """``triton_logits.backward`` in torch, for any floating dtype and strides."""
    (teacher_views, views), count = view_weights.shape, student.logits.shape[1]
    dtype = accumulation_dtype(student.logits.dtype)
    student_rows, teacher_rows = _Logits.of(student, views, dtype), _Logits.of(teacher, teacher_views, dtype)
    # scaled in fp32 before the cast: under a GradScaler the unscaled gradient would underflow in fp16
    weight_B = weight_B * loss_grad.to(dtype)
    gradient = torch.empty_like(student.logits, memory_format=torch.contiguous_format)
    by_view = _by_view(gradient, views)
    bias_gradient = view_weights.new_zeros(count)
    for chunk in _image_chunks(weight_B.shape[0], (views + teacher_views) * count * dtype.itemsize):
        p = student_rows.chunk(chunk).sub_(student_lse[chunk, :, None]).exp2_()
        q = teacher_rows.chunk(chunk).sub_(teacher_lse[chunk, :, None]).exp2_()
        p.mul_(view_weights.sum(dim=0)[:, None]).sub_(view_weights.T @ q).mul_(weight_B[chunk, None, None])
        if student.bias is not None:
            bias_gradient += p.sum(dim=(0, 1))
        by_view[:, chunk] = p.mul_(student.temperature.to(dtype).reciprocal()).transpose(0, 1)
    return gradient, bias_gradient


class _Gradient(OperatorFunction):
    """Gradients at the student's logits and its bias."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Sequence[Tensor]:
        outputs = formed(ctx, _logit_op, inputs)
        *tensors, ctx.backend = inputs
        ctx.forms = [Form.of(tensor) for tensor in tensors[:2]]
        ctx.save_for_backward(*(saveable(tensor) for tensor in (*tensors, *outputs[3:])))
        return outputs

    @staticmethod
    def backward(ctx: Any, loss_grad: Tensor | None, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
        if loss_grad is None:
            return no_gradients(9)
        saved = ctx.saved_tensors
        with torch.no_grad():
            gradients: Sequence[Tensor] = _logit_backward_op(loss_grad, *saved, ctx.backend)
        gradients = once_differentiable(gradients, saved[:2], NAME)
        return (*cast_to(ctx.forms, gradients, ctx.needs_input_grad[:2]), *no_gradients(7))


def _fake_logit(
    student_logits: Tensor,
    student_bias: Tensor | None,
    teacher_logits: Tensor,
    teacher_bias: Tensor | None,
    view_weights: Tensor,
    image_weights: Tensor | None,
    student_temperature: Tensor,
    teacher_temperature: Tensor,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    teacher_views, views = view_weights.shape
    images = student_logits.shape[0] // views
    empty = view_weights.new_empty
    return empty(()), empty(3), empty(student_logits.shape[1]), empty(images, views), empty(images, teacher_views)


def _fake_logit_backward(
    loss_grad: Tensor,
    student_logits: Tensor,
    student_bias: Tensor | None,
    teacher_logits: Tensor,
    teacher_bias: Tensor | None,
    view_weights: Tensor,
    image_weights: Tensor | None,
    student_temperature: Tensor,
    teacher_temperature: Tensor,
    student_lse: Tensor,
    teacher_lse: Tensor,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    gradient = torch.empty_like(student_logits, memory_format=torch.contiguous_format)
    return gradient, view_weights.new_empty(student_logits.shape[1])


@operator(NAME, fake=_fake_logit, gradient=_Gradient)
def _logit_op(
    student_logits: Tensor,
    student_bias: Tensor | None,
    teacher_logits: Tensor,
    teacher_bias: Tensor | None,
    view_weights: Tensor,
    image_weights: Tensor | None,
    student_temperature: Tensor,
    teacher_temperature: Tensor,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss [], statistics [3], usage [K], base-2 log-sum-exp of the student [B, V] and of the teacher [B, G])."""
    student = Side(student_logits, student_bias, student_temperature)
    teacher = Side(teacher_logits, teacher_bias, teacher_temperature)
    images = student_logits.shape[0] // view_weights.shape[1]
    weight_B = view_weights.new_ones(images) if image_weights is None else image_weights
    forward = triton_logits.forward if _takes_triton(backend, student, teacher, view_weights) else _torch_forward
    sums = forward(student, teacher, view_weights, weight_B)
    total = weight_B.sum() * view_weights.sum()
    loss, teacher_entropy, student_entropy = sums.terms.unbind()
    summary, dtype = weighted_summary(loss, teacher_entropy, student_entropy, total.double()), view_weights.dtype
    return loss.to(dtype), summary.to(dtype), sums.usage / or_one(total), sums.student_lse, sums.teacher_lse


@operator(f"{NAME}_backward", fake=_fake_logit_backward)
def _logit_backward_op(
    loss_grad: Tensor,
    student_logits: Tensor,
    student_bias: Tensor | None,
    teacher_logits: Tensor,
    teacher_bias: Tensor | None,
    view_weights: Tensor,
    image_weights: Tensor | None,
    student_temperature: Tensor,
    teacher_temperature: Tensor,
    student_lse: Tensor,
    teacher_lse: Tensor,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Gradient at the student's logits [S, K], in their dtype, and at its bias [K]."""
    student = Side(student_logits, student_bias, student_temperature)
    teacher = Side(teacher_logits, teacher_bias, teacher_temperature)
    images = student_logits.shape[0] // view_weights.shape[1]
    weight_B = view_weights.new_ones(images) if image_weights is None else image_weights
    backward = triton_logits.backward if _takes_triton(backend, student, teacher, view_weights) else _torch_backward
    return backward(loss_grad, student, teacher, view_weights, weight_B, student_lse, teacher_lse)
