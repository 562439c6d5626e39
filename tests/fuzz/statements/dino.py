"""The published head and losses on stored logits, written out from their formulas: what tests and benchmarks compare with.

Nothing of the library is used. Costs what the published code costs: every [rows, K] tensor is stored, and each pair of
views has its own log-softmax.

Legend: B images, V student crops, K prototypes, D bottleneck dim.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.fuzz.statements.centers import log_mean_probability
from tests.fuzz.statements.vmf import LogNormalizer
from vmf_bench.published import mean_over_pairs


class PublishedWeightNorm(nn.Module):
    """Linear layer without bias under weight norm: ``logit_k(x) = <g_k v_k / ||v_k||, x>``."""

    def __init__(self, dim: int, prototypes: int, *, frozen_norm: bool) -> None:
        super().__init__()
        direction = nn.Linear(dim, prototypes, bias=False).weight
        self.weight_g = nn.Parameter(torch.ones(prototypes, 1), requires_grad=not frozen_norm)
        self.weight_v = nn.Parameter(direction.detach().clone())

    def forward(self, features: Tensor) -> Tensor:
        """[R, D] features to stored [R, K] logits."""
        return functional.linear(features, torch._weight_norm(self.weight_v, self.weight_g, 0))


class PublishedDINOHead(nn.Module):
    """MLP with GELU, L2-normalised bottleneck, weight-normed prototypes.

    Source: Caron et al., "Emerging properties in self-supervised vision transformers", ICCV 2021, section 3.2.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        use_bn: bool = False,
        norm_last_layer: bool = True,
        nlayers: int = 3,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
    ) -> None:
        super().__init__()
        if nlayers <= 1:
            self.mlp: nn.Module = nn.Linear(in_dim, bottleneck_dim)
        else:
            layers: list[nn.Module] = []
            for width in [in_dim] + [hidden_dim] * (nlayers - 2):
                layers.append(nn.Linear(width, hidden_dim))
                layers += [nn.BatchNorm1d(hidden_dim), nn.GELU()] if use_bn else [nn.GELU()]
            self.mlp = nn.Sequential(*layers, nn.Linear(hidden_dim, bottleneck_dim))
        for module in self.mlp.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.constant_(module.bias, 0)
        self.last_layer = PublishedWeightNorm(bottleneck_dim, out_dim, frozen_norm=norm_last_layer)

    def forward(self, x: Tensor) -> Tensor:
        """[R, in_dim] features to stored [R, K] logits."""
        logits: Tensor = self.last_layer(functional.normalize(self.mlp(x), dim=-1, p=2))
        return logits


class PublishedDINOLoss(nn.Module):
    """Cross-entropy over the pairs of different views, with the centre moved after use.

    Source: Caron et al., ICCV 2021, algorithm 1.
    """

    center: Tensor

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
    ) -> None:
        super().__init__()
        self.student_temp = student_temp
        self.center_momentum = center_momentum
        self.ncrops = ncrops
        self.register_buffer("center", torch.zeros(1, out_dim))
        last = max(warmup_teacher_temp_epochs - 1, 1)
        warm_up = [
            warmup_teacher_temp + (teacher_temp - warmup_teacher_temp) * epoch / last
            for epoch in range(warmup_teacher_temp_epochs)
        ]
        self.teacher_temps = warm_up + [teacher_temp] * (nepochs - warmup_teacher_temp_epochs)

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, epoch: int) -> Tensor:
        """[V * B, K] and [2 * B, K] raw logits to a [] loss, nats."""
        targets = ((teacher_logits.detach() - self.center) / self.teacher_temps[epoch]).softmax(dim=-1)
        loss = mean_over_pairs(student_logits / self.student_temp, targets, self.ncrops)
        self.move_center(teacher_logits.detach().mean(dim=0, keepdim=True))
        return loss

    @torch.no_grad()
    def move_center(self, batch_center: Tensor) -> None:
        """One step of the running mean."""
        self.center = self.center * self.center_momentum + batch_center * (1 - self.center_momentum)


class PublishedDINOvMFLoss(PublishedDINOLoss):
    """The same with ``log C_D(||w_k|| / tau)`` of each network added to its logits over temperature.

    ``centering`` "probability" keeps the running mean of the log ("log_probability") or of the value ("probability") of the
    batch-mean probabilities of the uncentred teacher; its log is subtracted from the logits, undivided.

    Source: Govindarajan et al., "DINO as a von Mises-Fisher mixture model", ICLR 2023 (arXiv:2405.10939).
    """

    def __init__(
        self,
        *published: float,
        dim: int,
        centering: str = "probability",
        center_average: str = "log_probability",
    ) -> None:
        super().__init__(*published)  # type: ignore[arg-type]
        self.dim = dim
        self.centering = centering
        self.center_average = center_average
        if (centering, center_average) == ("probability", "probability"):
            self.center.fill_(-math.log(self.center.shape[1]))

    def forward(  # type: ignore[override]
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        epoch: int,
        student_norms: Tensor,
        teacher_norms: Tensor,
    ) -> Tensor:
        """As ``PublishedDINOLoss.forward``; the norms are [K], the student's differentiable."""
        teacher_logits, tau = teacher_logits.detach(), self.teacher_temps[epoch]
        student = student_logits / self.student_temp + self.normalizer(student_norms, self.student_temp)
        uncentered = teacher_logits / tau + self.normalizer(teacher_norms.detach(), tau)
        shift = self.center / tau if self.centering == "logit" else self.center
        loss = mean_over_pairs(student, (uncentered - shift).softmax(dim=-1), self.ncrops)
        self.move_center_by(teacher_logits, uncentered)
        return loss

    def normalizer(self, norms: Tensor, temperature: float) -> Tensor:
        """[K] nats to add to the logits over temperature."""
        return exact_log_vmf_constant(norms / temperature, self.dim)

    @torch.no_grad()
    def move_center_by(self, teacher_logits: Tensor, uncentered: Tensor) -> None:
        """One step of the running mean that the options select."""
        if self.centering == "logit":
            self.move_center(teacher_logits.mean(dim=0, keepdim=True))
            return
        log_mean = log_mean_probability(uncentered)
        if self.center_average == "log_probability":
            self.move_center(log_mean)
            return
        momentum = self.center_momentum
        self.center = (momentum * self.center.exp() + (1 - momentum) * log_mean.exp()).log()


def exact_log_vmf_constant(kappa: Tensor, dim: int) -> Tensor:
    """``log C_D(kappa) - log C_D(0)`` in the dtype of ``kappa``, computed in fp64."""
    value: Tensor = LogNormalizer.apply(kappa.double(), dim)  # type: ignore[no-untyped-call]
    return value.to(kappa.dtype)


@torch.no_grad()
def follow(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """The teacher's parameters as running means of the student's: ``g`` and ``v`` separately, buffers not at all."""
    for slow, fast in zip(teacher.parameters(), student.parameters(), strict=True):
        slow.mul_(momentum).add_(fast.detach(), alpha=1 - momentum)
