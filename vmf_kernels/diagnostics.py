"""Duplicates among prototypes: how many a head really has (partial prototype collapse).

Legend: K prototypes, D embedding dim, M representatives, C prototypes of a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from vmf_kernels.prototypes import accumulation_dtype

METRICS = ("cosine", "euclidean")
BLOCK = (
    1024  # prototypes compared at once: [1024, 65536] fp32 similarities are 256 MiB at worst, when none is a duplicate
)


@dataclass(frozen=True, eq=False)
class UniquePrototypes:
    """Groups of prototypes that lie within the threshold of their group's first member."""

    count: int  # groups
    largest_share: float  # of all prototypes, in the largest group; 1 / K when none is a duplicate
    group: Tensor  # [K] int64, the group of each prototype


@torch.no_grad()
def unique_prototypes(weight: Tensor, threshold: float = 0.025, *, metric: str = "cosine") -> UniquePrototypes:
    """Count prototypes that differ in direction, greedily: each joins the first earlier representative within reach.

    Args:
        weight: [K, D] prototypes, floating point; only directions count, zero rows form one group.
        threshold: largest distance within a group; cosine distance ``1 - <mu_i, mu_j>`` or euclidean ``||mu_i - mu_j||``.
        metric: "cosine" or "euclidean".

    Raises:
        ValueError: ``weight`` is not a matrix of at least one row, the metric is unknown or the threshold negative.
    Source: Govindarajan et al., "On partial prototype collapse in the DINO family of self-supervised methods", BMVC 2024
        (arXiv:2410.14060); 0.025 is the threshold of later tables, the metric and the greedy rule a reconstruction.
    """
    if metric not in METRICS:
        raise ValueError(f"metric is {metric!r}; expected one of {', '.join(METRICS)}")
    if weight.isnan().any():
        raise ValueError(f"weight contains {int(weight.isnan().sum())} NaN; expected finite prototypes")
    if weight.ndim != 2 or not weight.shape[0] or not weight.is_floating_point() or not threshold >= 0:
        raise ValueError(
            f"weight is {weight.dtype} of shape {tuple(weight.shape)} and threshold {threshold}; expected a "
            "floating-point matrix [K, D] with K >= 1 and a threshold >= 0"
        )
    # ||a - b||^2 = 2 - 2 <a, b> for unit vectors: one similarity serves both metrics
    least = 1 - (threshold if metric == "cosine" else threshold**2 / 2)
    directions = functional.normalize(weight.to(accumulation_dtype(weight.dtype)), dim=1)
    has_direction = directions.any(dim=1)
    with torch.autocast(weight.device.type, enabled=False):  # similarities near 1 need their fp32 digits
        groups = _greedy_groups(directions[has_direction], least)
    group = groups.new_full((weight.shape[0],), int(groups.max()) + 1 if len(groups) else 0)  # of the zero rows
    group[has_direction] = groups
    sizes = group.bincount()
    return UniquePrototypes(len(sizes), sizes.max().item() / weight.shape[0], group)


def _greedy_groups(directions_KD: Tensor, least: float) -> Tensor:
    """[K] groups of unit rows, block by block."""
    groups, representatives = [], directions_KD[:0]
    for block_CD in torch.split(directions_KD, BLOCK):
        group_C, representatives = _join(block_CD, representatives, least)
        groups.append(group_C)
    return torch.cat(groups)


def _join(block_CD: Tensor, representatives_MD: Tensor, least: float) -> tuple[Tensor, Tensor]:
    """Groups of a block's prototypes, and the representatives with the new ones appended."""
    group_C = torch.full((block_CD.shape[0],), -1, dtype=torch.int64, device=block_CD.device)
    if representatives_MD.shape[0]:
        near_CM = block_CD @ representatives_MD.T >= least
        found = near_CM.any(dim=1)
        # argmax of a boolean finds the first true
        group_C[found] = near_CM[found].int().argmax(dim=1)
    near_CC = block_CD @ block_CD.T >= least
    new: list[int] = []
    for row in range(block_CD.shape[0]):
        if group_C[row] < 0:
            near = near_CC[row] & (group_C < 0)
            near[row] = True  # rounding may put a prototype just out of reach of itself
            group_C[near] = representatives_MD.shape[0] + len(new)
            new.append(row)
    return group_C, torch.cat([representatives_MD, block_CD[new]])
