"""Cross-entropy between teacher and student assignments to prototypes, streaming, with its gradient.

Numbers in brackets are equations of vmf_kernels/README.md. Gradients are computed in forward, where the probabilities are in
cache, and only scaled in backward: 6 instead of 8 flops per logit and dim.

Legend: S / T student / teacher rows, G / V teacher / student views, B images, K prototypes, D embedding dim.
"""

# Without postponed annotations: the constructor of CrossEntropy would keep the names of its types, which pdoc cannot resolve.

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from vmf_kernels.arguments import check_bias, check_features, in_autocast_dtype, temperature_tensor
from vmf_kernels.backends.choice import choose_backend
from vmf_kernels.backends.contract import LossInputs
from vmf_kernels.backends.scaling import scale_in_place
from vmf_kernels.ops.operators import OperatorFunction, called, operator
from vmf_kernels.ops.ready_gradients import (
    Form,
    Kept,
    ReadyGradients,
    cast_to,
    formed,
    no_gradients,
    once_differentiable,
)
from vmf_kernels.pairing import Pairing, check_pairing, check_weights
from vmf_kernels.prototypes import Prototypes, accumulation_dtype, refuse_severed
from vmf_kernels.ranks import gather_objects, group_named, name_of, sum_over_ranks
from vmf_kernels.statistics import AssignmentStatistics, SharedStatistics, entropy
from vmf_kernels.tensors import may_require_grad, refuse_gradients, without_gradient

NAME = "prototype_cross_entropy"


class CrossEntropy(NamedTuple):
    """A loss and its detached by-products.

    Example:
        >>> rows, prototypes = torch.randn(3, 4), vmf_prototypes(torch.randn(512, 4))
        >>> loss, statistics = prototype_cross_entropy(rows, prototypes, rows, prototypes, torch.ones(1, 1))
        >>> tuple(loss.shape), torch.allclose(loss, 3 * (statistics.teacher_entropy + statistics.kl))
        ((), True)
    """

    loss: Tensor  # [] nats, fp32 (fp64 for fp64 student features), differentiable
    statistics: AssignmentStatistics


