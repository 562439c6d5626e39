"""Teacher's assignments that are never stored, and the cross-entropy of a student with them.

Legend: S / T student / teacher rows, G / V teacher / student views, B images, K prototypes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from vmf_kernels.assign import check_bias, temperature_tensor
from vmf_kernels.backends import reference
from vmf_kernels.cross_entropy import CrossEntropy, prototype_cross_entropy
from vmf_kernels.dense_cross_entropy import logit_cross_entropy
from vmf_kernels.einops_backend import offer_to_einops
from vmf_kernels.logits import PrototypeLogits
from vmf_kernels.pairing import Pairing, check_pairing
from vmf_kernels.prototypes import LOWEST_BIAS, accumulation_dtype, prepare_keys
from vmf_kernels.row_index import advice
from vmf_kernels.same_layer import same_prototypes
from vmf_kernels.statistics import AssignmentStatistics, or_one
from vmf_kernels.tensors import is_readable, no_autocast, refuse_gradients
from vmf_kernels.unstored import UnstoredRows

# one name serves unstored and stored students: what streams over prototypes is plain torch on stored logits
LOGIT_BACKENDS = {"streaming": "torch", "reference": "torch", "native": "torch", "cuda": "triton"}


@dataclass(eq=False, repr=False)
class TeacherTargets(UnstoredRows):
    """Stands for ``q = softmax(logits / temperature + bias)``, a teacher's [..., K] assignments, without storing them.

    It behaves as that tensor in operations on its rows (``UnstoredRows``); ``.float()`` keeps 16-bit logits as they are, whose
    assignments are fp32 already. Prototypes with a vMF normaliser add it at this temperature. No gradient reaches any of it.

    Args:
        logits: [..., K] raw teacher logits, stored or not; detached.
        temperature: positive; a float or a tensor of one element.
        bias: [K] nats: minus the centre, a Sinkhorn dual vector, the vMF normaliser that stored logits lack; or None.

    Raises:
        ValueError: the logits are not [..., K] floating point, the bias has not K elements, bias or temperature require a
            gradient, or the temperature is not positive; that of a tensor on a GPU is not looked at, which would wait for it.
    """

    logits: PrototypeLogits | Tensor
    temperature: float | Tensor
    bias: Tensor | None = None

    def __post_init__(self) -> None:
        rows = self.logits.features if isinstance(self.logits, PrototypeLogits) else self.logits
        if not isinstance(rows, Tensor):
            return  # a tree of something else in the shape of this one, see PrototypeLogits
        offer_to_einops(TeacherTargets)
        if self.logits.ndim < 1 or not self.logits.is_floating_point() or self.logits.shape[-1] < 1:
            raise ValueError(
                f"teacher logits are {self.logits.dtype} of shape {tuple(self.logits.shape)}; "
                "expected floating point [..., K] with K >= 1 prototypes"
            )
        # only where needed: the same tensors in all parts of one batch are how cat knows that they belong together
        if self.logits.requires_grad:
            self.logits = self.logits.detach()
        refuse_gradients(temperature=self.temperature, bias=self.bias)
        if isinstance(self.bias, Tensor):
            check_bias(self.bias, self.logits.shape[-1], "bias")
            self.bias = self.bias.detach() if self.bias.requires_grad else self.bias
        tau = self.temperature
        visible = not isinstance(tau, Tensor) or (is_readable(tau) and tau.numel() == 1)
        if visible and not float(tau) > 0:
            raise ValueError(f"temperature is {float(tau)}; expected a number > 0")

    @property
    def shape(self) -> torch.Size:
        """[..., K]."""
        return self.logits.shape

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the probabilities: fp32, or fp64 for fp64 logits."""
        return accumulation_dtype(self.logits.dtype)

    @property
    def requires_grad(self) -> bool:
        """False."""
        return False

    @torch.no_grad()
    def materialize(self) -> Tensor:
        """[..., K] the probabilities, fp32 (fp64 for fp64 logits): the memory this class exists to save."""
        with no_autocast(self.device):
            tau = temperature_tensor(self.temperature, "temperature", self.device)
            if isinstance(self.logits, PrototypeLogits):
                keys = prepare_keys(self.logits.prototypes, tau, self.bias, self.dtype)
                return reference.logits(self.logits.features, keys).softmax(dim=-1)
            scaled = self.logits.to(self.dtype) / tau.to(self.dtype)
            if self.bias is not None:
                scaled += self.bias.to(self.dtype).reshape(-1).clamp(min=torch.finfo(self.dtype).min)
            return scaled.softmax(dim=-1)

    def detach(self) -> TeacherTargets:
        """The targets themselves, which have no gradient."""
        return self

    @property
    def _rows(self) -> Tensor:
        return self.logits if isinstance(self.logits, Tensor) else self.logits.features

    def _with(self, rows: Tensor) -> TeacherTargets:
        logits = rows if isinstance(self.logits, Tensor) else PrototypeLogits(rows, self.logits.prototypes)
        return TeacherTargets(logits, self.temperature, self.bias)

    def _moved(self, device: torch.device, dtype: torch.dtype) -> TeacherTargets:
        if dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{dtype} values of TeacherTargets: {advice(str(dtype))}")
        temperature = self.temperature.to(device) if isinstance(self.temperature, Tensor) else self.temperature
        bias = None if self.bias is None else self.bias.to(device)
        logits = self.logits.to(device)
        return TeacherTargets(logits if dtype == self.dtype else logits.to(dtype), temperature, bias)

    def _check_joins(self, other: TeacherTargets, name: str) -> None:
        one, two = self.logits, other.logits
        if isinstance(one, PrototypeLogits) and isinstance(two, PrototypeLogits):
            if not same_prototypes(one.prototypes, two.prototypes):
                raise ValueError(f"torch.{name} of TeacherTargets with different prototypes; expected rows of one head")
        elif type(one) is not type(two):
            raise ValueError(
                f"torch.{name} of TeacherTargets over {type(one).__name__} and over {type(two).__name__}; "
                "expected one kind"
            )
        if not _same_value(self.temperature, other.temperature):
            raise ValueError(
                f"torch.{name} of TeacherTargets at temperatures {self.temperature} and {other.temperature}; expected one"
            )
        if not _same_value(self.bias, other.bias):
            raise ValueError(
                f"torch.{name} of TeacherTargets with different biases; expected one centre or dual vector"
            )


