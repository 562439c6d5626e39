"""iBOT's losses: the loss of the class tokens plus the loss of the masked patches.

Legend: G global crops, L local crops, B images, C = G B masked images, N patches of an image, M masked patches, K prototypes.
Rows are view-major.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vmf_kernels.centering.rule import CenteringRule
from vmf_kernels.losses.center_state import publish_center
from vmf_kernels.losses.masked_patches import IBOTPatchLoss, IBOTvMFPatchLoss
from vmf_kernels.losses.stream import Outputs, StreamLoss, StreamOptions, check_logits
from vmf_kernels.losses.temperatures import EpochTemperatures, temperature_schedule
from vmf_kernels.losses.vmf_stream import UnstoredVMFStream, VMFStream
from vmf_kernels.pairing import multi_crop_weights
from vmf_kernels.statistics import AssignmentStatistics
from vmf_kernels.unstored.prototype_logits import PrototypeLogits
from vmf_kernels.unstored.same_layer import same_prototypes

__all__ = ["IBOTLoss", "IBOTPatchLoss", "IBOTvMFLoss", "IBOTvMFPatchLoss"]


class IBOTLoss(StreamLoss):
    """iBOT's loss: the class tokens' loss over all pairs of different views, plus the loss of the masked patches.

    Class tokens and patches may share their prototypes or not; the loss is the same. Patches of local crops are not needed.

    Args:
        out_dim: prototypes of the class tokens' head.
        patch_out_dim: prototypes of the patches' head.
        ngcrops: global crops G.
        nlcrops: local crops L.
        warmup_teacher_temp, teacher_temp: teacher temperature of class tokens at epoch 0, and after the warm-up.
        warmup_teacher_temp2, teacher_temp2: the same for patches.
        warmup_teacher_temp_epochs: epochs of linear warm-up; the last of them already has the final value, as published.
        nepochs: epochs of the run.
        student_temp: student temperature.
        center_momentum, center_momentum2: of the two running means, in [0, 1).
        lambda1, lambda2: weights of the two losses.
        mim_start_epoch: epoch at which the warm-up of the patches' temperature starts.
        center_tokens: as ``IBOTPatchLoss``.
        patch_centering: the rule of the patches; None means a rule of the same name as ``centering=``, of the class tokens.
        options: keywords of ``Stream``, for class tokens and patches.

    Attributes:
        center, center2: fp32 centres of class tokens, [1, K], and patches, [1, 1, K]; the state dict's entries, as published.
        student_temp, center_momentum, center_momentum2, ngcrops, ncrops, lambda1, lambda2, teacher_temp_schedule,
            teacher_temp2_schedule: as published; may be assigned, for the next call on.
        statistics, patch_statistics: ``AssignmentStatistics`` of the last call; None before the first.

    Raises:
        ValueError: a temperature is not positive, there are fewer than two crops, or an option is unknown.
    Source: Zhou et al., "iBOT: image BERT pre-training with online tokenizer", ICLR 2022, section 3 and algorithm 1.

    Example:
        >>> student, teacher = (DINOHead(8, 512, hidden_dim=16, bottleneck_dim=4) for _ in range(2))
        >>> criterion = IBOTLoss(512, 512, 2, 0, 0.04, 0.07, 0.04, 0.07, 30, 100)
        >>> x = torch.randn(2 * 3, 1 + 4, 8)  # class token and 2 x 2 patches, of 2 global crops of 3 images, view-major
        >>> masks = [torch.eye(2).bool().expand(3, 2, 2) for _ in range(2)]
        >>> output, targets = ((head(x[:, 0]), head(x[:, 1:])) for head in (student, teacher))
        >>> sorted(criterion(output, targets, None, masks, epoch=0))
        ['cls', 'loss', 'patch']
    """

    patch_loss_class = IBOTPatchLoss

    def __init__(
        self,
        out_dim: int,
        patch_out_dim: int,
        ngcrops: int,
        nlcrops: int,
        warmup_teacher_temp: float,
        teacher_temp: float,
        warmup_teacher_temp2: float,
        teacher_temp2: float,
        warmup_teacher_temp_epochs: int,
        nepochs: int,
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
        center_momentum2: float = 0.9,
        lambda1: float = 1.0,
        lambda2: float = 1.0,
        mim_start_epoch: int = 0,
        *,
        center_tokens: str = "all",
        patch_centering: str | CenteringRule | None = None,
        **options: Unpack[StreamOptions],
    ) -> None:
        super().__init__()
        if ngcrops < 1 or nlcrops < 0 or ngcrops + nlcrops < 2:
            raise ValueError(f"ngcrops is {ngcrops} and nlcrops {nlcrops}; expected a global crop and another one")
        self.ngcrops, self.ncrops = ngcrops, ngcrops + nlcrops
        self.lambda1, self.lambda2 = lambda1, lambda2
        warm_up = (warmup_teacher_temp_epochs, nepochs)
        schedule = temperature_schedule(warmup_teacher_temp, teacher_temp, *warm_up)
        name2 = "teacher_temp2"
        schedule2 = temperature_schedule(warmup_teacher_temp2, teacher_temp2, *warm_up, mim_start_epoch, name2)
        self._temperatures, self._temperatures2 = EpochTemperatures(schedule), EpochTemperatures(schedule2)
        self.stream = self.stream_class(out_dim, student_temp, center_momentum, **options)
        self.patch_loss = self.patch_loss_class(
            *(patch_out_dim, student_temp, center_momentum2),
            center_tokens=center_tokens,
            **_of_patches(options, patch_centering),
        )
        self.statistics: AssignmentStatistics | None = None
        publish_center(self, "center", "stream.centering.center")
        publish_center(self, "center2", "patch_loss.center", dims=3)

    @property
    def teacher_temp_schedule(self) -> NDArray[np.float64]:
        """[nepochs] teacher temperature of class tokens by epoch, a read-only array; assign another to change it."""
        return self._temperatures.array

    @teacher_temp_schedule.setter
    def teacher_temp_schedule(self, values: NDArray[Any]) -> None:
        self._temperatures.assign(values, "teacher_temp_schedule")

    @property
    def teacher_temp2_schedule(self) -> NDArray[np.float64]:
        """[nepochs] the same for patches."""
        return self._temperatures2.array

    @teacher_temp2_schedule.setter
    def teacher_temp2_schedule(self, values: NDArray[Any]) -> None:
        self._temperatures2.assign(values, "teacher_temp2_schedule")

    @property
    def nlcrops(self) -> int:
        """Number of local crops: ``ncrops - ngcrops``."""
        return self.ncrops - self.ngcrops

    @nlcrops.setter
    def nlcrops(self, count: int) -> None:
        self.ncrops = self.ngcrops + count

    @property
    def student_temp(self) -> float:
        """Student temperature of both streams; may be assigned."""
        return self.stream.student_temp

    @student_temp.setter
    def student_temp(self, value: float) -> None:
        self.patch_loss.student_temp = value
        self.stream.student_temp = value

    @property
    def center_momentum2(self) -> float:
        """Momentum of the patches' running centre; may be assigned, and is absent under Sinkhorn-Knopp."""
        return self.patch_loss.center_momentum

    @center_momentum2.setter
    def center_momentum2(self, value: float) -> None:
        self.patch_loss.center_momentum = value

    @property
    def center2(self) -> Tensor:
        """[1, 1, K] the running centre of the patches; may be assigned, and is absent under Sinkhorn-Knopp."""
        return self.patch_loss.center[None]

    @center2.setter
    def center2(self, value: Tensor) -> None:
        self.patch_loss.center = value

    @property
    def patch_statistics(self) -> AssignmentStatistics | None:
        """Statistics of the patches of the last call."""
        return self.patch_loss.statistics

    def forward(
        self,
        student_output: tuple[PrototypeLogits | Tensor, PrototypeLogits | Tensor],
        teacher_output: tuple[PrototypeLogits | Tensor, PrototypeLogits | Tensor],
        student_local_cls: PrototypeLogits | Tensor | None,
        student_mask: Sequence[Tensor],
        epoch: int,
    ) -> dict[str, Tensor]:
        """Both losses and their sum; moves both centres.

        Args:
            student_output: ([G * B, K] class tokens, [G * B, N, K] patches) of the masked global crops, raw logits.
            teacher_output: the same of the unmasked global crops.
            student_local_cls: [L * B, K] class tokens of the local crops from the same head, or None.
            student_mask: one [B, H, W] (or [B, N]) bool tensor for each global crop; further ones are ignored.
            epoch: from 0; selects the teacher temperatures.

        Returns:
            "cls" and "patch", each [] nats times its lambda, and "loss", their sum.

        Raises:
            ValueError: shapes do not fit, the local crops' class tokens come from another head, or the epoch is beyond
                ``nepochs``.
            TypeError: one side is stored and the other is not.
        """
        tau, tau2 = self._temperatures(epoch), self._temperatures2(epoch)
        for output in (*student_output, *([] if student_local_cls is None else [student_local_cls])):
            check_logits(output, "student")
        for output in teacher_output:
            check_logits(output, "teacher")
        mask = self._joined_mask(student_mask)
        teacher_cls = teacher_output[0]
        student_cls = self._all_crops(student_output[0], student_local_cls, teacher_cls)
        # check both before either loss, so that no centre starts or moves if one half of the batch does not fit
        outputs = self._prepare_cls(student_cls, teacher_cls, tau)
        patches = self.patch_loss.prepare(student_output[1], teacher_output[1], mask, tau2)
        cls = self.lambda1 * self._cls_loss(outputs, tau)
        patch = self.lambda2 * self.patch_loss.evaluate(patches)
        self.stream.observe(outputs.teacher, tau, outputs.teacher_bias)
        return {"cls": cls, "patch": patch, "loss": cls + patch}

    def update_center(
        self,
        teacher_cls: PrototypeLogits | Tensor | None = None,
        teacher_patch: PrototypeLogits | Tensor | None = None,
        epoch: int | None = None,
    ) -> None:
        """Move both centres by raw logits, if given, and by the pending batches of ``center_update="manual"``.

        Args:
            teacher_cls: [R, K] logits of class tokens.
            teacher_patch: [R, N, K] logits of patches; all of them enter the centre.
            epoch: selects the temperatures, which only centres of probabilities need.

        Raises:
            ValueError: K is another one, or the epoch is missing or beyond ``nepochs``.
        """
        at = (None, None) if epoch is None else (self._temperatures(epoch), self._temperatures2(epoch))
        self.stream.update_center(teacher_cls, at[0])
        self.patch_loss.update_center(teacher_patch, at[1])

    def _prepare_cls(
        self, student: PrototypeLogits | Tensor, teacher: PrototypeLogits | Tensor, teacher_temp: float | Tensor
    ) -> Outputs:
        return self.stream.prepare(student, teacher, teacher_temp)

    def _cls_loss(self, outputs: Outputs, teacher_temp: float | Tensor) -> Tensor:
        teacher = outputs.teacher
        images = max(teacher.shape[:-1].numel() // self.ngcrops, 1)  # more leading dims are more rows of each crop
        weights = multi_crop_weights(self.ngcrops, self.ncrops, device=teacher.device) / images
        result = self.stream(outputs, weights, teacher_temp)
        self.statistics = result.statistics
        loss: Tensor = result.loss
        return loss

    def _all_crops(
        self,
        student: PrototypeLogits | Tensor,
        local: PrototypeLogits | Tensor | None,
        teacher: PrototypeLogits | Tensor,
    ) -> PrototypeLogits | Tensor:
        """[V * B, K] class tokens of the student's crops."""
        images, rest = divmod(teacher.shape[0], self.ngcrops)
        if rest:
            raise ValueError(
                f"teacher class tokens have {teacher.shape[0]} rows; expected a multiple of its {self.ngcrops} global crops"
            )
        rows = student.shape[0], 0 if local is None else local.shape[0]
        if rows != (self.ngcrops * images, self.nlcrops * images):
            raise ValueError(
                f"student class tokens have {rows[0]} rows of global crops and {rows[1]} of local ones; expected "
                f"{self.ngcrops * images} and {self.nlcrops * images}, of {self.ngcrops} and {self.nlcrops} crops of the "
                f"{images} images that the teacher has"
            )
        return student if local is None else _joined(student, local)

    def _joined_mask(self, student_mask: Sequence[Tensor]) -> Tensor:
        """[G * B, N] of all global crops."""
        if student_mask is None:
            raise ValueError("student_mask is None; expected a bool mask [images, ...] for each global crop")
        masks = list(student_mask[: self.ngcrops])
        if len(masks) < self.ngcrops or min(crop.ndim for crop in masks) < 2:
            raise ValueError(
                f"student_mask holds masks of shapes {[tuple(crop.shape) for crop in masks]}; expected one of [images, ...] "
                f"for each of {self.ngcrops} global crops"
            )
        return torch.cat([crop.flatten(1) for crop in masks])


class IBOTvMFLoss(IBOTLoss):
    """iBOT-vMF: the prototypes are von Mises-Fisher components; needs heads that return ``PrototypeLogits``.

    A shared head has one set of prototypes; their precision depends on the temperature, of class tokens or of patches.
    Arguments as ``IBOTLoss``; centering is "probability" by default. Reconstructed (vmf_kernels/README.md).

    Source: Govindarajan et al., "DINO as a von Mises-Fisher mixture model", ICLR 2023 (arXiv:2405.10939).

    Example:
        >>> student, teacher = (DINOvMFHead(8, 512, hidden_dim=16, bottleneck_dim=4) for _ in range(2))
        >>> criterion = IBOTvMFLoss(512, 512, 2, 0, 0.04, 0.07, 0.04, 0.07, 30, 100)
        >>> x = torch.randn(2 * 3, 1 + 4, 8)  # class token and 2 x 2 patches, of 2 global crops of 3 images, view-major
        >>> masks = [torch.eye(2).bool().expand(3, 2, 2) for _ in range(2)]
        >>> output, targets = ((head(x[:, 0]), head(x[:, 1:])) for head in (student, teacher))
        >>> criterion(output, targets, None, masks, epoch=0)["loss"].isfinite().item()
        True
    """

    stream_class = UnstoredVMFStream
    patch_loss_class = IBOTvMFPatchLoss

    def _prepare_cls(
        self, student: PrototypeLogits | Tensor, teacher: PrototypeLogits | Tensor, teacher_temp: float | Tensor
    ) -> Outputs:
        outputs = super()._prepare_cls(student, teacher, teacher_temp)
        streams = self.stream, self.patch_loss.stream
        if isinstance(streams[0], VMFStream) and isinstance(streams[1], VMFStream):
            streams[1].warned |= streams[0].warned
        return outputs


def _of_patches(options: StreamOptions, centering: str | CenteringRule | None) -> StreamOptions:
    """The options with the patches' rule."""
    of_class_tokens = options.get("centering")
    named = of_class_tokens is None or isinstance(of_class_tokens, str)
    if not named and (centering is None or centering is of_class_tokens):
        raise ValueError(
            "centering is a rule for the class tokens; expected another one as patch_centering=, for the patches"
        )
    return options if centering is None else {**options, "centering": centering}


def _joined(student: PrototypeLogits | Tensor, local: PrototypeLogits | Tensor) -> PrototypeLogits | Tensor:
    """Joins the rows of two calls of one head."""
    if student.shape[-1] != local.shape[-1]:
        raise ValueError(
            f"student_local_cls has {local.shape[-1]} prototypes but the global crops' class tokens {student.shape[-1]}; "
            "expected those of one head"
        )
    if isinstance(student, PrototypeLogits) and isinstance(local, PrototypeLogits):
        one, other = student.prototypes, local.prototypes
        if not same_prototypes(one, other) or one.weight.requires_grad != other.weight.requires_grad:
            raise ValueError(
                "student_local_cls has other prototypes than the global crops' class tokens; expected those of one head, "
                "both detached or neither"
            )
    return torch.cat([student, local])  # type: ignore[list-item]