def prototype_cross_entropy(
    student_features: Tensor,
    student_prototypes: Prototypes,
    teacher_features: Tensor,
    teacher_prototypes: Prototypes,
    pair_weights: Tensor,
    *,
    student_temperature: float | Tensor = 0.1,
    teacher_temperature: float | Tensor = 0.04,
    teacher_bias: Tensor | None = None,
    image_weights: Tensor | None = None,
    backend: str = "auto",
    prototype_group: ProcessGroup | None = None,
) -> CrossEntropy:
    """Weighted sum over pairs of rows of ``-sum_k q_t(k) log p_s(k)``, without any [rows, K] tensor.

    Here ``p = softmax(x_s W_s^T / tau_s + b_s)`` and ``q = softmax(x_t W_t^T / tau_t + b_t + teacher_bias)``. b is the vMF
    log-normaliser of the network's own prototypes at its own temperature, or 0 (equations 1-3). Gradients flow to the
    student's features and prototypes (equations 4-7), never to the teacher.

    Args:
        student_features: [V * B, D] rows, view-major; float64, float32, bfloat16 or float16, summed in fp32 (fp64).
        student_prototypes: K prototypes of dim D.
        teacher_features: [G * B, D] rows, view-major; same dtypes. The teacher's D may differ from the student's.
        teacher_prototypes: K prototypes of dim D, the teacher's own copy.
        pair_weights: [G, V] weight of teacher view g with student view v of the same image, not negative; with B = 1,
            an arbitrary matrix [T, S] between single rows.
        student_temperature, teacher_temperature: positive; a float or a tensor of one element. If features are on a GPU, put
            tensors of weights and temperatures there too: copying them waits for the device.
        teacher_bias: [K] nats added to the teacher's logits (a centre or dual vector), or None.
        image_weights: [B] further weight of each image, or None.
        backend: "auto", "native", "cuda", "triton", "streaming" or "reference"; see ``choose_backend``.
        prototype_group: ranks over which the prototypes are split, or None if this rank has all prototypes. Each rank has a
            block of prototypes (K may differ) and bitwise the same rows. Each gets the whole loss and the whole gradient of
            the features, and the gradient and usage of its own prototypes. Ranks exchange D + 3 or D + 4 numbers per row,
            never logits. The student's prototypes must require a gradient on all of these ranks or on none, and so must its
            features.

    Returns:
        The loss, nats, and its statistics.

    Raises:
        ValueError: shapes, weights, temperatures or the backend's name do not fit, or ranks of the group hold different rows
            (checked on the CPU only, because it would wait for another device). The text says what was given and expected.
            NaN in features or prototypes is no error: the loss is NaN, as with stored logits.
        RuntimeError: a second derivative is computed, the named backend cannot run, or the student's head ran where its
            gradient is lost.
    Source: Caron et al., ICCV 2021 (DINO), section 3.1; Govindarajan et al., ICLR 2023 (DINO-vMF), section 4.

    Example:
        >>> student, teacher, weight = torch.randn(3, 4, requires_grad=True), torch.randn(2, 4), torch.randn(512, 4)
        >>> pairs, prototypes = torch.rand(2, 3), linear_prototypes(weight)
        >>> loss, statistics = prototype_cross_entropy(student, prototypes, teacher, prototypes, pairs)
        >>> q, log_p = (teacher @ weight.T / 0.04).softmax(1), (student @ weight.T / 0.1).log_softmax(1)
        >>> torch.allclose(loss, -(pairs * (q @ log_p.T)).sum(), rtol=1e-4)
        True
    """
    _check_sides(student_features, student_prototypes, teacher_features, teacher_prototypes)
    refuse_severed(student_prototypes)
    check_bias(teacher_bias, teacher_prototypes.count, "teacher_bias")
    refuse_gradients(
        pair_weights=pair_weights,
        image_weights=image_weights,
        student_temperature=student_temperature,
        teacher_temperature=teacher_temperature,
        teacher_bias=teacher_bias,
    )
    student_features, teacher_features = in_autocast_dtype(student_features), in_autocast_dtype(teacher_features)
    device = student_features.device
    dtype = accumulation_dtype(student_features.dtype)
    pairing = Pairing(
        without_gradient(pair_weights).to(device=device, dtype=dtype),
        None if image_weights is None else without_gradient(image_weights).to(device=device, dtype=dtype),
    )
    check_pairing(pairing, teacher_features.shape[0], student_features.shape[0])
    check_weights(pairing)
    student, teacher = student_prototypes, teacher_prototypes
    arguments = _Arguments(
        student_features=student_features,
        student_weight=student.weight,
        student_magnitude=student.magnitude,
        student_kind=student.kind,
        teacher_features=without_gradient(teacher_features),
        teacher_weight=without_gradient(teacher.weight),
        teacher_magnitude=None if teacher.magnitude is None else without_gradient(teacher.magnitude),
        teacher_kind=teacher.kind,
        # the object itself if possible: it may hold a question (backends/uncentered.py)
        teacher_bias=None if teacher_bias is None else without_gradient(teacher_bias),
        view_weights=pairing.view_weights,
        image_weights=pairing.image_weights,
        student_temperature=temperature_tensor(student_temperature, "student_temperature", device),
        teacher_temperature=temperature_tensor(teacher_temperature, "teacher_temperature", device),
        feature_gradient=_wants_gradient(student_features),
        prototype_gradient=_wants_gradient(student.weight, student.magnitude),
        backend=backend,
        group=name_of(prototype_group),
    )
    loss, summary, usage = called(_cross_entropy_op, _Gradient, arguments)[:3]
    statistics = AssignmentStatistics.of_op(summary, usage)
    if prototype_group is not None:
        usage_entropy = sum_over_ranks(entropy(statistics.usage), prototype_group)
        statistics = SharedStatistics(**vars(statistics), usage_entropy=usage_entropy)
    return CrossEntropy(loss, statistics)


