"""DINOv2's and DINOv3's heads and losses on stored logits, written out from their formulas: what tests compare with.

Nothing of the library is used, and every [rows, K] tensor is stored. One process; ``ranks`` stand for others by their rows.

Legend: R rows, G / V teacher / student entries, C masked images, N patches, M masked patches, K prototypes, D bottleneck dim.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.fuzz.statements.dino import PublishedWeightNorm
from tests.fuzz.statements.sinkhorn import published_sinkhorn_knopp


class PublishedV2Head(nn.Module):
    """MLP with GELU, L2-normalised bottleneck, weight-normed prototypes of free norm.

    Source: Oquab et al., "DINOv2", TMLR 2024; facebookresearch/dinov2 dinov2/layers/dino_head.py.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        use_bn: bool = False,
        nlayers: int = 3,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        mlp_bias: bool = True,
    ) -> None:
        super().__init__()
        if nlayers <= 1:
            self.mlp: nn.Module = nn.Linear(in_dim, bottleneck_dim, bias=mlp_bias)
        else:
            parts: list[nn.Module] = []
            for width in [in_dim] + [hidden_dim] * (nlayers - 2):
                parts.append(nn.Linear(width, hidden_dim, bias=mlp_bias))
                parts += [nn.BatchNorm1d(hidden_dim), nn.GELU()] if use_bn else [nn.GELU()]
            self.mlp = nn.Sequential(*parts, nn.Linear(hidden_dim, bottleneck_dim, bias=mlp_bias))
        self.last_layer = self.make_last_layer(bottleneck_dim, out_dim)

    def make_last_layer(self, dim: int, prototypes: int) -> nn.Module:
        return PublishedWeightNorm(dim, prototypes, frozen_norm=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_dim] features to stored [..., K] logits."""
        logits: Tensor = self.last_layer(functional.normalize(self.mlp(x), dim=-1, p=2))
        return logits


class PublishedV3Head(PublishedV2Head):
    """The same with a plain linear last layer.

    Source: Simeoni et al., "DINOv3", 2025; facebookresearch/dinov3.
    """

    def make_last_layer(self, dim: int, prototypes: int) -> nn.Module:
        return nn.Linear(dim, prototypes, bias=False)

    def forward(self, x: Tensor, no_last_layer: bool = False, only_last_layer: bool = False) -> Tensor:
        """[..., in_dim] features to stored [..., K] logits, or one half of the way."""
        hidden = x if only_last_layer else functional.normalize(self.mlp(x), dim=-1, p=2)
        logits: Tensor = hidden if no_last_layer else self.last_layer(hidden)
        return logits


class PublishedLazyCenter(nn.Module):
    """A running mean of raw logits whose step waits until targets are next asked for."""

    center: Tensor

    def __init__(self, shape: tuple[int, ...], student_temp: float, center_momentum: float) -> None:
        super().__init__()
        self.student_temp, self.center_momentum = student_temp, center_momentum
        self.register_buffer("center", torch.zeros(*shape))
        self.waiting: Tensor | None = None

    def init_weights(self) -> None:
        """The centre starts at 0."""
        self.center.zero_()

    @torch.no_grad()
    def softmax_center_teacher(self, teacher: Tensor, teacher_temp: float, update_centers: bool = True) -> Tensor:
        """Targets by the centre of the batches before this one."""
        if self.waiting is not None and update_centers:
            self.center = self.center_momentum * self.center + (1 - self.center_momentum) * self.waiting
            self.waiting = None
        return ((teacher - self.center) / teacher_temp).softmax(dim=-1)

    @torch.no_grad()
    def update_center(self, teacher: Tensor) -> None:
        """The mean over all rows waits."""
        self.waiting = teacher.flatten(0, -2).mean(dim=0).reshape(self.center.shape)

    def log_probabilities(self, student: Tensor) -> Tensor:
        """Of raw logits."""
        return (student / self.student_temp).log_softmax(dim=-1)


class PublishedV2Loss(PublishedLazyCenter):
    """Sum over all pairs of entries, mean over rows. Source: facebookresearch/dinov2 dinov2/loss/dino_clstoken_loss.py."""

    def __init__(self, out_dim: int, student_temp: float = 0.1, center_momentum: float = 0.9) -> None:
        super().__init__((1, out_dim), student_temp, center_momentum)

    def sinkhorn_knopp_teacher(self, teacher_output: Tensor, teacher_temp: float, n_iterations: int = 3) -> Tensor:
        """Targets of one batch."""
        return published_sinkhorn_knopp(teacher_output / teacher_temp, n_iterations)

    def forward(
        self, student_output_list: Iterable[Tensor], teacher_out_softmaxed_centered_list: Iterable[Tensor]
    ) -> Tensor:
        """[] nats."""
        pairs = itertools.product(student_output_list, list(teacher_out_softmaxed_centered_list))
        return torch.stack([-(q * self.log_probabilities(s)).sum(dim=-1).mean() for s, q in pairs]).sum()


class PublishedV3Loss(PublishedV2Loss):
    """Mean over pairs and images. Source: facebookresearch/dinov3 dinov3/loss/dino_clstoken_loss.py."""

    def forward(  # type: ignore[override]
        self, student_logits: Tensor, teacher_probs: Tensor, ignore_diagonal: bool = False
    ) -> Tensor:
        """[S, B, K] and [T, B, K] to [] nats."""
        terms = [
            -(q * self.log_probabilities(student)).sum(dim=-1).mean()
            for (s, student), (t, q) in itertools.product(enumerate(student_logits), enumerate(teacher_probs))
            if not (ignore_diagonal and s == t)
        ]
        return torch.stack(terms).mean()


class PublishedPatchLoss(PublishedLazyCenter):
    """Mean over the masked patches of an image, then over images.

    Source: facebookresearch/dinov2 dinov2/loss/ibot_patch_loss.py, and the same file of facebookresearch/dinov3.
    """

    def __init__(self, patch_out_dim: int, student_temp: float = 0.1, center_momentum: float = 0.9) -> None:
        super().__init__((1, 1, patch_out_dim), student_temp, center_momentum)

    def sinkhorn_knopp_teacher(
        self, teacher_output: Tensor, teacher_temp: float, n_masked_patches_tensor: Tensor, n_iterations: int = 3
    ) -> Tensor:
        """Targets of one batch."""
        return published_sinkhorn_knopp(teacher_output / teacher_temp, n_iterations)

    def forward(self, student_patch_tokens: Tensor, teacher_patch_tokens: Tensor, student_masks_flat: Tensor) -> Tensor:
        """[C, N, K] of both, [C, N] masks, to [] nats."""
        loss_CN = -(teacher_patch_tokens * self.log_probabilities(student_patch_tokens)).sum(dim=-1)
        count_C = student_masks_flat.sum(dim=1).clamp(min=1)
        return ((loss_CN * student_masks_flat).sum(dim=1) / count_C).mean()

    def forward_masked(
        self,
        student_patch_tokens_masked: Tensor,
        teacher_patch_tokens_masked: Tensor,
        student_masks_flat: Tensor,
        n_masked_patches: int | None = None,
        masks_weight: Tensor | None = None,
    ) -> Tensor:
        """[M, K] of both to [] nats."""
        loss_M = -(teacher_patch_tokens_masked * self.log_probabilities(student_patch_tokens_masked)).sum(dim=-1)
        if masks_weight is None:
            image_M = student_masks_flat.nonzero()[:, 0]
            masks_weight = 1 / student_masks_flat.sum(dim=1).double()[image_M]
        total: Tensor = (loss_M[:n_masked_patches] * masks_weight).sum()
        return total / student_masks_flat.shape[0]


class PublishedKoLeoLoss(nn.Module):
    """Over the rows of one process, ``topk`` neighbours each. Source: Sablayrolles et al., ICLR 2019, section 3.2."""

    def __init__(self, topk: int = 1) -> None:
        super().__init__()
        self.topk = topk

    def forward(self, student_output: Tensor, eps: float = 1e-8) -> Tensor:
        """[B, D] to [] nats."""
        rows = functional.normalize(student_output, dim=-1, p=2, eps=eps)
        similarity = (rows @ rows.T).detach().fill_diagonal_(-1)
        neighbours = rows[similarity.topk(self.topk, dim=1).indices]
        distance = (rows[:, None] - neighbours + eps).norm(dim=-1)
        loss: Tensor = -(distance + eps).log().mean()
        return loss


@torch.no_grad()
def mean_over_ranks_of_means(ranks: list[Tensor]) -> Tensor:
    """[K] the patches' batch centre of ranks with [M, K] masked patches each, which may be 0 on some."""
    return torch.stack([rows.mean(dim=0) for rows in ranks if rows.shape[0]]).mean(dim=0)
