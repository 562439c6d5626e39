"""Drop-in for facebookresearch/dinov3: ``DINOHead``, ``DINOLoss``, ``iBOTPatchLoss``, ``KoLeoLoss``, ``KoLeoLossDistributed``.

Signatures, defaults, reductions, buffers and state-dict keys are dinov3's; change the imports of its ``ssl_meta_arch.py``
(README). Differences as for ``compat.dinov2``; also, a centre that was never initialised raises an error instead of giving
NaN, and ``row_group=`` replaces dinov3's process subgroup.

Legend: S / T student / teacher crops, B images, K prototypes.
"""

from __future__ import annotations

import math
from typing import Unpack

import torch
from torch import Tensor, nn

from vmf_kernels.compat import dinov2
from vmf_kernels.compat._dinov2_and_v3 import (
    ClassTokenLoss,
    Logits,
    PatchLoss,
    RankOptions,
    Targets,
    check_targets,
    sinkhorn_targets,
)
from vmf_kernels.compat.dinov2 import KoLeoLoss
from vmf_kernels.heads.fuse import FusedLinear
from vmf_kernels.heads.mlp import init_linear, init_linears, unit_rows
from vmf_kernels.heads.prototype_layer import outlive
from vmf_kernels.losses import koleo
from vmf_kernels.pairing import multi_crop_weights
from vmf_kernels.ranks import Shared
from vmf_kernels.unstored.prototype_logits import PrototypeLogits

__all__ = ["DINOHead", "DINOLoss", "KoLeoLoss", "KoLeoLossDistributed", "SinkhornKnoppTeacher", "iBOTPatchLoss"]


class PlainPrototypes(FusedLinear):
    """The last layer: linear, without weight norm; ``reset_parameters`` initialises it as the head's ``init_weights``."""

    def reset_parameters(self) -> None:
        """Truncated normal weights of standard deviation 0.02."""
        init_linear(self)


class DINOHead(dinov2.DINOHead):
    """MLP, L2-normalised bottleneck, plain linear prototypes; it returns unstored logits.

    Arguments and errors as ``compat.dinov2.DINOHead``.

    Source: facebookresearch/dinov3 dinov3/layers/dino_head.py.

    Example:
        >>> head = DINOHead(8, 512, hidden_dim=16, bottleneck_dim=4)
        >>> head.init_weights()
        >>> x = torch.randn(3, 8)
        >>> tuple(head(x).shape), tuple(head(x, no_last_layer=True).shape)
        ((3, 512), (3, 4))
    """

    def init_weights(self) -> None:
        """Truncated normal weights of standard deviation 0.02, including the prototypes, and zero biases."""
        init_linears(self)

    def forward(  # type: ignore[override]
        self, x: Tensor, no_last_layer: bool = False, only_last_layer: bool = False
    ) -> PrototypeLogits | Tensor:
        """[..., in_dim] features to [..., K] logits; ``no_last_layer`` stops at the [..., D] bottleneck, ``only_last_layer``
        starts there."""
        if not only_last_layer:
            x = unit_rows(self.mlp(x))
        if no_last_layer:
            return x
        logits: PrototypeLogits = self.last_layer(x)
        return outlive(self, logits)

    def _make_layer(self, dim: int, num_prototypes: int) -> nn.Module:
        layer = FusedLinear(dim, num_prototypes, bias=False)  # weights of nn.Linear until init_weights, as published
        layer.__class__ = PlainPrototypes
        return layer