def matched_prototype_cross_entropy(
    student_features: Tensor,
    student_prototypes: Prototypes,
    teacher_features: Tensor,
    teacher_prototypes: Prototypes,
    row_weights: Tensor,
    *,
    student_temperature: float | Tensor = 0.1,
    teacher_temperature: float | Tensor = 0.04,
    teacher_bias: Tensor | None = None,
    backend: str = "auto",
    prototype_group: ProcessGroup | None = None,
) -> CrossEntropy:
    """One-to-one sibling of ``prototype_cross_entropy``: row r of the student learns from row r of the teacher.

    Args:
        student_features, teacher_features: [R, D] rows, e.g. the masked patches of the student and the same patches as
            the teacher sees them.
        row_weights: [R] weight of each pair, e.g. 1 / (masked patches of its image * images).
        student_prototypes, teacher_prototypes, student_temperature, teacher_temperature, teacher_bias, backend,
            prototype_group: as in ``prototype_cross_entropy``; result and errors too.
    Source: Zhou et al., "iBOT", ICLR 2022, equation 2.

    Example:
        >>> student, teacher = torch.randn(5, 4, requires_grad=True), torch.randn(5, 4)  # masked patches
        >>> prototypes = vmf_prototypes(torch.randn(512, 4))
        >>> loss, _ = matched_prototype_cross_entropy(student, prototypes, teacher, prototypes, torch.full((5,), 1 / 5))
        >>> loss.backward()
        >>> tuple(student.grad.shape)
        (5, 4)
    """
    return prototype_cross_entropy(
        student_features,
        student_prototypes,
        teacher_features,
        teacher_prototypes,
        row_weights.new_ones(1, 1),
        student_temperature=student_temperature,
        teacher_temperature=teacher_temperature,
        teacher_bias=teacher_bias,
        image_weights=row_weights,
        backend=backend,
        prototype_group=prototype_group,
    )


def _wants_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and may_require_grad(t) for t in tensors)


def _check_sides(
    student: Tensor, student_prototypes: Prototypes, teacher: Tensor, teacher_prototypes: Prototypes
) -> None:
    check_features(student, student_prototypes, "student")
    check_features(teacher, teacher_prototypes, "teacher")
    if student_prototypes.count != teacher_prototypes.count:
        ours, theirs = (list(prototypes.weight.shape) for prototypes in (student_prototypes, teacher_prototypes))
        raise ValueError(
            f"student prototypes are [K, D] = {ours} but teacher prototypes {theirs}; both networks must have the same K"
        )
    if student.device != teacher.device:
        raise ValueError(
            f"student features are on {student.device} but teacher features on {teacher.device}; expected one device"
        )


class _Arguments(NamedTuple):
    student_features: Tensor
    student_weight: Tensor
    student_magnitude: Tensor | None
    student_kind: str
    teacher_features: Tensor
    teacher_weight: Tensor
    teacher_magnitude: Tensor | None
    teacher_kind: str
    teacher_bias: Tensor | None
    view_weights: Tensor
    image_weights: Tensor | None
    student_temperature: Tensor
    teacher_temperature: Tensor
    feature_gradient: bool
    prototype_gradient: bool
    backend: str
    group: str = ""

    def inputs(self) -> LossInputs:
        """The arguments for a backend."""
        return LossInputs(
            self.student_features,
            Prototypes(self.student_weight, self.student_magnitude, self.student_kind),
            self.teacher_features,
            Prototypes(self.teacher_weight, self.teacher_magnitude, self.teacher_kind),
            self.teacher_bias,
            Pairing(self.view_weights, self.image_weights),
            self.student_temperature,
            self.teacher_temperature,
            self.feature_gradient,
            self.prototype_gradient,
            group_named(self.group),
        )


