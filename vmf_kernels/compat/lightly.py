"""Drop-in for lightly-ai/lightly: its DINO, iBOT and KoLeo losses and DINO heads, with its signatures, defaults and keys.

Import these instead of those in ``lightly.loss`` and ``lightly.models.modules`` (README, which also lists the differences).
lightly itself is not needed.

Legend: G / V teacher / student views, B images, M masked patches, K prototypes, D bottleneck dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional

from vmf_kernels.centering import logit as centering
from vmf_kernels.centering.choice import RULES, Rules
from vmf_kernels.centering.rule import CenteringRule
from vmf_kernels.compat._lightly_heads import DINOProjectionHead, DINOv2ProjectionHead
from vmf_kernels.compat.checkpoints import load_modules as load_checkpoint
from vmf_kernels.losses import koleo
from vmf_kernels.losses.center_state import publish_center
from vmf_kernels.losses.masked_patches import patch_weights
from vmf_kernels.losses.stream import Stream, StreamLoss, StreamOptions
from vmf_kernels.losses.temperatures import check_positive
from vmf_kernels.pairing import multi_crop_weights
from vmf_kernels.statistics import AssignmentStatistics
from vmf_kernels.unstored.prototype_logits import PrototypeLogits

__all__ = ["DINOLoss", "DINOProjectionHead", "DINOv2ProjectionHead", "IBOTPatchLoss", "KoLeoLoss", "RankMeanCenter"]
__all__ += ["load_checkpoint"]

CENTER_MODES = ("mean",)


class RankMeanCenter(centering.RankMeanCenter):
    """The library's ``RankMeanCenter`` with lightly's names.

    Arguments as ``LogitCenter``, in which every row has the same weight; the two agree if all ranks have equally many rows.

    Attributes:
        center, value: [1, K] the centre; ``center`` may be assigned.
        momentum: may be assigned.
        size, dim: shape of the centre, and the dims that it averages over.

    Source: lightly-ai/lightly lightly/models/modules/center.py.

    Example:
        >>> center = RankMeanCenter(3, momentum=0.5)
        >>> center.update(torch.tensor([[2.0, 0.0, 0.0], [0.0, 4.0, 0.0]]))  # two rows of teacher logits
        >>> center.value.tolist()
        [[0.5, 1.0, 0.0]]
    """

    dim = (0,)

    @property
    def size(self) -> tuple[int, ...]:
        """(1, K)."""
        return tuple(self.center.shape)

    @property
    def value(self) -> Tensor:
        """[1, K] the centre, under lightly's name."""
        return self.center

    def update(
        self, x: PrototypeLogits | Tensor, temperature: float | Tensor = 1.0, bias: Tensor | None = None
    ) -> None:
        """Move the centre by [..., K] raw teacher logits; the temperature is not used."""
        super().update(x, temperature, bias)

    def _weighed(self, summed: Tensor, rows: int) -> tuple[Tensor, int]:
        return summed / max(rows, 1), min(rows, 1)  # a quotient, not a product: the last bit is that of a mean


class _LightlyStream(Stream):
    """A stream whose logit centre averages over ranks as in lightly."""

    rules: ClassVar[Rules] = {
        **RULES,
        "logit": lambda o: RankMeanCenter(o.num_prototypes, o.momentum, start=o.start, **o.common),
    }


class _Loss(StreamLoss):
    """The shared part of both losses: a teacher temperature, which is rounded to fp32 for use, as in lightly."""

    @property
    def teacher_temp(self) -> float:
        """Teacher temperature of calls without one; may be assigned."""
        return self._teacher_temp

    @teacher_temp.setter
    def teacher_temp(self, value: float) -> None:
        self._rounded_teacher_temp = _checked_temperature(value, "teacher_temp")
        self._teacher_temp = value