class DINOLoss(ClassTokenLoss):
    """Cross-entropy of class tokens: mean over the pairs of crops and over images.

    Args:
        out_dim: number of prototypes K.
        student_temp: student temperature.
        center_momentum: of the running mean, in [0, 1).
        options: keywords ``backend``, ``prototype_group``, ``row_group`` of ``Stream``.

    Attributes:
        center: [1, K] fp32, the state dict's only entry; NaN until ``init_weights`` or a checkpoint.

    Raises:
        ValueError: a temperature is not positive, or an option out of range.
    Source: facebookresearch/dinov3 dinov3/loss/dino_clstoken_loss.py.

    Example:
        >>> student, teacher = (DINOHead(8, 512, hidden_dim=16, bottleneck_dim=4)(torch.randn(2 * 3, 8)) for _ in range(2))
        >>> criterion = DINOLoss(512)
        >>> criterion.init_weights()
        >>> targets = criterion.sinkhorn_knopp_teacher(teacher, teacher_temp=0.04)
        >>> criterion(student.unflatten(0, (2, 3)), targets.unflatten(0, (2, 3)), ignore_diagonal=True).requires_grad
        True
    """

    def __init__(
        self, out_dim: int, student_temp: float = 0.1, center_momentum: float = 0.9, **options: Unpack[RankOptions]
    ) -> None:
        super().__init__(out_dim, student_temp, center_momentum, **options)
        self.center.fill_(math.nan)

    def init_weights(self) -> None:
        """Set the centre to 0."""
        self.reset_parameters()

    @torch.no_grad()
    def softmax_center_teacher(
        self, teacher_output: Logits, teacher_temp: float | Tensor, update_centers: bool = True
    ) -> Targets:
        """[..., K] targets of [..., K] raw logits by the centre; with ``update_centers``, after its pending update."""
        if update_centers:
            self.apply_center_update()
        return self._centered_targets(teacher_output, teacher_temp)

    def sinkhorn_knopp_teacher(
        self, teacher_output: Logits, teacher_temp: float | Tensor, n_iterations: int = 3
    ) -> Targets:
        """[..., K] targets of [..., K] raw logits by Sinkhorn-Knopp over the rows of all ranks; no centre. Collective."""
        return self._sinkhorn_targets(teacher_output, teacher_temp, n_iterations)

    def forward(self, student_logits: Logits, teacher_probs: Targets, ignore_diagonal: bool = False) -> Tensor:
        """Mean over pairs and images.

        Args:
            student_logits: [S, B, K] raw logits.
            teacher_probs: [T, B, K] targets.
            ignore_diagonal: exclude pairs of student and teacher crops of the same number.

        Returns:
            [] nats.

        Raises:
            ValueError: shapes do not fit, or no pair is left.
            TypeError: one side is stored and the other is not.
        """
        check_targets(teacher_probs)
        shapes = tuple(student_logits.shape), tuple(teacher_probs.shape)
        if [len(shape) for shape in shapes] != [3, 3] or shapes[0][1:] != shapes[1][1:]:
            raise ValueError(
                f"student_logits have shape {shapes[0]} and teacher_probs {shapes[1]}; expected [S, B, K] and [T, B, K]"
            )
        (student_crops, images, _), teacher_crops = shapes[0], shapes[1][0]
        device = student_logits.device
        if ignore_diagonal:
            weights = multi_crop_weights(teacher_crops, student_crops, device=device)
        else:
            weights = torch.ones(teacher_crops, student_crops, dtype=torch.float64, device=device) / max(
                teacher_crops * student_crops, 1
            )
        return self._cross_entropy(student_logits.flatten(0, 1), teacher_probs.flatten(0, 1), weights / max(images, 1))


class SinkhornKnoppTeacher(nn.Module):
    """Sinkhorn-Knopp targets as a module, which may be compiled. The published loss compiles it; this one does not.

    Args:
        options: as ``DINOLoss``.

    Source: facebookresearch/dinov3 dinov3/loss/ibot_patch_loss.py.

    Example:
        >>> teacher = DINOHead(8, 512, hidden_dim=16, bottleneck_dim=4)(torch.randn(6, 8))  # of 6 masked patches
        >>> targets = SinkhornKnoppTeacher()(teacher, teacher_temp=0.04, n_masked_patches_tensor=torch.tensor([6]))
        >>> type(targets).__name__, tuple(targets.shape)
        ('TeacherTargets', (6, 512))
    """

    def __init__(self, **options: Unpack[RankOptions]) -> None:
        super().__init__()
        self._options = Shared(options)

    @torch.no_grad()
    def forward(
        self,
        teacher_output: Logits,
        teacher_temp: float | Tensor,
        n_masked_patches_tensor: Tensor,
        n_iterations: int = 3,
    ) -> Targets:
        """[M, K] targets of [M, K] raw logits by Sinkhorn-Knopp over the masked patches of all ranks. Collective.

        ``n_masked_patches_tensor`` is neither read nor written: the number of patches cancels in the algorithm.
        """
        return sinkhorn_targets(teacher_output, teacher_temp, n_iterations, self._options.value)


