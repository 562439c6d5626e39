"""iBOT's losses: masked patches matched one to one, and their sum with the class tokens' loss.

Legend: G global crops, L local crops, B images, C = G B masked images, N patches of an image, M masked patches, K prototypes.
Rows are view-major.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

import torch
from torch import Tensor, nn

from vmf_kernels.centering import Center
from vmf_kernels.logits import PrototypeLogits
from vmf_kernels.losses import publish_center
from vmf_kernels.pairing import multi_crop_weights
from vmf_kernels.prototypes import Prototypes
from vmf_kernels.statistics import AssignmentStatistics
from vmf_kernels.streams import Outputs, Stream, StreamOptions, VMFStream, of_epoch, temperature_schedule

CENTER_TOKENS = ("all", "masked")


class IBOTPatchLoss(nn.Module):
    """iBOT's loss of masked patches: the student, who sees the mask, learns what the teacher assigns to the patch itself.

    Mean over the masked patches of an image, then over all images, those without a masked patch included. Only rows of
    masked patches are looked at; logits that are not stored are never formed for the others.

    Args:
        out_dim: number of prototypes K.
        student_temp: student temperature.
        center_momentum: of the running mean, in [0, 1).
        center_tokens: "all" averages the centre over all patches (iBOT), "masked" over the masked ones (DINOv2, lightly).
        options: keywords of ``Stream``: the centring rule and how its centre moves, backend, ranks.

    Attributes:
        center: [1, K] fp32, the state dict's only entry; absent under Sinkhorn-Knopp, which keeps none.
        statistics: ``AssignmentStatistics`` of the last call, None before.

    Raises:
        ValueError: a temperature is not positive, or an option unknown.
    Source: Zhou et al., "iBOT: image BERT pre-training with online tokenizer", ICLR 2022, equation 2.
    """

    def __init__(
        self,
        out_dim: int,
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
        *,
        center_tokens: str = "all",
        **options: Unpack[StreamOptions],
    ) -> None:
        super().__init__()
        if center_tokens not in CENTER_TOKENS:
            raise ValueError(f"center_tokens is {center_tokens!r}; expected one of {', '.join(CENTER_TOKENS)}")
        self.center_tokens = center_tokens
        self.stream = self._make_stream(out_dim, student_temp, center_momentum, options)
        self.statistics: AssignmentStatistics | None = None
        publish_center(self, "center", "stream.centering.center")

    @property
    def center(self) -> Tensor:
        """[1, K] the running centre."""
        center: Tensor = self.stream.centering.center  # type: ignore[assignment]
        return center

    def forward(
        self,
        student_patches: PrototypeLogits | Tensor,
        teacher_patches: PrototypeLogits | Tensor,
        mask: Tensor,
        teacher_temp: float,
    ) -> Tensor:
        """Mean cross-entropy of the masked patches; moves the centre.

        Args:
            student_patches: [C, N, K] raw logits of all patches of the masked images.
            teacher_patches: [C, N, K] raw logits of the same patches as the teacher sees them, unmasked.
            mask: [C, N] (or [C, H, W] with N = H W) bool, True where masked. How many are is read, which on the CPU costs no
                wait for the device. ``torch.compile`` takes that in with ``fullgraph=True``, and breaks the graph without.
            teacher_temp: teacher temperature, positive.

        Returns:
            [] nats; 0 with zero gradients where nothing is masked.

        Raises:
            ValueError: shapes do not fit; says what was got and expected.
            TypeError: one side is stored and the other is not.
        """
        mask = _checked_mask(mask, student_patches, teacher_patches)
        rows, weights = (part.to(student_patches.device) for part in _masked_rows(mask))
        # all patches go through ``prepare``: whether their kinds and prototypes fit does not depend on the mask
        outputs = self.stream.prepare(student_patches.flatten(0, 1), teacher_patches.flatten(0, 1), teacher_temp)
        masked = outputs._replace(
            student=outputs.student.index_select(0, rows), teacher=outputs.teacher.index_select(0, rows)
        )
        averaged = outputs.teacher if self.center_tokens == "all" else masked.teacher
        if isinstance(self.stream.centering, Center):
            # a centre that starts with the first batch starts at the mean that it goes on with
            self.stream.centering.begin(averaged, teacher_temp, outputs.teacher_bias)
        result = self.stream(masked, weights.new_ones(1, 1), teacher_temp, weights)
        self.statistics = result.statistics
        self.stream.observe(averaged, teacher_temp, outputs.teacher_bias)
        loss: Tensor = result.loss
        return loss

    def update_center(self) -> None:
        """Move the centre by the batches since the last call; only for ``center_update="manual"``."""
        self.stream.centering.apply_pending()

    def _make_stream(self, out_dim: int, student_temp: float, momentum: float, options: StreamOptions) -> Stream:
        return Stream(out_dim, student_temp, momentum, **options)


class IBOTvMFPatchLoss(IBOTPatchLoss):
    """The same with prototypes of free norm as von Mises-Fisher components; needs heads that return ``PrototypeLogits``.

    Arguments as ``IBOTPatchLoss``; centering is "probability" unless given. A reconstruction (README of this folder).

    Source: Govindarajan et al., "DINO as a von Mises-Fisher mixture model", ICLR 2023 (arXiv:2405.10939).
    """

    def _make_stream(self, out_dim: int, student_temp: float, momentum: float, options: StreamOptions) -> Stream:
        return _vmf_stream(out_dim, student_temp, momentum, options)


class IBOTLoss(nn.Module):
    """iBOT's loss: that of the class tokens over all pairs of different views, plus that of the masked patches.

    Both heads may share their prototypes or not: that shows in the logits alone. Patches of local crops are not asked for.

    Args:
        out_dim: prototypes of the class tokens' head.
        patch_out_dim: prototypes of the patches' head.
        ngcrops: global crops G.
        nlcrops: local crops L.
        warmup_teacher_temp, teacher_temp: teacher temperature of class tokens at epoch 0, and after the warm-up.
        warmup_teacher_temp2, teacher_temp2: the same of patches.
        warmup_teacher_temp_epochs: epochs of linear warm-up; the last of them already has the final value, as published.
        nepochs: epochs of the run.
        student_temp: student temperature.
        center_momentum, center_momentum2: of the two running means, in [0, 1).
        lambda1, lambda2: weights of the two losses.
        mim_start_epoch: epoch at which the warm-up of the patches' temperature starts.
        center_tokens: as ``IBOTPatchLoss``.
        options: keywords of ``Stream``, for both streams.

    Attributes:
        center, center2: fp32 of class tokens, [1, K], and of patches, [1, 1, K]; the state dict's entries, as published.
        statistics, patch_statistics: ``AssignmentStatistics`` of the last call, None before.

    Raises:
        ValueError: a temperature is not positive, there are fewer than two crops, or an option is unknown.
    Source: Zhou et al., "iBOT: image BERT pre-training with online tokenizer", ICLR 2022, section 3 and algorithm 1.
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
        **options: Unpack[StreamOptions],
    ) -> None:
        super().__init__()
        if ngcrops < 1 or nlcrops < 0 or ngcrops + nlcrops < 2:
            raise ValueError(f"ngcrops is {ngcrops} and nlcrops {nlcrops}; expected a global crop and another one")
        self.ngcrops, self.nlcrops, self.ncrops = ngcrops, nlcrops, ngcrops + nlcrops
        self.lambda1, self.lambda2 = lambda1, lambda2
        warm_up = (warmup_teacher_temp_epochs, nepochs)
        self.teacher_temp_schedule = temperature_schedule(warmup_teacher_temp, teacher_temp, *warm_up)
        self.teacher_temp2_schedule = temperature_schedule(
            warmup_teacher_temp2, teacher_temp2, *warm_up, mim_start_epoch, "teacher_temp2"
        )
        self.stream = self._make_stream(out_dim, student_temp, center_momentum, options)
        self.patch_loss = self.patch_loss_class(
            patch_out_dim, student_temp, center_momentum2, center_tokens=center_tokens, **options
        )
        self.statistics: AssignmentStatistics | None = None
        publish_center(self, "center", "stream.centering.center")
        publish_center(self, "center2", "patch_loss.center", dims=3)

    @property
    def center(self) -> Tensor:
        """[1, K] the running centre of the class tokens."""
        center: Tensor = self.stream.centering.center  # type: ignore[assignment]
        return center

    @property
    def center2(self) -> Tensor:
        """[1, 1, K] the running centre of the patches."""
        return self.patch_loss.center[None]

    @property
    def patch_statistics(self) -> AssignmentStatistics | None:
        """Statistics of the patches in the last call."""
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
            student_mask: one [B, H, W] (or [B, N]) bool tensor for each global crop; more of them are not looked at.
            epoch: from 0, selects the teacher temperatures.

        Returns:
            "cls" and "patch", each [] nats times its lambda, and "loss", their sum.

        Raises:
            ValueError: shapes do not fit, or the epoch is beyond ``nepochs``.
            TypeError: one side is stored and the other is not.
        """
        tau, tau2 = of_epoch(self.teacher_temp_schedule, epoch), of_epoch(self.teacher_temp2_schedule, epoch)
        mask = self._joined_mask(student_mask)
        teacher_cls = teacher_output[0]
        student_cls = self._all_crops(student_output[0], student_local_cls, teacher_cls)
        cls, outputs = self._cls_loss(student_cls, teacher_cls, tau)
        patch = self.lambda2 * self.patch_loss(student_output[1], teacher_output[1], mask, tau2)
        # last, so that no centre has moved where either half of the batch does not fit
        self.stream.observe(outputs.teacher, tau, outputs.teacher_bias)
        return {"cls": cls, "patch": patch, "loss": cls + patch}

    def update_center(self) -> None:
        """Move both centres by the batches since the last call; only for ``center_update="manual"``."""
        self.stream.centering.apply_pending()
        self.patch_loss.update_center()

    def _cls_loss(
        self, student: PrototypeLogits | Tensor, teacher: PrototypeLogits | Tensor, teacher_temp: float
    ) -> tuple[Tensor, Outputs]:
        """The class tokens' loss times its lambda, and what their centre takes in."""
        outputs = self.stream.prepare(student, teacher, teacher_temp)
        images = max(teacher.shape[0] // self.ngcrops, 1)
        weights = multi_crop_weights(self.ngcrops, self.ncrops, device=teacher.device) / images
        result = self.stream(outputs, weights, teacher_temp)
        self.statistics = result.statistics
        return self.lambda1 * result.loss, outputs

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
        masks = list(student_mask[: self.ngcrops])
        if len(masks) < self.ngcrops or min(crop.ndim for crop in masks) < 2:
            raise ValueError(
                f"student_mask holds masks of shapes {[tuple(crop.shape) for crop in masks]}; expected one of [images, ...] "
                f"for each of {self.ngcrops} global crops"
            )
        return torch.cat([crop.flatten(1) for crop in masks])

    def _make_stream(self, out_dim: int, student_temp: float, momentum: float, options: StreamOptions) -> Stream:
        return Stream(out_dim, student_temp, momentum, **options)


class IBOTvMFLoss(IBOTLoss):
    """iBOT-vMF: both streams' prototypes are von Mises-Fisher components; needs heads that return ``PrototypeLogits``.

    A shared head has one set of prototypes whose precision follows the temperature of the stream. Arguments as ``IBOTLoss``;
    centering is "probability" unless given. A reconstruction (README of this folder).

    Source: Govindarajan et al., "DINO as a von Mises-Fisher mixture model", ICLR 2023 (arXiv:2405.10939).
    """

    patch_loss_class = IBOTvMFPatchLoss

    def _cls_loss(
        self, student: PrototypeLogits | Tensor, teacher: PrototypeLogits | Tensor, teacher_temp: float
    ) -> tuple[Tensor, Outputs]:
        result = super()._cls_loss(student, teacher, teacher_temp)
        streams = self.stream, self.patch_loss.stream
        if isinstance(streams[0], VMFStream) and isinstance(streams[1], VMFStream):
            streams[1].warned |= streams[0].warned
        return result

    def _make_stream(self, out_dim: int, student_temp: float, momentum: float, options: StreamOptions) -> Stream:
        return _vmf_stream(out_dim, student_temp, momentum, options)


def _joined(student: PrototypeLogits | Tensor, local: PrototypeLogits | Tensor) -> PrototypeLogits | Tensor:
    """Rows of two calls of one head."""
    if student.shape[-1] != local.shape[-1]:
        raise ValueError(
            f"student_local_cls has {local.shape[-1]} prototypes but the global crops' class tokens {student.shape[-1]}; "
            "expected those of one head"
        )
    if isinstance(student, PrototypeLogits) and isinstance(local, PrototypeLogits):
        # unlike torch.cat this compares no memory, which a compiled step cannot and which differs by call under FSDP2
        return PrototypeLogits(torch.cat([student.features, local.features]), student.prototypes)
    return torch.cat([student, local])  # type: ignore[list-item]


def masked_patch_weights(mask: Tensor) -> Tensor:
    """[M] weights that make a sum over masked patches the mean over each image's, then over all C images; fp64.

    Args:
        mask: [C, N] bool; the M masked patches are taken in order.
    """
    return _masked_rows(mask)[1]


def _masked_rows(mask: Tensor) -> tuple[Tensor, Tensor]:
    """[M] which of C * N patches are masked, and their weights; the count is read once."""
    image_M, patch_M = mask.nonzero().unbind(1)
    weight_C = mask.sum(dim=1).clamp(min=1).double().reciprocal() / max(len(mask), 1)
    return image_M * mask.shape[1] + patch_M, weight_C[image_M]


def _checked_mask(mask: Tensor, student: PrototypeLogits | Tensor, teacher: PrototypeLogits | Tensor) -> Tensor:
    """[C, N] bool."""
    if mask.dtype != torch.bool or mask.ndim < 2:
        raise ValueError(f"mask is {mask.dtype} of shape {tuple(mask.shape)}; expected bool [images, patches]")
    mask = mask.flatten(1)
    for output, side in ((student, "student"), (teacher, "teacher")):
        if output.ndim != 3 or tuple(output.shape[:2]) != tuple(mask.shape):
            raise ValueError(
                f"{side} patches have shape {tuple(output.shape)} but the mask {tuple(mask.shape)}; expected "
                "[images, patches, K] and [images, patches]"
            )
    return mask


class _UnstoredVMFStream(VMFStream):
    """``VMFStream`` of a loss that is given no prototypes beside its logits."""

    def prepare(
        self,
        student: PrototypeLogits | Tensor,
        teacher: PrototypeLogits | Tensor,
        teacher_temp: float,
        prototypes: tuple[Prototypes | None, Prototypes | None] = (None, None),
    ) -> Outputs:
        if isinstance(student, Tensor) and isinstance(teacher, Tensor):
            raise TypeError(
                f"outputs are plain logits of shapes {tuple(student.shape)} and {tuple(teacher.shape)}, without the "
                "prototypes' norms that the vMF normaliser needs; expected heads that return PrototypeLogits"
            )
        return super().prepare(student, teacher, teacher_temp, prototypes)


def _vmf_stream(out_dim: int, student_temp: float, momentum: float, options: StreamOptions) -> Stream:
    """DINO-vMF's centring unless another was asked for."""
    with_default: StreamOptions = {"centering": "probability", **options}
    return _UnstoredVMFStream(out_dim, student_temp, momentum, **with_default)
