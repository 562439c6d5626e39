"""KoLeo of features and of prototypes, and the greedy count of prototypes, from all pairs of rows.

Legend: R rows, K prototypes, D embedding dim, C crops.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def neighbours(unit_RD: Tensor, topk: int = 1) -> Tensor:
    """[R, topk] the nearest other rows by direction: one without a direction is as far as an orthogonal one."""
    with torch.no_grad():
        distances = torch.cdist(unit_RD, unit_RD, compute_mode="donot_use_mm_for_euclid_dist")
        short = unit_RD.norm(dim=1) < 0.5
        distances = distances.masked_fill(short[:, None] | short, 2**0.5)
        nearest: Tensor = distances.fill_diagonal_(torch.inf).topk(topk, dim=1, largest=False).indices
        return nearest


def koleo(features_RD: Tensor, eps: float = 1e-8, topk: int = 1, crops: int = 1, p: float = 2.0) -> Tensor:
    """[] nats, summed over crops; eps inside and outside of the distance, which is one in the p-norm.

    Source: Sablayrolles et al., "Spreading vectors for similarity search", ICLR 2019, section 3.2.
    """
    losses = []
    for crop in features_RD.chunk(crops):
        unit = functional.normalize(crop, dim=1, eps=eps)
        gaps = unit[:, None] - unit[neighbours(unit, topk)]
        losses.append(-((gaps + eps).norm(p=p, dim=2) + eps).log().mean())
    return torch.stack(losses).sum()


def prototype_koleo(weight_KD: Tensor, eps: float = 1e-8) -> Tensor:
    """[] nats; eps outside of the distance only.

    Source: Govindarajan et al., "On partial prototype collapse in the DINO family of self-supervised methods", BMVC 2024.
    """
    unit = weight_KD / weight_KD.norm(dim=1, keepdim=True)
    loss: Tensor = -((unit - unit[neighbours(unit)[:, 0]]).norm(dim=1) + eps).log().mean()
    return loss


def greedy_groups(weight_KD: Tensor, eps: float, metric: str) -> list[int]:
    """Each prototype joins the first earlier representative within eps; zero rows join each other only."""
    representatives: list[Tensor] = []
    groups = []
    for w in weight_KD.double():
        mu = w / w.norm() if w.any() else w
        for group, other in enumerate(representatives):
            distance = 1 - mu @ other if metric == "cosine" else (mu - other).norm()
            if (mu.any() and other.any() and distance <= eps) or not (mu.any() or other.any()):
                groups.append(group)
                break
        else:
            groups.append(len(representatives))
            representatives.append(mu)
    return groups
