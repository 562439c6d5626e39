"""A stream of tokens through both networks' heads, the building block of all losses.

Class tokens are one stream, masked patches another; each has its own centre and temperatures.

Legend: R rows, S / T student / teacher rows, G / V teacher / student views, B images, K prototypes.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple, TypedDict

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from vmf_kernels.arguments import is_whole
from vmf_kernels.backends.stored.choice import check_stored_backend_name
from vmf_kernels.backends.uncentered import answer_about, ask_for_sums
from vmf_kernels.centering.choice import RULES, RuleOptions, Rules, make_rule
from vmf_kernels.centering.rule import CenteringRule
from vmf_kernels.centering.running_mean import check_momentum
from vmf_kernels.losses.center_state import CenterOwner
from vmf_kernels.losses.temperatures import check_positive
from vmf_kernels.ops.prototype_cross_entropy import CrossEntropy
from vmf_kernels.ops.target_cross_entropy import target_cross_entropy
from vmf_kernels.pairing import Pairing, check_pairing
from vmf_kernels.prototypes import Prototypes
from vmf_kernels.tensors import inside_function
from vmf_kernels.unstored.prototype_logits import PrototypeLogits
from vmf_kernels.unstored.teacher_targets import TeacherTargets

UPDATES = ("forward", "manual")
MOVES_TWICE = (
    "the loss runs inside the forward pass of an autograd.Function, such as torch.utils.checkpoint with use_reentrant=True, "
    "which runs it again in the backward pass: its centre would move twice, and the gradient would be of another loss; "
    "expected center_update='manual' and update_center() once per step, use_reentrant=False, or the loss outside the checkpoint"
)


class StreamOptions(TypedDict, total=False):
    """Keywords that every loss takes and passes to its ``Stream``, which documents them."""

    centering: str | CenteringRule | None
    center_average: str
    center_start: str
    center_update: str
    backend: str
    prototype_group: ProcessGroup | None
    row_group: ProcessGroup | None


class Outputs(NamedTuple):
    """The outputs of both heads for one stream, both stored or both unstored, and the bias that stored logits lack."""

    student: PrototypeLogits | Tensor  # [S, K]
    teacher: PrototypeLogits | Tensor  # [T, K]
    student_bias: Tensor | None = None  # [K] nats
    teacher_bias: Tensor | None = None  # [K] nats


class Stream(nn.Module):
    """Targets by a centring rule, the cross-entropy with them, and the update of the centre.

    Args:
        num_prototypes: K; of this rank, if the prototypes are split over ranks.
        student_temp: student temperature.
        center_momentum: of the centre's running mean, in [0, 1).
        centering: "logit" (``LogitCenter``, DINO), "probability" (``ProbabilityCenter``, DINO-vMF), "sinkhorn_knopp"
            (``SinkhornKnopp``, DINOv2: from each batch, without a running mean), or any ``CenteringRule``, which then has its
            own momentum, start and groups. None means the method's rule: "logit", or "probability" for vMF losses.
        center_average: "log_probability" or "probability", of ``ProbabilityCenter``.
        center_start: "zero" as published, or "first_batch".
        center_update: "forward" moves the centre with each batch, as published. "manual" records batches until the loss's
            ``update_center()``; with gradient accumulation, call it once per optimiser step, before the teacher moves and
            before ``state_dict()``, which holds no pending batches.
        backend: see ``choose_backend``; ``logit_cross_entropy`` says which of them take stored logits, and refuses the others.
        prototype_group, row_group: ranks over which the prototypes, and the rows, are split, as in ``RunningMean``.

    Raises:
        ValueError: a temperature is not positive, or an option's value is unknown.
        TypeError: an option is unknown.
    """

    default_centering = "logit"
    rules: ClassVar[Rules] = RULES  # by the names that ``centering`` takes

    def __init__(
        self,
        num_prototypes: int,
        student_temp: float,
        center_momentum: float,
        *,
        centering: str | CenteringRule | None = None,
        center_average: str = "log_probability",
        center_start: str = "zero",
        center_update: str = "forward",
        backend: str = "auto",
        prototype_group: ProcessGroup | None = None,
        row_group: ProcessGroup | None = None,
        **unknown: object,
    ) -> None:
        super().__init__()
        if unknown:
            known = ", ".join(StreamOptions.__annotations__)
            raise TypeError(f"unknown option {', '.join(unknown)}; expected one of {known}")
        if not is_whole(num_prototypes) or num_prototypes < 1:
            raise ValueError(f"out_dim is {num_prototypes!r}; expected at least 1 prototype, as an int")
        check_positive(student_temp, "student_temp")
        if center_update not in UPDATES:
            raise ValueError(f"center_update is {center_update!r}; expected one of {', '.join(UPDATES)}")
        self.num_prototypes = num_prototypes
        self.student_temp = student_temp
        self.center_update = center_update
        self.backend = backend
        running = (center_momentum, center_average, center_start)
        options = RuleOptions(num_prototypes, *running, backend, prototype_group, row_group)
        self.centering: CenteringRule = make_rule(
            self.default_centering if centering is None else centering, options, self.rules
        )

    def prepare(
        self,
        student: PrototypeLogits | Tensor,
        teacher: PrototypeLogits | Tensor,
        teacher_temp: float | Tensor,
        prototypes: tuple[Prototypes | None, Prototypes | None] = (None, None),
    ) -> Outputs:
        """Check the heads' outputs before a centre starts or moves; only vMF losses use the prototypes.

        Raises:
            TypeError: one side is stored and the other is not.
            ValueError: the teacher's number of prototypes is not K, or the student's differs from the teacher's.
        """
        if isinstance(student, PrototypeLogits) != isinstance(teacher, PrototypeLogits):
            raise TypeError(
                f"student output is {type(student).__name__} but teacher output {type(teacher).__name__}; expected both "
                "heads to return PrototypeLogits, or both plain logits"
            )
        if isinstance(teacher, Tensor):
            check_stored_backend_name(self.backend)  # before a centre starts
        if teacher.shape[-1] != self.num_prototypes:
            raise ValueError(
                f"teacher output has {teacher.shape[-1]} prototypes; expected out_dim = {self.num_prototypes}"
            )
        if student.shape[-1] != teacher.shape[-1]:
            raise ValueError(
                f"student has {student.shape[-1]} prototypes but the teacher {teacher.shape[-1]}; both networks must have the "
                "same K"
            )
        return Outputs(student, teacher)

    def forward(
        self, outputs: Outputs, pair_weights: Tensor, teacher_temp: float | Tensor, image_weights: Tensor | None = None
    ) -> CrossEntropy:
        """The cross-entropy over pairs, as ``prototype_cross_entropy``; a centre starts here, and moves in ``observe``."""
        teacher_rows, student_rows = (side.shape[:-1].numel() for side in (outputs.teacher, outputs.student))
        check_pairing(Pairing(pair_weights, image_weights), teacher_rows, student_rows)
        _check_normalizers(outputs)
        bias = self._target_bias(outputs, teacher_temp)
        if isinstance(outputs.teacher, PrototypeLogits) and getattr(self.centering, "accumulate_sums", None):
            bias = ask_for_sums(bias, outputs.teacher, teacher_temp)
        if outputs.teacher_bias is not None:
            bias = bias + outputs.teacher_bias
        return target_cross_entropy(
            outputs.student,
            TeacherTargets(outputs.teacher, teacher_temp, bias),
            pair_weights,
            student_temperature=self.student_temp,
            student_bias=outputs.student_bias,
            image_weights=image_weights,
            backend=self.backend,
            prototype_group=self.centering.prototype_group,
        )

    def _target_bias(self, outputs: Outputs, teacher_temp: float | Tensor) -> Tensor:
        """[K] the rule's result, after a check that it is a bias for these logits."""
        teacher = outputs.teacher
        bias: Any = self.centering.target_bias(teacher.detach(), teacher_temp, outputs.teacher_bias)
        fits = isinstance(bias, Tensor) and bias.is_floating_point() and bias.numel() == teacher.shape[-1]
        if not fits or bias.device != teacher.device:
            got = (
                f"{bias.dtype} {list(bias.shape)} on {bias.device}" if isinstance(bias, Tensor) else type(bias).__name__
            )
            hint = f", where the logits are: move the loss by .to({str(teacher.device)!r})" if fits else ""
            raise ValueError(
                f"{type(self.centering).__name__}.target_bias returned {got}; expected a floating-point tensor "
                f"[{teacher.shape[-1]}] on {teacher.device}{hint}"
            )
        flat: Tensor = bias.reshape(-1)
        return flat

    def observe(
        self, teacher: PrototypeLogits | Tensor, teacher_temp: float | Tensor, bias: Tensor | None = None
    ) -> None:
        """Record the teacher's batch [R, K] for the centre, after its use; ``bias`` is the normaliser of stored logits."""
        if self.center_update == "forward" and inside_function():
            raise RuntimeError(MOVES_TWICE)
        sums = answer_about(teacher, teacher_temp) if isinstance(teacher, PrototypeLogits) else None
        if sums is None:
            self.centering.accumulate(teacher.detach(), teacher_temp, bias)
        else:
            self.centering.accumulate_sums(sums, teacher.shape[:-1].numel())  # type: ignore[attr-defined]
        if self.center_update == "forward":
            self.centering.apply_pending()

    def update_center(
        self, teacher: PrototypeLogits | Tensor | None = None, teacher_temp: float | Tensor | None = None
    ) -> None:
        """Move the centre by [..., K] raw logits, if given, and by pending batches.

        Raises:
            ValueError: K does not fit, or a centre of probabilities needs a temperature that is not given.
        """
        if teacher is not None:
            check_logits(teacher, "teacher")
            if teacher_temp is None and self.centering.over_probabilities:
                raise ValueError(
                    "update_center moves a centre of probabilities, which depend on the teacher's temperature; expected the "
                    "epoch (or the temperature) beside the logits"
                )
            self.centering.accumulate(self._uncentered(teacher).detach(), teacher_temp)
        self.centering.apply_pending()

    def set_center(self, value: Tensor) -> None:
        """Set the centre to the K values of a tensor.

        Raises:
            ValueError: there is no centre, or the tensor does not fit it.
        """
        self._with("center").center = value

    def set_center_momentum(self, momentum: float) -> None:
        """Set the momentum of later updates.

        Raises:
            ValueError: there is no centre, or the momentum is not in [0, 1).
        """
        check_momentum(momentum, "center_momentum")
        self._with("momentum").momentum = momentum

    def _with(self, attribute: str) -> Any:
        """The rule, if it has this attribute of a running mean; else raises ValueError."""
        if not hasattr(self.centering, attribute):
            name = type(self.centering).__name__
            raise ValueError(f"{name} keeps no centre; expected centering='logit' or 'probability'")
        return self.centering

    def _uncentered(self, teacher: PrototypeLogits | Tensor) -> PrototypeLogits | Tensor:
        """Logits in the form that ``prepare`` returns."""
        return teacher