class DINOLoss(_Loss):
    """lightly's ``DINOLoss``: mean cross-entropy over pairs of different views; takes lists of views, the teacher's first.

    Args:
        output_dim: K.
        warmup_teacher_temp: teacher temperature at epoch 0, for calls with an epoch.
        teacher_temp: teacher temperature after the warm-up, and for calls without an epoch.
        warmup_teacher_temp_epochs: epochs of linear warm-up; the last of them already has the final value.
        student_temp: student temperature.
        center_momentum: of the running mean, in [0, 1).
        center_mode: must be "mean".
        options: keywords of ``Stream``: the centring rule and how its centre moves, backend, ranks.

    Attributes:
        center: [1, 1, K], the state dict's only entry; absent under Sinkhorn-Knopp, which keeps no centre.
        teacher_temp, student_temp, center_momentum, warmup_teacher_temp_epochs, teacher_temp_schedule: as in lightly; may be
            assigned, for the next call on.
        statistics: ``AssignmentStatistics`` of the last call; None before the first.

    Raises:
        ValueError: a temperature is not positive, or an option unknown.
    Source: lightly-ai/lightly lightly/loss/dino_loss.py; Caron et al., ICCV 2021.

    Example:
        >>> student, teacher = (DINOProjectionHead(8, 16, 4, output_dim=512) for _ in range(2))
        >>> views, criterion = [torch.randn(2, 8) for _ in range(4)], DINOLoss(512)  # features of 4 views of 2 images
        >>> criterion([teacher(view) for view in views[:2]], [student(view) for view in views], epoch=0).requires_grad
        True
    """

    def __init__(
        self,
        output_dim: int = 65536,
        warmup_teacher_temp: float = 0.04,
        teacher_temp: float = 0.04,
        warmup_teacher_temp_epochs: int = 30,
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
        center_mode: str = "mean",
        **options: Unpack[StreamOptions],
    ) -> None:
        super().__init__()
        check_positive(warmup_teacher_temp, "warmup_teacher_temp")
        self.teacher_temp = teacher_temp
        self.warmup_teacher_temp_epochs = warmup_teacher_temp_epochs
        self.teacher_temp_schedule = torch.linspace(
            warmup_teacher_temp, teacher_temp, warmup_teacher_temp_epochs, dtype=torch.float32, device="cpu"
        )
        self.stream = _stream(output_dim, student_temp, center_momentum, center_mode, options)
        self.statistics: AssignmentStatistics | None = None
        publish_center(self, "center", "stream.centering.center", dims=3)

    @property
    def center(self) -> Tensor:
        """[1, 1, K] the running centre; may be assigned, and is absent under Sinkhorn-Knopp."""
        center: Tensor = self.stream.centering.center  # type: ignore[attr-defined]
        return center[None]

    @center.setter
    def center(self, value: Tensor) -> None:
        self.stream.set_center(value)

    @property
    def teacher_temp_schedule(self) -> Tensor:
        """[warmup_teacher_temp_epochs] teacher temperature of each warm-up epoch; may be assigned or changed in place."""
        return self._schedule

    @teacher_temp_schedule.setter
    def teacher_temp_schedule(self, values: Tensor) -> None:
        given = torch.as_tensor(values, dtype=torch.float32, device="cpu")
        if given.ndim != 1 or not bool((given > 0).all()):
            raise ValueError(f"teacher_temp_schedule is assigned {given.tolist()}; expected a row of numbers > 0")
        self._schedule = values if isinstance(values, Tensor) else given
        self._schedule_values: list[float] = given.tolist()

    def forward(
        self,
        teacher_out: Sequence[PrototypeLogits | Tensor],
        student_out: Sequence[PrototypeLogits | Tensor],
        teacher_temp: float | None = None,
        epoch: int | None = None,
    ) -> Tensor:
        """Mean over the pairs of different views and over the images; moves the centre.

        Args:
            teacher_out: G views, each [B, K] raw logits; they get no gradient.
            student_out: V views, each [B, K] raw logits; the first ones are the teacher's views, in the same order.
            teacher_temp: teacher temperature; None means that of the epoch or, without an epoch, that of the constructor.
            epoch: from 0.

        Returns:
            [] nats.

        Raises:
            ValueError: views have different shapes, no pair of different views is left, K is not ``output_dim``, or the
                temperature or epoch is out of range.
            TypeError: one side is stored and the other is not.
        """
        tau = self._temperature(teacher_temp, epoch)
        images = _images(teacher_out, student_out)
        device = teacher_out[0].device
        weights = multi_crop_weights(len(teacher_out), len(student_out), device=device) / max(images, 1)
        student: PrototypeLogits | Tensor = torch.cat(list(student_out))  # type: ignore[arg-type]
        teacher: PrototypeLogits | Tensor = torch.cat(list(teacher_out))  # type: ignore[arg-type]
        outputs = self.stream.prepare(student, teacher, tau)
        result = self.stream(outputs, weights, tau)
        self.statistics = result.statistics
        self.stream.observe(outputs.teacher, tau)
        loss: Tensor = result.loss
        return loss

    def update_center(
        self,
        teacher_out: PrototypeLogits | Tensor | Sequence[PrototypeLogits | Tensor] | None = None,
        teacher_temp: float | None = None,
        epoch: int | None = None,
    ) -> None:
        """Move the centre by [G, B, K] logits or a list of views, if given, and by pending batches; else as ``forward``."""
        if isinstance(teacher_out, Sequence):
            teacher_out = torch.cat(list(teacher_out))  # type: ignore[arg-type]
        self.stream.update_center(teacher_out, self._temperature(teacher_temp, epoch))

    def _temperature(self, given: float | None, epoch: int | None) -> float:
        if given is not None:
            return _checked_temperature(given, "teacher_temp")
        if epoch is not None and epoch < 0:
            raise ValueError(f"epoch is {epoch}; expected an int >= 0, or None")
        if epoch is None or epoch >= self.warmup_teacher_temp_epochs:
            return self._rounded_teacher_temp
        if not torch.compiler.is_compiling():
            self._schedule_values = self._schedule.tolist()  # includes in-place changes, which cannot be traced
        return self._schedule_values[epoch]