class iBOTPatchLoss(PatchLoss):  # noqa: N801 - the published name
    """Cross-entropy of masked patches: the mean over those of each image, then over all images.

    Args:
        patch_out_dim: number of prototypes K.
        student_temp, center_momentum, options: as ``DINOLoss``.

    Attributes:
        center: [1, 1, K] fp32, the state dict's only entry; NaN until ``init_weights`` or a checkpoint.
        sinkhorn_knopp_teacher: ``SinkhornKnoppTeacher``.

    Raises:
        ValueError: a temperature is not positive, or an option out of range.
    Source: facebookresearch/dinov3 dinov3/loss/ibot_patch_loss.py.

    Example:
        >>> masks = torch.eye(3).bool().expand(2, 3, 3).flatten(1)  # 3 of the 9 patches of each of 2 images
        >>> student, teacher = (DINOHead(8, 512, hidden_dim=16, bottleneck_dim=4)(torch.randn(6, 8)) for _ in range(2))
        >>> criterion = iBOTPatchLoss(512)
        >>> criterion.init_weights()
        >>> targets = criterion.sinkhorn_knopp_teacher(teacher, teacher_temp=0.04, n_masked_patches_tensor=masks.sum()[None])
        >>> criterion.forward_masked(student, targets, masks).requires_grad
        True
    """

    def __init__(
        self,
        patch_out_dim: int,
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
        **options: Unpack[RankOptions],
    ) -> None:
        super().__init__(patch_out_dim, student_temp, center_momentum, **options)
        self.center.fill_(math.nan)
        self.sinkhorn_knopp_teacher = SinkhornKnoppTeacher(**options)

    def init_weights(self) -> None:
        """Set the centre to 0."""
        self.reset_parameters()

    @torch.no_grad()
    def softmax_center_teacher(
        self, teacher_patch_tokens: Logits, teacher_temp: float | Tensor, update_centers: bool = True
    ) -> Targets:
        """[..., K] targets of [..., K] raw logits by the centre; with ``update_centers``, after its pending update."""
        if update_centers:
            self.apply_center_update()
        return self._centered_targets(teacher_patch_tokens, teacher_temp)


class KoLeoLossDistributed(nn.Module):
    """``KoLeoLoss`` with neighbours from the rows of all ranks, or of groups of consecutive ranks.

    Args:
        topk: nearest neighbours of a row, at least 1.
        loss_group_size: rows of a group: a multiple of each rank's rows and a divisor of the rows of all ranks; None for all.

    Raises:
        ValueError: ``topk`` or ``loss_group_size`` is below 1.
    Source: facebookresearch/dinov3 dinov3/loss/koleo_loss.py.

    Example:
        >>> round(KoLeoLossDistributed()(torch.eye(4)).item(), 2)  # every nearest neighbour is sqrt(2) away: -log(2) / 2
        -0.35
    """

    def __init__(self, topk: int = 1, loss_group_size: int | None = None) -> None:
        super().__init__()
        koleo.KoLeoLoss(topk=topk)  # raises for invalid arguments now, not in the first step
        if loss_group_size is not None and loss_group_size < 1:
            raise ValueError(f"loss_group_size is {loss_group_size}; expected an int >= 1, or None for all rows")
        self.pdist = nn.PairwiseDistance(2, eps=1e-8)
        self.topk = topk
        self.loss_group_size = loss_group_size

    def pairwise_NNs_inner(self, x: Tensor, all_x: Tensor, rank: int) -> Tensor:  # noqa: N802 - the published name
        """[B, topk] indices of the rows of ``all_x`` [N, D] nearest to each row of ``x`` [B, D], its block ``rank``."""
        similarity = x @ all_x.T
        similarity.diagonal(rank * x.shape[0]).fill_(-1)
        return similarity.topk(self.topk, dim=1).indices

    def forward(self, student_output: Tensor, eps: float = 1e-8) -> Tensor:
        """[] mean over this rank's rows [B, D], nats. Collective, and so is its backward pass.

        Raises:
            ValueError: ``student_output`` is not a matrix, there are at most ``topk`` rows, or groups do not fit the rows. If
                this is so on one rank, all ranks raise.
        """
        loss: Tensor = _GroupedKoLeoLoss(eps, self.topk, self.loss_group_size)(student_output)
        return loss


class _GroupedKoLeoLoss(koleo.DistributedKoLeoLoss):
    """Neighbours come from the group of ``size`` rows that contains this rank's rows."""

    def __init__(self, eps: float, topk: int, size: int | None) -> None:
        super().__init__(eps, topk=topk)
        self.size = size

    def _check(self, features: Tensor, counts: list[int]) -> None:
        super()._check(features, counts)
        size = sum(counts) if self.size is None else self.size
        starts = [sum(counts[:rank]) for rank in range(len(counts))]
        over = any(start % size + count > size for start, count in zip(starts, counts, strict=True))
        if over or sum(counts) % size or size <= self.topk:
            raise ValueError(
                f"loss_group_size is {self.size} but the ranks have {counts} rows; expected a divisor of all rows that is a "
                f"multiple of each rank's and at least {self.topk + 1}"
            )

    def _candidates(self, rows_BCD: Tensor, counts: list[int]) -> tuple[Tensor, int]:
        among, start = super()._candidates(rows_BCD, counts)
        if self.size is None:
            return among, start
        first = start // self.size * self.size
        return among[first : first + self.size], start - first