class StreamLoss(CenterOwner):
    """A loss of one stream; it exposes the stream's values as the attributes of the published classes."""

    stream_class: type[Stream] = Stream
    stream: Stream

    @property
    def student_temp(self) -> float:
        """Student temperature; may be assigned."""
        return self.stream.student_temp

    @student_temp.setter
    def student_temp(self, value: float) -> None:
        check_positive(value, "student_temp")
        self.stream.student_temp = value

    @property
    def center_momentum(self) -> float:
        """Momentum of the running centre; may be assigned, and is absent under Sinkhorn-Knopp."""
        momentum: float = self.stream.centering.momentum  # type: ignore[attr-defined]
        return momentum

    @center_momentum.setter
    def center_momentum(self, value: float) -> None:
        self.stream.set_center_momentum(value)

    @property
    def center(self) -> Tensor:
        """[1, K] the running centre; may be assigned, and is absent under Sinkhorn-Knopp."""
        center: Tensor = self.stream.centering.center  # type: ignore[attr-defined]
        return center

    @center.setter
    def center(self, value: Tensor) -> None:
        self.stream.set_center(value)


def _check_normalizers(outputs: Outputs) -> None:
    """Raise ValueError if one network's prototypes are vMF components and the other's are not."""
    student, teacher = outputs.student, outputs.teacher
    if isinstance(student, PrototypeLogits) and isinstance(teacher, PrototypeLogits):
        ours, theirs = student.prototypes.has_normalizer, teacher.prototypes.has_normalizer
        if ours != theirs:
            vmf, plain = ("student", "teacher") if ours else ("teacher", "student")
            raise ValueError(
                f"the {vmf}'s prototypes are von Mises-Fisher components but the {plain}'s are not; expected two heads of one "
                "kind (DINOvMFHead for both), or a vMF loss, which makes both so"
            )


def check_logits(output: object, side: str) -> None:
    """Raise TypeError unless a head's output is logits, stored or not; ValueError for a single row or number."""
    if not isinstance(output, (PrototypeLogits, Tensor)):
        raise TypeError(
            f"{side} output is {type(output).__name__}; expected PrototypeLogits or a tensor of raw logits, a list of views "
            "joined by torch.cat"
        )
    if output.ndim < 2:
        raise ValueError(f"{side} output has shape {tuple(output.shape)}; expected raw logits [rows, K]")