class IBOTPatchLoss(_Loss):
    """lightly's ``IBOTPatchLoss``: masked patches one to one; the mean over those of each image, then over all images.

    Args:
        output_dim: K.
        teacher_temp: teacher temperature of calls that do not give one.
        student_temp: student temperature.
        center_mode: must be "mean".
        center_momentum: of the running mean, in [0, 1).
        options: keywords of ``Stream``: the centring rule and how its centre moves, backend, ranks.

    Attributes:
        center: the centring rule. Its ``center`` [1, K], the mean over ranks of each rank's mean over its masked patches, is
            the state dict's only entry, ``center.center``. It also has the ``momentum``.
        teacher_temp, student_temp: may be assigned, for the next call on.
        statistics: ``AssignmentStatistics`` of the last call; None before the first.

    Raises:
        ValueError: a temperature is not positive, or an option unknown.
    Source: lightly-ai/lightly lightly/loss/ibot_loss.py; Zhou et al., "iBOT", ICLR 2022.

    Example:
        >>> student, teacher = (DINOProjectionHead(8, 16, 4, output_dim=512) for _ in range(2))
        >>> mask, patches = torch.eye(2).bool().expand(3, 2, 2), torch.randn(6, 8)  # 2 of the 4 patches of each of 3 images
        >>> criterion = IBOTPatchLoss(512)
        >>> criterion(teacher(patches), student(patches), mask).requires_grad, tuple(criterion.center.value.shape)
        (True, (1, 512))
    """

    def __init__(
        self,
        output_dim: int = 65536,
        teacher_temp: float = 0.04,
        student_temp: float = 0.1,
        center_mode: str = "mean",
        center_momentum: float = 0.9,
        **options: Unpack[StreamOptions],
    ) -> None:
        super().__init__()
        self.teacher_temp = teacher_temp
        self.stream = _stream(output_dim, student_temp, center_momentum, center_mode, options)
        self.statistics: AssignmentStatistics | None = None
        publish_center(self, "center.center", "stream.centering.center")

    @property  # type: ignore[override]
    def center(self) -> CenteringRule:
        """The centring rule; ``center.value`` is the [1, K] centre."""
        return self.stream.centering

    @center.setter
    def center(self, value: Tensor) -> None:
        self.stream.set_center(value)

    def forward(
        self,
        teacher_out: PrototypeLogits | Tensor,
        student_out: PrototypeLogits | Tensor,
        mask: Tensor,
        teacher_temp: float | None = None,
    ) -> Tensor:
        """Mean cross-entropy of the masked patches; moves the centre. Every rank must call it equally often, even if M = 0.

        Args:
            teacher_out: [M, K] raw logits of the masked patches; they get no gradient.
            student_out: [M, K] raw logits of the same patches.
            mask: [B, H, W] bool with M True entries, in the order of the rows.
            teacher_temp: teacher temperature; None means that of the constructor.

        Returns:
            [] nats; 0 with zero gradients for M = 0.

        Raises:
            ValueError: the mask is not bool or does not fit the rows, K is not ``output_dim``, or the temperature not positive.
            TypeError: one side is stored and the other is not.
        """
        tau = self._rounded_teacher_temp if teacher_temp is None else _checked_temperature(teacher_temp, "teacher_temp")
        weights = _patch_weights(mask, teacher_out, student_out)
        outputs = self.stream.prepare(student_out, teacher_out, tau)
        # the mean over images is separate from the weights, which are fp32 in lightly too: so fp64 logits lose no digits
        pair = torch.full((1, 1), 1 / max(len(mask), 1), dtype=torch.float64, device=weights.device)
        result = self.stream(outputs, pair, tau, weights)
        self.statistics = result.statistics
        self.stream.observe(outputs.teacher, tau)
        loss: Tensor = result.loss
        return loss

    def update_center(self) -> None:
        """Move the centre by the batches since the last call; needed only with ``center_update="manual"``."""
        self.stream.centering.apply_pending()