class _Gradient(OperatorFunction):
    """Gradients at the student's features, weight and magnitude, computed by the forward pass."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Sequence[Tensor]:
        outputs = formed(ctx, _cross_entropy_op, inputs)
        student, rest = inputs[:3], inputs[3:]
        ctx.forms = [Form.of(tensor) for tensor in student]
        # autograd cannot save tensors of torch.inference_mode
        unsaved = [t if t is not None and t.is_inference() else None for t in student]
        ctx.save_for_backward(*(t if kept is None else None for t, kept in zip(student, unsaved, strict=True)))
        ctx.kept = Kept([*unsaved, *(x for x in rest if isinstance(x, Tensor))], NAME)
        ctx.rest = [None if isinstance(x, Tensor) else (x,) for x in rest]
        ctx.ready = ReadyGradients(outputs[3:], scale_in_place)
        return outputs

    @staticmethod
    def backward(ctx: Any, loss_grad: Tensor | None, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
        nothing = no_gradients(len(ctx.rest))
        if loss_grad is None:
            return (*no_gradients(3), *nothing)

        def student() -> list[Tensor | None]:
            return [
                kept if saved is None else saved
                for saved, kept in zip(ctx.saved_tensors, ctx.kept.unchanged()[:3], strict=True)
            ]

        def recompute() -> Sequence[Tensor]:
            others = iter(ctx.kept.unchanged()[3:])
            rest = [next(others) if x is None else x[0] for x in ctx.rest]
            with torch.no_grad():
                outputs: Sequence[Tensor] = _cross_entropy_op(*student(), *rest)
            return outputs[3:]

        gradients: Sequence[Tensor] = ctx.ready.take(loss_grad, recompute)
        if torch.is_grad_enabled():
            gradients = once_differentiable(gradients, student(), NAME)
        return (*cast_to(ctx.forms, gradients, ctx.needs_input_grad[:3]), *nothing)


def _fake_outputs(args: _Arguments) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    count = args.student_weight.shape[0]
    has_magnitude = args.prototype_gradient and args.student_magnitude is not None

    def empty(*shape: int) -> Tensor:
        return args.student_features.new_empty(shape, dtype=accumulation_dtype(args.student_features.dtype))

    return (
        empty(),
        empty(3),
        empty(count),
        empty(*args.student_features.shape) if args.feature_gradient else empty(0),
        empty(*args.student_weight.shape) if args.prototype_gradient else empty(0),
        empty(count) if has_magnitude else empty(0),
    )


def _flops(shapes: Any) -> int:
    """Operations of the products, as many as with stored logits in both passes; here forward computes those of backward."""
    count, dim = shapes.student_weight
    products = 1 + shapes.feature_gradient + shapes.prototype_gradient
    return int(
        2
        * count
        * (products * shapes.student_features[0] * dim + shapes.teacher_features[0] * shapes.teacher_weight[1])
    )


@operator(NAME, _Arguments, fake=_fake_outputs, flops=_flops, gradient=_Gradient)
def _cross_entropy_op(args: _Arguments) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss [], statistics [3], usage [K], and the gradients at student features, weight and magnitude).

    A gradient that is not requested has 0 elements.
    """
    inputs = args.inputs()
    rows = _rows_of_products(args.student_features, args.teacher_features)
    _refuse_other_rows(args.student_features, args.teacher_features, inputs.prototype_group)
    return choose_backend(args.backend, rows, args.student_weight, args.teacher_weight).cross_entropy(inputs)


def _refuse_other_rows(student: Tensor, teacher: Tensor, group: ProcessGroup | None) -> None:
    """Raise ValueError, on all ranks, unless the ranks of a prototype group hold the same rows; checked on the CPU only."""
    if group is None or student.device.type != "cpu":
        return
    everyone = gather_objects([(*rows.shape, _checksum(rows)) for rows in (student, teacher)], group)
    if any(other != everyone[0] for other in everyone):
        raise ValueError(
            f"ranks of the prototype group hold different rows: shapes and checksums of student and teacher are {everyone}; "
            "expected the same rows on each, gathered first where every rank has its own"
        )


def _checksum(rows: Tensor) -> int:
    """Sum of the bits as integers, weighted by position: an integer sum does not depend on the order."""
    bits = rows.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[rows.dtype.itemsize]).flatten()
    return int(bits.to(torch.int64) @ torch.arange(1, len(bits) + 1, dtype=torch.int64, device=bits.device))


def _rows_of_products(student: Tensor, teacher: Tensor) -> Tensor:
    """Rows of the dtype of both networks' products: fp32 (empty) if the student's are 16-bit and the dtypes differ."""
    if student.dtype == teacher.dtype or student.dtype.itemsize > 2:
        return student
    return student.new_empty(0, student.shape[1], dtype=torch.float32)
