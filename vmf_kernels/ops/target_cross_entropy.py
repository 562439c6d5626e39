"""The cross-entropy of a student with a teacher's targets, for stored and unstored logits and targets.

Legend: S / T student / teacher rows, G / V teacher / student views, B images, K prototypes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from vmf_kernels.ops.logit_cross_entropy import logit_cross_entropy
from vmf_kernels.ops.prototype_cross_entropy import CrossEntropy, prototype_cross_entropy
from vmf_kernels.pairing import Pairing, check_pairing
from vmf_kernels.prototypes import LOWEST_BIAS, accumulation_dtype
from vmf_kernels.statistics import AssignmentStatistics, or_one
from vmf_kernels.tensors import is_readable
from vmf_kernels.unstored.prototype_logits import PrototypeLogits
from vmf_kernels.unstored.teacher_targets import TeacherTargets


def target_cross_entropy(
    student: PrototypeLogits | Tensor,
    targets: TeacherTargets | Tensor,
    pair_weights: Tensor,
    *,
    student_temperature: float | Tensor = 0.1,
    student_bias: Tensor | None = None,
    image_weights: Tensor | None = None,
    backend: str = "auto",
    prototype_group: ProcessGroup | None = None,
) -> CrossEntropy:
    """Weighted sum over pairs of rows of ``-sum_k q_t(k) log p_s(k)``, for stored or unstored p and q.

    If nothing is stored, this is ``prototype_cross_entropy``. If the logits of both networks are stored, it is
    ``logit_cross_entropy``; if q itself is stored, the same with ``log q``. Then q may have any strides and zeros, and a row
    of q need not sum to 1 (a row of padding sums to 0): a row with sum s counts s times, as in the plain formula. With stored
    q this takes one pass for each teacher view if G > 1 and B > 1.

    Args:
        student: [V * B, K] raw logits, or any [..., K] with these rows, view-major.
        targets: [G * B, K] teacher's assignments, likewise; or a tensor of probabilities, which gets no gradient.
        pair_weights, image_weights: [G, V] and [B] or None, as in ``prototype_cross_entropy``.
        student_temperature: positive; a float or a tensor of one element.
        student_bias: [K] nats that stored logits lack (the vMF log-normaliser), or None.
        backend: as in ``prototype_cross_entropy``; for stored logits, as in ``logit_cross_entropy``.
        prototype_group: as in ``prototype_cross_entropy``; for unstored logits only.

    Returns:
        The loss, nats, and its statistics, in which a row of q has its weight times its sum.

    Raises:
        TypeError: one side is stored and the other is not.
        ValueError: as in ``prototype_cross_entropy``; or ``student_bias`` came with an unstored student, or
            ``prototype_group`` with a stored one, or probabilities on the CPU are negative (on other devices the check would
            wait).
    Source: Caron et al., ICCV 2021 (DINO), section 3.1; Zhou et al., "iBOT", ICLR 2022, equation 2.

    Example:
        >>> student, teacher = (DINOHead(8, 512, hidden_dim=16, bottleneck_dim=4)(torch.randn(3, 8)) for _ in range(2))
        >>> result = target_cross_entropy(student, TeacherTargets(teacher, temperature=0.04), torch.ones(1, 1) / 3)
        >>> stored = target_cross_entropy(
        ...     student.materialize(), TeacherTargets(teacher, 0.04).materialize(), torch.ones(1, 1) / 3
        ... )
        >>> torch.allclose(result.loss, stored.loss, rtol=1e-4)
        True
    """
    _check_kinds(student, targets)
    if isinstance(student, PrototypeLogits):
        assert isinstance(targets, TeacherTargets)
        assert isinstance(targets.logits, PrototypeLogits)
        if student_bias is not None:
            raise ValueError(
                "student_bias came with PrototypeLogits, whose prototypes add their own normaliser (Prototypes.with_vmf); "
                "expected None"
            )
        return prototype_cross_entropy(
            _flat(student.features, "student"),
            student.prototypes,
            _flat(targets.logits.features, "targets"),
            targets.logits.prototypes,
            pair_weights,
            student_temperature=student_temperature,
            teacher_temperature=targets.temperature,
            teacher_bias=targets.bias,
            image_weights=image_weights,
            backend=backend,
            prototype_group=prototype_group,
        )
    if prototype_group is not None:
        raise ValueError("prototype_group came with stored logits; expected PrototypeLogits, which ranks can split")
    rows = _flat(student, "student")
    options = _StoredOptions(student_temperature, student_bias, backend)
    if isinstance(targets, TeacherTargets):
        flat = _flat(targets._rows, "targets")
        return options.loss(rows, flat, pair_weights, image_weights, targets.temperature, targets.bias)
    return _probability_cross_entropy(rows, _flat(targets.detach(), "targets"), pair_weights, image_weights, options)


@dataclass(frozen=True)
class _StoredOptions:
    """Options that all calls on stored logits of one student share."""

    temperature: float | Tensor
    bias: Tensor | None
    backend: str

    def loss(
        self,
        student: Tensor,
        teacher: Tensor,
        pair_weights: Tensor,
        image_weights: Tensor | None,
        teacher_temperature: float | Tensor = 1.0,
        teacher_bias: Tensor | None = None,
    ) -> CrossEntropy:
        """``logit_cross_entropy`` of rows [S, K] and [T, K]."""
        return logit_cross_entropy(
            student,
            teacher,
            pair_weights,
            student_temperature=self.temperature,
            teacher_temperature=teacher_temperature,
            student_bias=self.bias,
            teacher_bias=teacher_bias,
            image_weights=image_weights,
            backend=self.backend,
        )


def _probability_cross_entropy(
    student: Tensor, q_TK: Tensor, pair_weights: Tensor, image_weights: Tensor | None, options: _StoredOptions
) -> CrossEntropy:
    """The loss of stored logits [S, K] with stored probabilities: ``q = s softmax(log q)``, s being the sum of a row."""
    images = check_pairing(Pairing(pair_weights, image_weights), q_TK.shape[0], student.shape[0])
    dtype = accumulation_dtype(q_TK.dtype)
    if is_readable(q_TK) and (q_TK < 0).any():
        raise ValueError(
            f"targets go down to {q_TK.min().item():.3g}; expected probabilities, or TeacherTargets of the teacher's raw logits"
        )
    sum_T = q_TK.sum(dim=-1, dtype=dtype)
    # NaN in, NaN out: the logarithms carry it; as a weight it would be refused
    sum_T = torch.where(sum_T.isfinite(), sum_T, 1.0)
    # contiguous, because some kernels need adjacent elements in a row, and Sinkhorn's result is transposed
    log_q_TK = q_TK.contiguous().to(dtype).log().clamp_(min=LOWEST_BIAS)
    views = pair_weights.shape[0]
    if images == 1:  # weights between single rows
        return options.loss(student, log_q_TK, pair_weights.detach().to(sum_T.device) * sum_T[:, None], image_weights)
    sum_GB = sum_T.view(views, images)
    weights_GB = sum_GB if image_weights is None else sum_GB * image_weights.detach().to(sum_GB)
    parts = [
        options.loss(student, log_q, pair_weights[view : view + 1], weights_GB[view])
        for view, log_q in enumerate(log_q_TK.view(views, images, q_TK.shape[1]))
    ]
    return parts[0] if views == 1 else _sum(parts, pair_weights.detach().sum(dim=1).to(weights_GB) * weights_GB.sum(1))


def _sum(parts: list[CrossEntropy], totals_G: Tensor) -> CrossEntropy:
    """The loss over all teacher views, and the mean of their statistics, weighted by the summed weights of their pairs."""
    shares_G = totals_G / or_one(totals_G.sum())

    def mean(values: list[Tensor]) -> Tensor:
        return torch.stack([share.to(value) * value for share, value in zip(shares_G, values, strict=True)]).sum(dim=0)

    of = [part.statistics for part in parts]
    statistics = AssignmentStatistics(
        mean([s.teacher_entropy for s in of]),
        mean([s.student_entropy for s in of]),
        mean([s.kl for s in of]),
        mean([s.usage for s in of]),
    )
    return CrossEntropy(torch.stack([part.loss for part in parts]).sum(), statistics)


def _check_kinds(student: object, targets: object) -> None:
    """Raise TypeError unless both sides are stored, or neither is."""
    if not isinstance(student, (PrototypeLogits, Tensor)):
        raise TypeError(f"student is {type(student).__name__}; expected PrototypeLogits or a tensor of raw logits")
    if not isinstance(targets, (TeacherTargets, Tensor)):
        raise TypeError(
            f"targets are {type(targets).__name__}; expected TeacherTargets(logits, temperature) or a tensor of "
            "probabilities"
        )
    unstored = isinstance(targets, TeacherTargets) and isinstance(targets.logits, PrototypeLogits)
    if isinstance(student, PrototypeLogits) and not unstored:
        got = "a tensor of probabilities" if isinstance(targets, Tensor) else "TeacherTargets over stored logits"
        raise TypeError(
            f"student is PrototypeLogits but targets are {got}; expected TeacherTargets over the teacher's PrototypeLogits, "
            "or student.materialize()"
        )
    if isinstance(student, Tensor) and unstored:
        raise TypeError(
            "student is a tensor but targets are TeacherTargets over PrototypeLogits; expected a student head that returns "
            "PrototypeLogits, or targets.materialize()"
        )


def _flat(rows: Tensor, side: str) -> Tensor:
    """[rows, N] of [..., N]."""
    if rows.ndim < 2:
        raise ValueError(f"{side} is a single row of {rows.numel()} stored elements; expected [..., K] rows")
    return rows.flatten(0, -2)