class KoLeoLoss(koleo.KoLeoLoss):
    """lightly's ``KoLeoLoss``: neighbours by cosine, their distance in any p-norm; computed in fp32, also under autocast.

    Args:
        p: degree of the norm of the distance, > 0.
        eps: added to the distance and to its components, > 0.

    Raises:
        ValueError: ``p`` or ``eps`` is not positive; or, when called, there are fewer than two rows and so no neighbour.
    Source: lightly-ai/lightly lightly/loss/koleo_loss.py.

    Example:
        >>> round(KoLeoLoss()(torch.eye(4)).item(), 2)  # every nearest neighbour is sqrt(2) away: -log(2) / 2
        -0.35
    """

    def __init__(self, p: float = 2, eps: float = 1e-8) -> None:
        super().__init__(eps)
        if not p > 0:
            raise ValueError(f"p is {p}; expected a number > 0")
        self.p = p
        self.pairwise_distance = nn.PairwiseDistance(p=p, eps=eps)

    def _of_crop(self, rows_BD: Tensor, among_ND: Tensor, start: int) -> Tensor:
        if self.p == 2:
            return super()._of_crop(rows_BD, among_ND, start)
        with torch.no_grad():
            nearest_B = (rows_BD @ among_ND.T).fill_diagonal_(-torch.inf).argmax(dim=1)
        distance_B = functional.pairwise_distance(rows_BD, among_ND[nearest_B], p=self.p, eps=self.eps)
        return -(distance_B + self.eps).log().mean()


def _stream(output_dim: int, student_temp: float, momentum: float, center_mode: str, options: StreamOptions) -> Stream:
    """The stream of a loss, once its ``center_mode`` is known."""
    if center_mode not in CENTER_MODES:
        raise ValueError(f"center_mode is {center_mode!r}; expected one of {', '.join(CENTER_MODES)}")
    return _LightlyStream(output_dim, student_temp, momentum, **options)


def _checked_temperature(value: float, name: str) -> float:
    """The value rounded to fp32, as lightly stores teacher temperatures; it matters only for fp64 logits."""
    check_positive(value, name)
    return torch.tensor(value, dtype=torch.float32, device="cpu").item()


def _images(teacher_out: Sequence[PrototypeLogits | Tensor], student_out: Sequence[PrototypeLogits | Tensor]) -> int:
    """The number of images B of views [B, K]."""
    shapes = [tuple(view.shape) for view in (*teacher_out, *student_out)]
    if not teacher_out or not student_out:
        raise ValueError(
            f"got {len(teacher_out)} teacher views and {len(student_out)} student views; expected some of each"
        )
    if any(len(shape) != 2 or shape[0] != shapes[0][0] for shape in shapes):
        raise ValueError(f"views have shapes {', '.join(map(str, shapes))}; expected [B, K] with one B")
    return shapes[0][0]


def _patch_weights(mask: Tensor, teacher: PrototypeLogits | Tensor, student: PrototypeLogits | Tensor) -> Tensor:
    """[M] fp32 weights: one over the number of masked patches of the row's image."""
    if mask.dtype != torch.bool or mask.ndim < 2:
        raise ValueError(f"mask is {mask.dtype} of shape {tuple(mask.shape)}; expected bool [images, height, width]")
    mask = mask.flatten(1)
    weights = patch_weights(mask, torch.float32)[mask].to(student.device)
    for rows, side in ((teacher, "teacher_out"), (student, "student_out")):
        if rows.ndim != 2 or rows.shape[0] != weights.shape[0]:
            raise ValueError(
                f"{side} has shape {tuple(rows.shape)} but the mask {weights.shape[0]} masked patches; expected "
                f"[{weights.shape[0]}, K]"
            )
    return weights
