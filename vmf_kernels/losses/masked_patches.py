"""iBOT's loss of masked patches: each is matched with the same patch as the teacher sees it.

Legend: C masked images, N patches of an image, M masked patches, K prototypes.
"""

from __future__ import annotations

from typing import NamedTuple, Unpack

import torch
from torch import Tensor

from vmf_kernels.losses.center_state import publish_center
from vmf_kernels.losses.stream import Outputs, StreamLoss, StreamOptions
from vmf_kernels.losses.vmf_stream import UnstoredVMFStream
from vmf_kernels.statistics import AssignmentStatistics
from vmf_kernels.unstored.prototype_logits import PrototypeLogits

CENTER_TOKENS = ("all", "masked")


class PatchBatch(NamedTuple):
    """The checked inputs of the patch loss."""

    masked: Outputs  # of the M masked patches
    averaged: PrototypeLogits | Tensor  # the teacher's rows that enter the centre
    weights: Tensor  # [M] fp64
    teacher_temp: float | Tensor


class IBOTPatchLoss(StreamLoss):
    """iBOT's loss of masked patches: the student sees the mask and learns the teacher's assignment of the unmasked patch.

    It is the mean over the masked patches of each image, then over all images, including those without a masked patch. Only
    rows of masked patches enter it; unstored logits of other patches are never computed.

    Args:
        out_dim: number of prototypes K.
        student_temp: student temperature.
        center_momentum: of the running mean, in [0, 1).
        center_tokens: "all" averages the centre over all patches (iBOT), "masked" over the masked patches (DINOv2, lightly).
        options: keywords of ``Stream``: the centring rule and how its centre moves, backend, ranks.

    Attributes:
        center: [1, K] fp32, the state dict's only entry; absent under Sinkhorn-Knopp, which keeps no centre.
        statistics: ``AssignmentStatistics`` of the last call; None before the first.

    Raises:
        ValueError: a temperature is not positive, or an option unknown.
    Source: Zhou et al., "iBOT: image BERT pre-training with online tokenizer", ICLR 2022, equation 2.

    Example:
        >>> student, teacher = (DINOHead(8, 512, hidden_dim=16, bottleneck_dim=4) for _ in range(2))
        >>> criterion, patches = IBOTPatchLoss(512), torch.randn(3, 4, 8)  # 2 x 2 patches of 3 images
        >>> mask = torch.eye(2).bool().expand(3, 2, 2)
        >>> criterion(student(patches), teacher(patches), mask, teacher_temp=0.04).backward()
        >>> tuple(criterion.center.shape), bool(criterion.center.any())
        ((1, 512), True)
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
        self.stream = self.stream_class(out_dim, student_temp, center_momentum, **options)
        self.statistics: AssignmentStatistics | None = None
        publish_center(self, "center", "stream.centering.center")

    def forward(
        self,
        student_patches: PrototypeLogits | Tensor,
        teacher_patches: PrototypeLogits | Tensor,
        mask: Tensor,
        teacher_temp: float | Tensor,
    ) -> Tensor:
        """Mean cross-entropy of the masked patches; moves the centre.

        Args:
            student_patches: [C, N, K] raw logits of all patches of the masked images.
            teacher_patches: [C, N, K] raw logits of the same patches as the teacher sees them, unmasked.
            mask: [C, N] (or [C, H, W] with N = H W) bool, True where masked. The number of masked patches is read; with a mask
                on the CPU this does not wait for the device. ``torch.compile`` accepts it with ``fullgraph=True``, and
                otherwise breaks the graph.
            teacher_temp: teacher temperature, positive; a float or a tensor of one element. A compiled step takes a new tensor
                at run time, but compiles again for another float.

        Returns:
            [] nats; 0 with zero gradients if nothing is masked.

        Raises:
            ValueError: shapes do not fit; the text says what was given and expected.
            TypeError: one side is stored and the other is not.
        """
        return self.evaluate(self.prepare(student_patches, teacher_patches, mask, teacher_temp))

    def prepare(
        self,
        student_patches: PrototypeLogits | Tensor,
        teacher_patches: PrototypeLogits | Tensor,
        mask: Tensor,
        teacher_temp: float | Tensor,
    ) -> PatchBatch:
        """The first half of ``forward``: checks the batch and does not change the centre."""
        mask = _checked_mask(mask, student_patches, teacher_patches)
        rows, weights = (part.to(student_patches.device) for part in _masked_rows(mask))
        # pass all patches to ``prepare``, so that its checks do not depend on the mask
        outputs = self.stream.prepare(student_patches.flatten(0, 1), teacher_patches.flatten(0, 1), teacher_temp)
        masked = outputs._replace(
            student=outputs.student.index_select(0, rows), teacher=outputs.teacher.index_select(0, rows)
        )
        averaged = outputs.teacher if self.center_tokens == "all" else masked.teacher
        return PatchBatch(masked, averaged, weights, teacher_temp)

    def evaluate(self, batch: PatchBatch) -> Tensor:
        """The second half of ``forward``: computes the loss and moves the centre."""
        masked, averaged, weights, teacher_temp = batch
        # start "first_batch" must use the same rows as later updates
        self.stream.centering.begin(averaged.detach(), teacher_temp, masked.teacher_bias)
        result = self.stream(masked, weights.new_ones(1, 1), teacher_temp, weights)
        self.statistics = result.statistics
        self.stream.observe(averaged, teacher_temp, masked.teacher_bias)
        loss: Tensor = result.loss
        return loss

    def update_center(
        self, teacher_patches: PrototypeLogits | Tensor | None = None, teacher_temp: float | Tensor | None = None
    ) -> None:
        """Move the centre by all rows of [..., K] raw logits, and by the pending batches of ``center_update="manual"``.

        Raises:
            ValueError: K is not ``out_dim``, or a centre of probabilities has no temperature.
        """
        self.stream.update_center(teacher_patches, teacher_temp)


class IBOTvMFPatchLoss(IBOTPatchLoss):
    """The same with prototypes of free norm as von Mises-Fisher components; needs heads that return ``PrototypeLogits``.

    Arguments as ``IBOTPatchLoss``; centering is "probability" by default. Reconstructed (vmf_kernels/README.md).

    Source: Govindarajan et al., "DINO as a von Mises-Fisher mixture model", ICLR 2023 (arXiv:2405.10939).

    Example:
        >>> student, teacher = (DINOvMFHead(8, 512, hidden_dim=16, bottleneck_dim=4) for _ in range(2))
        >>> patches, mask = torch.randn(3, 4, 8), torch.eye(2).bool().expand(3, 2, 2)
        >>> IBOTvMFPatchLoss(512)(student(patches), teacher(patches), mask, teacher_temp=0.04).isfinite().item()
        True
    """

    stream_class = UnstoredVMFStream


def patch_weights(mask_CN: Tensor, dtype: torch.dtype) -> Tensor:
    """[C, N] weight of each masked patch in its image's mean, one over the image's masked patches; 0 for other patches.

    Args:
        mask_CN: bool or numbers, 0 for patches that are not masked.
        dtype: of the weights and of their computation.

    Source: Zhou et al., "iBOT", ICLR 2022, equation 2; facebookresearch/dinov2 dinov2/loss/ibot_patch_loss.py.
    """
    mask_CN = mask_CN.to(dtype)
    return mask_CN / mask_CN.sum(dim=1, keepdim=True).clamp(min=1.0)


def _masked_rows(mask: Tensor) -> tuple[Tensor, Tensor]:
    """[M] indices of the masked among C * N patches, in order, and fp64 weights for the loss's mean.

    This is the mean over the masked patches of each image, then over all C images. The number M is read once.
    """
    image_M, patch_M = mask.nonzero().unbind(1)
    rows_M = image_M * mask.shape[1] + patch_M
    return rows_M, patch_weights(mask, torch.float64).flatten()[rows_M] / max(len(mask), 1)


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
