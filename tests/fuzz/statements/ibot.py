"""iBOT's published head and loss on stored logits, written out from their formulas: what tests compare with.

Nothing of the library is used. Every patch has its softmax on both sides, masked or not, as there.

Legend: G global crops, L local crops, B images, N patches, K prototypes, D bottleneck dim.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.fuzz.statements.centers import log_mean_probability
from tests.fuzz.statements.dino import PublishedWeightNorm, exact_log_vmf_constant

Pair = tuple[Tensor, Tensor]


class TokenBatchNorm(nn.BatchNorm1d):
    """BatchNorm of [..., C] over all tokens."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(-1, 1)).movedim(1, -1)


NORMS = {"bn": TokenBatchNorm, "ln": nn.LayerNorm}
ACTIVATIONS = {"gelu": nn.GELU, "relu": nn.ReLU}


class PublishedIBOTHead(nn.Module):
    """MLP over all tokens, L2-normalised bottleneck, one weight-normed layer for class tokens and one for patches.

    Source: Zhou et al., "iBOT: image BERT pre-training with online tokenizer", ICLR 2022, section 3.2; repository
    bytedance/ibot, models/head.py.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        *,
        patch_out_dim: int = 8192,
        norm: str | None = None,
        act: str = "gelu",
        last_norm: str | None = None,
        nlayers: int = 3,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        norm_last_layer: bool = True,
        shared_head: bool = False,
    ) -> None:
        super().__init__()
        assert last_norm is None
        between: list[nn.Module] = [] if norm is None else [NORMS[norm](hidden_dim)]  # one for all layers
        between.append(ACTIVATIONS[act]())
        layers: list[nn.Module] = []
        for width in ([in_dim] + [hidden_dim] * (nlayers - 2))[: nlayers - 1]:
            layers += [nn.Linear(width, hidden_dim), *between]
        last = nn.Linear(hidden_dim if layers else in_dim, bottleneck_dim)
        self.mlp = nn.Sequential(*layers, last) if layers else last
        for module in self.mlp.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.constant_(module.bias, 0)
        self.last_layer = PublishedWeightNorm(bottleneck_dim, out_dim, frozen_norm=norm_last_layer)
        self.last_layer2 = (
            self.last_layer
            if shared_head
            else PublishedWeightNorm(bottleneck_dim, patch_out_dim, frozen_norm=norm_last_layer)
        )

    def forward(self, x: Tensor) -> Tensor | Pair:
        """[B, 1 + N, C] tokens to stored logits of the first and of the rest; [B, C] to those of class tokens."""
        features = functional.normalize(self.mlp(x), dim=-1, p=2)
        if x.ndim == 2:
            return self.last_layer(features)  # type: ignore[no-any-return]
        return self.last_layer(features[:, 0]), self.last_layer2(features[:, 1:])


class PublishedIBOTLoss(nn.Module):
    """Class tokens over all pairs of different crops, patches over pairs of the same crop; both centres moved after use.

    Source: Zhou et al., ICLR 2022, section 3 and algorithm 1; repository bytedance/ibot, main_ibot.py.
    """

    center: Tensor
    center2: Tensor

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
    ) -> None:
        super().__init__()
        self.student_temp = student_temp
        self.center_momentum, self.center_momentum2 = center_momentum, center_momentum2
        self.ngcrops, self.ncrops = ngcrops, ngcrops + nlcrops
        self.lambda1, self.lambda2 = lambda1, lambda2
        self.register_buffer("center", torch.zeros(1, out_dim))
        self.register_buffer("center2", torch.zeros(1, 1, patch_out_dim))
        warm_up = warmup_teacher_temp_epochs, nepochs
        self.teacher_temps = _schedule(warmup_teacher_temp, teacher_temp, *warm_up, 0)
        self.teacher_temps2 = _schedule(warmup_teacher_temp2, teacher_temp2, *warm_up, mim_start_epoch)

    def forward(
        self,
        student_output: Pair,
        teacher_output: Pair,
        student_local_cls: Tensor | None,
        student_mask: list[Tensor],
        epoch: int,
    ) -> dict[str, Tensor]:
        """([G * B, K], [G * B, N, K]) of both networks, [L * B, K] or None, G masks [B, H, W], to losses in nats."""
        student_cls, student_patch = student_output
        if student_local_cls is not None:
            student_cls = torch.cat([student_cls, student_local_cls])
        teacher_cls, teacher_patch = (logits.detach() for logits in teacher_output)
        q_cls = self.cls_targets(teacher_cls, self.teacher_temps[epoch]).chunk(self.ngcrops)
        q_patch = self.patch_targets(teacher_patch, self.teacher_temps2[epoch]).chunk(self.ngcrops)
        p_cls = self.student_logits(student_cls, 0).log_softmax(dim=-1).chunk(self.ncrops)
        p_patch = self.student_logits(student_patch, 1).log_softmax(dim=-1).chunk(self.ngcrops)
        terms = [-(q * p).sum(dim=-1).mean() for i, q in enumerate(q_cls) for v, p in enumerate(p_cls) if v != i]
        patch_terms = [
            self.mean_of_masked(-(q * p).sum(dim=-1), mask.flatten(1).to(p.dtype))
            for q, p, mask in zip(q_patch, p_patch, student_mask[: self.ngcrops], strict=True)
        ]
        cls = self.lambda1 * torch.stack(terms).mean()
        patch = self.lambda2 * torch.stack(patch_terms).mean()
        self.move_centers(teacher_cls, teacher_patch, epoch)
        return {"cls": cls, "patch": patch, "loss": cls + patch}

    def mean_of_masked(self, loss_BN: Tensor, mask_BN: Tensor) -> Tensor:
        """Mean over each image's masked patches, 0 where it has none; then over all images."""
        return ((loss_BN * mask_BN).sum(dim=1) / mask_BN.sum(dim=1).clamp(min=1)).mean()

    def student_logits(self, logits: Tensor, stream: int) -> Tensor:
        """Over temperature; stream 0 is class tokens, 1 patches."""
        return logits / self.student_temp

    def cls_targets(self, logits: Tensor, temperature: float) -> Tensor:
        return ((logits - self.center) / temperature).softmax(dim=-1)

    def patch_targets(self, logits: Tensor, temperature: float) -> Tensor:
        return ((logits - self.center2) / temperature).softmax(dim=-1)

    @torch.no_grad()
    def move_centers(self, teacher_cls: Tensor, teacher_patch: Tensor, epoch: int) -> None:
        """One step of both running means, the second over all patches."""
        cls, patch = teacher_cls.mean(dim=0, keepdim=True), teacher_patch.mean(dim=(0, 1), keepdim=True)
        self.center = self.center * self.center_momentum + cls * (1 - self.center_momentum)
        self.center2 = self.center2 * self.center_momentum2 + patch * (1 - self.center_momentum2)


