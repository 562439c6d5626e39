"""DINO's and DINO-vMF's losses with the published constructors: only schedule, pairing and averaging.

Legend: B images, V student crops, K prototypes. Rows are view-major.
"""

from __future__ import annotations

from typing import Any, Unpack

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from vmf_kernels.arguments import is_whole
from vmf_kernels.centering.rule import CenteringRule
from vmf_kernels.losses.center_state import publish_center
from vmf_kernels.losses.stream import StreamLoss, StreamOptions, check_logits
from vmf_kernels.losses.temperatures import EpochTemperatures, temperature_schedule
from vmf_kernels.losses.vmf_stream import VMFStream
from vmf_kernels.pairing import multi_crop_weights
from vmf_kernels.prototypes import Prototypes
from vmf_kernels.statistics import AssignmentStatistics
from vmf_kernels.unstored.prototype_logits import PrototypeLogits

TEACHER_CROPS = 2  # the teacher sees the global crops only


class DINOLoss(StreamLoss):
    """DINO's loss: every student crop learns from the teacher's assignments of every other global crop of its image.

    It takes what the head returns: ``PrototypeLogits`` (nothing of size rows x K is stored) or plain logits (one fused pass).

    Args:
        out_dim: number of prototypes K.
        ncrops: student crops V, including the 2 global crops.
        warmup_teacher_temp: teacher temperature at epoch 0.
        teacher_temp: teacher temperature after the warm-up.
        warmup_teacher_temp_epochs: epochs of linear warm-up; the last of them already has the final value, as published.
        nepochs: epochs of the run.
        student_temp: student temperature.
        center_momentum: of the running mean, in [0, 1).
        options: keywords of ``Stream``: the centring rule and how its centre moves, backend, ranks.

    Attributes:
        center: [1, K] fp32, the state dict's only entry, as published; absent under Sinkhorn-Knopp, which keeps no centre.
        student_temp, center_momentum, ncrops, teacher_temp_schedule: as published; may be assigned, for the next call on.
        statistics: ``AssignmentStatistics`` of the last call; None before the first.

    Raises:
        ValueError: a temperature is not positive, ncrops < 2, or an option unknown.
    Source: Caron et al., "Emerging properties in self-supervised vision transformers", ICCV 2021, algorithm 1.

    Example:
        >>> student, teacher = (DINOHead(8, 512, hidden_dim=16, bottleneck_dim=4) for _ in range(2))
        >>> criterion = DINOLoss(512, 4, 0.04, 0.07, 30, 100)  # prototypes, crops, teacher temperatures, their epochs, epochs
        >>> crops = torch.randn(4 * 2, 8)  # features of 4 crops of 2 images, view-major; the first 2 crops are global
        >>> loss = criterion(student(crops), teacher(crops[: 2 * 2]), epoch=0)
        >>> loss.backward()
        >>> tuple(loss.shape), bool(criterion.center.any()), tuple(criterion.statistics.usage.shape)
        ((), True, (512,))
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
        **options: Unpack[StreamOptions],
    ) -> None:
        super().__init__()
        schedule = temperature_schedule(warmup_teacher_temp, teacher_temp, warmup_teacher_temp_epochs, nepochs)
        if not is_whole(ncrops) or ncrops < TEACHER_CROPS:
            raise ValueError(f"ncrops is {ncrops!r}; expected at least 2, as an int, the global crops included")
        self.ncrops = ncrops
        self._temperatures = EpochTemperatures(schedule)
        self.stream = self.stream_class(out_dim, student_temp, center_momentum, **options)
        self.statistics: AssignmentStatistics | None = None
        publish_center(self, "center", "stream.centering.center")

    @property
    def teacher_temp_schedule(self) -> NDArray[np.float64]:
        """[nepochs] teacher temperature of each epoch, a read-only array; assign another array or list to change it."""
        return self._temperatures.array

    @teacher_temp_schedule.setter
    def teacher_temp_schedule(self, values: NDArray[Any]) -> None:
        self._temperatures.assign(values, "teacher_temp_schedule")

    @property
    def centering(self) -> CenteringRule:
        """The centring rule."""
        return self.stream.centering

    def forward(
        self,
        student_output: PrototypeLogits | Tensor,
        teacher_output: PrototypeLogits | Tensor,
        epoch: int,
    ) -> Tensor:
        """Mean cross-entropy over the pairs of different views and over the images; moves the centre.

        Args:
            student_output: [V * B, K] raw logits of all crops.
            teacher_output: [2 * B, K] raw logits of the global crops; they get no gradient.
            epoch: from 0; selects the teacher temperature.

        Returns:
            [] nats.

        Raises:
            ValueError: rows are not divisible by the crops, K differs, or the epoch is beyond ``nepochs``.
            TypeError: one side is stored and the other is not.
        """
        return self._evaluate(student_output, teacher_output, epoch, (None, None))

    def update_center(self, teacher_output: PrototypeLogits | Tensor | None = None, epoch: int | None = None) -> None:
        """Move the centre by [R, K] raw teacher logits, if given, and by the pending batches of ``center_update="manual"``.

        A call without logits is for ``center_update="manual"``. A centre of probabilities needs ``epoch`` for the temperature
        of the logits; a centre of logits does not.

        Raises:
            ValueError: K is not ``out_dim``, or the epoch is missing or beyond ``nepochs``.
        """
        self.stream.update_center(teacher_output, None if epoch is None else self._temperatures(epoch))

    def _evaluate(
        self,
        student: PrototypeLogits | Tensor,
        teacher: PrototypeLogits | Tensor,
        epoch: int | Tensor,
        prototypes: tuple[Prototypes | None, Prototypes | None],
    ) -> Tensor:
        tau = self._temperatures(epoch)
        check_logits(student, "student")
        check_logits(teacher, "teacher")
        for rows, crops, side in ((student.shape[0], self.ncrops, "student"), (teacher.shape[0], 2, "teacher")):
            if rows % crops:
                raise ValueError(f"{side} output has {rows} rows; expected a multiple of its {crops} crops")
        outputs = self.stream.prepare(student, teacher, tau, prototypes)
        images = teacher.shape[:-1].numel() // TEACHER_CROPS  # more leading dims are more rows of each crop
        weights = multi_crop_weights(TEACHER_CROPS, self.ncrops, device=teacher.device) / max(images, 1)
        result = self.stream(outputs, weights, tau)
        self.statistics = result.statistics
        self.stream.observe(outputs.teacher, tau, outputs.teacher_bias)
        loss: Tensor = result.loss
        return loss


class DINOvMFLoss(DINOLoss):
    """DINO-vMF's loss: prototypes of free norm are von Mises-Fisher components of precision ``||w_k|| / tau``.

    ``log C_D(||w_k|| / tau)`` is added to each network's logits, with its own prototypes and its own temperature; gradients
    flow through the student's. The details are reconstructed from the paper (vmf_kernels/README.md). Plain logits need the
    prototypes as arguments.

    Args:
        out_dim, ncrops, ..., options: as ``DINOLoss``, which also lists the errors; centering is "probability" by default, as
            in the paper.

    Source: Govindarajan et al., "DINO as a von Mises-Fisher mixture model", ICLR 2023 (arXiv:2405.10939).

    Example:
        >>> student, teacher = (DINOvMFHead(8, 512, hidden_dim=16, bottleneck_dim=4) for _ in range(2))
        >>> criterion = DINOvMFLoss(512, 4, 0.04, 0.07, 30, 100)
        >>> crops = torch.randn(4 * 2, 8)
        >>> criterion(student(crops), teacher(crops[: 2 * 2]), epoch=0).backward()
        >>> student.last_layer.weight_g.grad.isfinite().all().item()  # norms learn: they are the components' precisions
        True
    """

    stream_class = VMFStream

    def forward(
        self,
        student_output: PrototypeLogits | Tensor,
        teacher_output: PrototypeLogits | Tensor,
        epoch: int,
        *,
        student_prototypes: Prototypes | None = None,
        teacher_prototypes: Prototypes | None = None,
    ) -> Tensor:
        """As ``DINOLoss.forward``; if the outputs are plain logits, each network's prototypes are needed.

        Raises:
            ValueError: as there; or plain logits came without prototypes, with another number of prototypes, or with
                normalised prototypes, which have no precision.
        """
        return self._evaluate(student_output, teacher_output, epoch, (student_prototypes, teacher_prototypes))