# as PrototypeLogits: torch walks over it, and a tree of it can be rebuilt
torch.export.register_dataclass(TeacherTargets)


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
    """Weighted sum over pairs of rows of ``-sum_k q_t(k) log p_s(k)``, by what is stored of p and q.

    ``prototype_cross_entropy`` where nothing is, ``logit_cross_entropy`` where both networks' logits are, and the latter with
    ``log q`` where q itself is. Then q may have any strides, zeros, and rows whose sum s is not 1, down to rows of padding:
    such a row counts s times, as in the plain formula. That takes a pass for each teacher view if G > 1 and B > 1.

    Args:
        student: [V * B, K] raw logits, or any [..., K] whose rows are these, view-major.
        targets: [G * B, K] teacher's assignments, likewise; or a tensor of probabilities, which gets no gradient.
        pair_weights, image_weights: [G, V] and [B] or None, as in ``prototype_cross_entropy``.
        student_temperature: positive; a float or a tensor of one element.
        student_bias: [K] nats that stored logits lack (the vMF log-normaliser), or None.
        backend: as in ``prototype_cross_entropy``; on stored logits all but "auto" and "triton" mean "torch".
        prototype_group: as there; for unstored logits only.

    Returns:
        The loss, nats, and its statistics, in which a row of q counts with its weight times its sum.

    Raises:
        TypeError: one side is stored and the other is not.
        ValueError: as there; or ``student_bias`` came with an unstored student, or ``prototype_group`` with a stored one,
            or probabilities on the CPU are negative (elsewhere looking would wait for the device).
    Source: Caron et al., ICCV 2021 (DINO), section 3.1; Zhou et al., "iBOT", ICLR 2022, equation 2.
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
        raise ValueError("prototype_group came with stored logits; expected PrototypeLogits, which ranks can share out")
    rows = _flat(student, "student")
    options = _StoredOptions(student_temperature, student_bias, LOGIT_BACKENDS.get(backend, backend))
    if isinstance(targets, TeacherTargets):
        flat = _flat(targets._rows, "targets")
        return options.loss(rows, flat, pair_weights, image_weights, targets.temperature, targets.bias)
    return _probability_cross_entropy(rows, _flat(targets.detach(), "targets"), pair_weights, image_weights, options)


@dataclass(frozen=True)
class _StoredOptions:
    """What every call on stored logits of one student has in common."""

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
    """Of stored logits [S, K] and stored probabilities: ``q = s softmax(log q)`` with s the sum of a row."""
    images = check_pairing(Pairing(pair_weights, image_weights), q_TK.shape[0], student.shape[0])
    dtype = accumulation_dtype(q_TK.dtype)
    if is_readable(q_TK) and (q_TK < 0).any():
        raise ValueError(
            f"targets go down to {q_TK.min().item():.3g}; expected probabilities, or TeacherTargets of the teacher's raw logits"
        )
    sum_T = q_TK.sum(dim=-1, dtype=dtype)
    # rows of adjacent elements, which Sinkhorn's transposed result has not, for the kernels that need them
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
    """The loss over all teacher views, with the mean of their statistics by the summed weights of their pairs."""
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


def _same_value(one: object, other: object) -> bool:
    """Whether two temperatures or biases are one; different tensors are compared by value, which waits for a GPU."""
    if one is other:
        return True
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and one.device == other.device and torch.equal(one, other)
    return not isinstance(one, Tensor) and not isinstance(other, Tensor) and one == other