class PublishedIBOTvMFLoss(PublishedIBOTLoss):
    """The same with ``log C_D(||w_k|| / tau)`` of each network and stream, and the log of mean probabilities as centres.

    ``set_norms`` comes before each call.

    Source: Govindarajan et al., "DINO as a von Mises-Fisher mixture model", ICLR 2023 (arXiv:2405.10939).
    """

    def set_norms(self, student: Pair, teacher: Pair, dim: int) -> None:
        """[K] norms of the prototypes of both streams, the student's differentiable."""
        self.student_norms, self.teacher_norms, self.dim = student, [norms.detach() for norms in teacher], dim

    def student_logits(self, logits: Tensor, stream: int) -> Tensor:
        return logits / self.student_temp + self.normalizer(self.student_norms[stream], self.student_temp)

    def cls_targets(self, logits: Tensor, temperature: float) -> Tensor:
        return (self.uncentered(logits, 0, temperature) - self.center).softmax(dim=-1)

    def patch_targets(self, logits: Tensor, temperature: float) -> Tensor:
        return (self.uncentered(logits, 1, temperature) - self.center2).softmax(dim=-1)

    def uncentered(self, logits: Tensor, stream: int, temperature: float) -> Tensor:
        return logits / temperature + self.normalizer(self.teacher_norms[stream], temperature)

    def normalizer(self, norms: Tensor, temperature: float) -> Tensor:
        """[K] nats to add to the logits over temperature."""
        return exact_log_vmf_constant(norms / temperature, self.dim)

    @torch.no_grad()
    def move_centers(self, teacher_cls: Tensor, teacher_patch: Tensor, epoch: int) -> None:
        cls = log_mean_probability(self.uncentered(teacher_cls, 0, self.teacher_temps[epoch]))
        patch = log_mean_probability(self.uncentered(teacher_patch.flatten(0, 1), 1, self.teacher_temps2[epoch]))[None]
        self.center = self.center * self.center_momentum + cls * (1 - self.center_momentum)
        self.center2 = self.center2 * self.center_momentum2 + patch * (1 - self.center_momentum2)


def _schedule(warmup: float, final: float, warmup_epochs: int, epochs: int, first: int) -> list[float]:
    """Constant up to ``first``, linear over the warm-up, whose last epoch has the final value, then constant."""
    steps = max(warmup_epochs - 1, 1)
    linear = [warmup + (final - warmup) * epoch / steps for epoch in range(warmup_epochs)]
    return [warmup] * first + linear + [final] * (epochs - first - warmup_epochs)
