"""Losses of the DINO family with the published constructors: schedules, pairing and averaging only.

Legend: B images, V student crops, K prototypes. Rows are view-major.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vmf_kernels.assign import refuse_nan_prototypes
from vmf_kernels.bessel import log_vmf_constant
from vmf_kernels.centering import Center, LogitCenter, ProbabilityCenter
from vmf_kernels.cross_entropy import CrossEntropy, prototype_cross_entropy
from vmf_kernels.dense_cross_entropy import logit_cross_entropy
from vmf_kernels.logits import PrototypeLogits
from vmf_kernels.pairing import multi_crop_weights
from vmf_kernels.prototypes import Prototypes
from vmf_kernels.statistics import AssignmentStatistics

TEACHER_CROPS = 2  # the teacher sees the global crops only
UPDATES = ("forward", "manual")
FROZEN_NORMS = (
    "DINO-vMF is on but the prototypes' norms are frozen (norm_last_layer=True): with all norms at 1 every component has "
    "the same precision and the loss equals DINO up to centring; use norm_last_layer=False"
)


class DINOLoss(nn.Module):
    """DINO's loss: every student crop learns from every other global crop of its image, as the teacher assigns it.

    Takes what the head returns: ``PrototypeLogits`` (nothing of size rows x K is stored) or plain logits (one fused pass).

    Args:
        out_dim: number of prototypes K.
        ncrops: student crops V, the 2 global ones included.
        warmup_teacher_temp: teacher temperature at epoch 0.
        teacher_temp: teacher temperature after the warm-up.
        warmup_teacher_temp_epochs: epochs of linear warm-up; the last of them already has the final value, as published.
        nepochs: epochs of the run.
        student_temp: student temperature.
        center_momentum: of the running mean, in [0, 1).
        center_start: "zero" as published, or "first_batch".
        center_update: "forward" moves the centre at the end of each call, as published; "manual" accumulates until
            ``update_center()`` (gradient accumulation: once per optimiser step, before the teacher moves and before a
            ``state_dict()``, which holds no pending batches).
        backend: see ``choose_backend``.

    Attributes:
        center: [1, K] fp32, the state dict's only entry, as published.
        statistics: ``AssignmentStatistics`` of the last call, None before.

    Raises:
        ValueError: a temperature is not positive, ncrops < 2, or an option unknown.
    Source: Caron et al., "Emerging properties in self-supervised vision transformers", ICCV 2021, algorithm 1.
    """

    def __init__(
        self,
        out_dim: int,
        ncrops: int,
        warmup_teacher_temp: float,
        teacher_temp: float,
        warmup_teacher_temp_epochs: int,
        nepochs: int,
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
        *,
        center_start: str = "zero",
        center_update: str = "forward",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        temperatures = {"warmup_teacher_temp": warmup_teacher_temp, "teacher_temp": teacher_temp}
        for name, value in {**temperatures, "student_temp": student_temp}.items():
            if not value > 0:
                raise ValueError(f"{name} is {value}; expected a number > 0")
        if ncrops < TEACHER_CROPS:
            raise ValueError(f"ncrops is {ncrops}; expected at least 2, the global crops included")
        if center_update not in UPDATES:
            raise ValueError(f"center_update is {center_update!r}; expected one of {', '.join(UPDATES)}")
        self.student_temp = student_temp
        self.ncrops = ncrops
        self.center_update = center_update
        self.backend = backend
        self.centering = self._make_center(out_dim, center_momentum, center_start)
        self.teacher_temp_schedule = _teacher_schedule(
            warmup_teacher_temp, teacher_temp, warmup_teacher_temp_epochs, nepochs
        )
        self.statistics: AssignmentStatistics | None = None
        self.register_state_dict_post_hook(_publish_center)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_adopt_center)  # type: ignore[no-untyped-call]

    @property
    def center(self) -> Tensor:
        """[1, K] the running centre."""
        return self.centering.center

    def forward(
        self,
        student_output: PrototypeLogits | Tensor,
        teacher_output: PrototypeLogits | Tensor,
        epoch: int,
    ) -> Tensor:
        """Mean cross-entropy over the pairs of different views and the images; moves the centre.

        Args:
            student_output: [V * B, K] raw logits of all crops.
            teacher_output: [2 * B, K] raw logits of the global crops; no gradient reaches them.
            epoch: from 0, selects the teacher temperature.

        Returns:
            [] nats.

        Raises:
            ValueError: rows are not divisible by the crops, K or D differ, or the epoch is beyond ``nepochs``.
            TypeError: one side is stored and the other is not.
        """
        return self._evaluate(student_output, teacher_output, epoch, None, None)

    def update_center(self) -> None:
        """Move the centre by the batches since the last call; only for ``center_update="manual"``."""
        self.centering.apply_pending()

    def _make_center(self, out_dim: int, momentum: float, start: str) -> Center:
        return LogitCenter(out_dim, momentum, start=start, backend=self.backend)

    def _evaluate(
        self,
        student: PrototypeLogits | Tensor,
        teacher: PrototypeLogits | Tensor,
        epoch: int,
        student_bias: Tensor | None,
        teacher_bias: Tensor | None,
    ) -> Tensor:
        tau = self._teacher_temperature(epoch)
        self._check_rows(student, teacher)
        self.centering.begin(teacher, tau, teacher_bias)
        bias = self.centering.bias(tau) if teacher_bias is None else self.centering.bias(tau) + teacher_bias
        images = teacher.shape[0] // TEACHER_CROPS
        weights = multi_crop_weights(TEACHER_CROPS, self.ncrops, device=teacher.device) / max(images, 1)
        result = _cross_entropy(student, teacher, weights, (self.student_temp, tau), (student_bias, bias), self.backend)
        self.statistics = result.statistics
        self.centering.accumulate(teacher, tau, teacher_bias)
        if self.center_update == "forward":
            self.centering.apply_pending()
        return result.loss

    def _teacher_temperature(self, epoch: int) -> float:
        if not 0 <= epoch < len(self.teacher_temp_schedule):
            raise ValueError(
                f"epoch is {epoch}; expected 0 to {len(self.teacher_temp_schedule) - 1}, the run's nepochs"
            )
        return self.teacher_temp_schedule[epoch]

    def _check_rows(self, student: PrototypeLogits | Tensor, teacher: PrototypeLogits | Tensor) -> None:
        if isinstance(student, PrototypeLogits) != isinstance(teacher, PrototypeLogits):
            raise TypeError(
                f"student output is {type(student).__name__} but teacher output {type(teacher).__name__}; expected both "
                "heads to return PrototypeLogits, or both plain logits"
            )
        for rows, crops, side in ((student.shape[0], self.ncrops, "student"), (teacher.shape[0], 2, "teacher")):
            if rows % crops:
                raise ValueError(f"{side} output has {rows} rows; expected a multiple of its {crops} crops")
        if teacher.shape[-1] != self.center.shape[1]:
            raise ValueError(
                f"teacher output has {teacher.shape[-1]} prototypes; expected out_dim = {self.center.shape[1]}"
            )


class DINOvMFLoss(DINOLoss):
    """DINO-vMF's loss: prototypes of free norm are von Mises-Fisher components of precision ``||w_k|| / tau``.

    Each network's logits gain ``log C_D(||w_k|| / tau)`` of its own prototypes at its own temperature; gradients flow
    through the student's. The details are a reconstruction from the paper (README of this folder). Plain logits need the
    prototypes.

    Args:
        centering: "probability" as the paper has it (``ProbabilityCenter``), or "logit" as DINO.
        center_average: "log_probability" or "probability", the two readings of the paper's rule.
        out_dim, ncrops, ..., backend: as ``DINOLoss``, which also lists the errors.

    Source: Govindarajan et al., "DINO as a von Mises-Fisher mixture model", ICLR 2023 (arXiv:2405.10939).
    """

    def __init__(
        self,
        out_dim: int,
        ncrops: int,
        warmup_teacher_temp: float,
        teacher_temp: float,
        warmup_teacher_temp_epochs: int,
        nepochs: int,
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
        *,
        centering: str = "probability",
        center_average: str = "log_probability",
        center_start: str = "zero",
        center_update: str = "forward",
        backend: str = "auto",
    ) -> None:
        if centering not in ("probability", "logit"):
            raise ValueError(f"centering is {centering!r}; expected one of probability, logit")
        self._centering_rule = (centering, center_average)
        schedule = (warmup_teacher_temp, teacher_temp, warmup_teacher_temp_epochs, nepochs)
        super().__init__(
            out_dim,
            ncrops,
            *schedule,
            student_temp,
            center_momentum,
            center_start=center_start,
            center_update=center_update,
            backend=backend,
        )
        self._warned = False

    def forward(
        self,
        student_output: PrototypeLogits | Tensor,
        teacher_output: PrototypeLogits | Tensor,
        epoch: int,
        *,
        student_prototypes: Prototypes | None = None,
        teacher_prototypes: Prototypes | None = None,
    ) -> Tensor:
        """As ``DINOLoss.forward``, with each network's prototypes where the outputs are plain logits.

        Raises:
            ValueError: as there; or plain logits came without prototypes, with another number of them, or with normalised
                ones, which have no precision.
        """
        if isinstance(student_output, PrototypeLogits) or isinstance(teacher_output, PrototypeLogits):
            student_output, teacher_output = _with_vmf(student_output), _with_vmf(teacher_output)
            if isinstance(student_output, PrototypeLogits):
                self._warn_if_frozen(student_output.prototypes)
            return self._evaluate(student_output, teacher_output, epoch, None, None)
        if student_prototypes is None or teacher_prototypes is None:
            raise ValueError(
                f"DINOvMFLoss got plain logits of shape {tuple(student_output.shape)} without the prototypes' norms, "
                "which its normaliser needs; expected student_prototypes= and teacher_prototypes= (for example "
                "weight_norm_prototypes(layer.weight_g, layer.weight_v)), or a head that returns PrototypeLogits"
            )
        sides = (("student", student_output, student_prototypes), ("teacher", teacher_output, teacher_prototypes))
        for side, output, prototypes in sides:
            if prototypes.count != output.shape[-1]:
                raise ValueError(
                    f"{side}_prototypes hold {prototypes.count} prototypes but the {side} output has "
                    f"{output.shape[-1]} columns; both must be K"
                )
        self._warn_if_frozen(student_prototypes)
        student_bias = _log_normalizer(student_prototypes, self.student_temp)
        teacher_bias = _log_normalizer(teacher_prototypes.detach(), self._teacher_temperature(epoch))
        return self._evaluate(student_output, teacher_output, epoch, student_bias, teacher_bias)

    def _make_center(self, out_dim: int, momentum: float, start: str) -> Center:
        rule, average = self._centering_rule
        if rule == "logit":
            return LogitCenter(out_dim, momentum, start=start, backend=self.backend)
        return ProbabilityCenter(out_dim, momentum, average=average, start=start, backend=self.backend)

    def _warn_if_frozen(self, prototypes: Prototypes) -> None:
        magnitude = prototypes.magnitude
        frozen = magnitude is not None and not magnitude.requires_grad
        # a warning cannot be traced: a compiled step is warned of only where it runs eagerly first
        silent = self._warned or torch.compiler.is_compiling()
        if frozen and prototypes.weight.requires_grad and not silent:
            warnings.warn(FROZEN_NORMS, UserWarning, stacklevel=3)
            self._warned = True


def _cross_entropy(
    student: PrototypeLogits | Tensor,
    teacher: PrototypeLogits | Tensor,
    weights: Tensor,
    temperatures: tuple[float, float],
    biases: tuple[Tensor | None, Tensor],
    backend: str,
) -> CrossEntropy:
    student_temp, teacher_temp = temperatures
    if isinstance(student, PrototypeLogits) and isinstance(teacher, PrototypeLogits):
        return prototype_cross_entropy(
            student.features,
            student.prototypes,
            teacher.features,
            teacher.prototypes,
            weights,
            student_temperature=student_temp,
            teacher_temperature=teacher_temp,
            teacher_bias=biases[1],
            backend=backend,
        )
    assert isinstance(student, Tensor)
    assert isinstance(teacher, Tensor)
    return logit_cross_entropy(
        student,
        teacher,
        weights,
        student_temperature=student_temp,
        teacher_temperature=teacher_temp,
        student_bias=biases[0],
        teacher_bias=biases[1],
    )


def _with_vmf(output: PrototypeLogits | Tensor) -> PrototypeLogits | Tensor:
    if isinstance(output, PrototypeLogits):
        return PrototypeLogits(output.features, output.prototypes.with_vmf())
    return output


def _log_normalizer(prototypes: Prototypes, temperature: float) -> Tensor:
    """[K] log C_D(||w_k|| / tau) relative to 0, differentiable in the stored tensors."""
    norms = prototypes.with_vmf().norms()
    if not torch.compiler.is_compiling():
        refuse_nan_prototypes(norms, prototypes.weight, prototypes.magnitude)
    return log_vmf_constant(norms / temperature, prototypes.dim)


def _teacher_schedule(warmup: float, final: float, warmup_epochs: int, epochs: int) -> list[float]:
    if epochs < max(warmup_epochs, 1):
        raise ValueError(
            f"nepochs is {epochs} and warmup_teacher_temp_epochs {warmup_epochs}; expected nepochs of at least 1 and at "
            "least the warm-up"
        )
    schedule: list[float] = np.linspace(warmup, final, warmup_epochs).tolist()
    return schedule + [final] * (epochs - warmup_epochs)


def _publish_center(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    state[f"{prefix}center"] = state.pop(f"{prefix}centering.center")


def _adopt_center(module: nn.Module, state: Mapping[str, Any], prefix: str, *rest: Any) -> None:
    if f"{prefix}center" in state and isinstance(state, dict):
        state[f"{prefix}centering.center"] = state.pop(f"{prefix}center")
