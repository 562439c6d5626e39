"""Duplicates among prototypes: how many unique ones a head has (partial prototype collapse).

Legend: K prototypes, D embedding dim, C prototypes of a block, M representatives of one, N members of the largest group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from vmf_kernels.prototypes import Prototypes, accumulation_dtype, refuse_freed
from vmf_kernels.tensors import no_autocast

METRICS = ("cosine", "euclidean")
BLOCK = 1024  # prototypes a side of a tile of similarities: 4 MiB of fp32, stays in L2/L3


@dataclass(frozen=True, eq=False)
class UniquePrototypes:
    """Groups of prototypes that lie within eps of their group's first member.

    Example:
        >>> found = unique_prototypes(torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0], [0.0, 3.0]]))
        >>> found.count, found.largest_share, found.group.tolist(), found.largest.tolist()
        (2, 0.5, [0, 1, 0, 1], [0, 2])
    """

    count: int  # groups
    largest_share: float  # share of all prototypes that are in the largest group; 1 / K if there are no duplicates
    group: Tensor  # [K] int64, the group of each prototype

    @property
    def largest(self) -> Tensor:
        """[N] int64, ascending: the prototypes of the largest group, or of the first one among equally large groups."""
        return (self.group == self.group.bincount().argmax()).nonzero().flatten()


@torch.no_grad()
def unique_prototypes(weight: Prototypes | Tensor, eps: float = 0.025, metric: str = "cosine") -> UniquePrototypes:
    """Count prototypes of different direction, greedily: each joins the first earlier representative within ``eps``.

    Only directions [K, D] in fp32 (fp64 for fp64 prototypes) and tiles of similarities are in memory. On a GPU, the products
    follow ``torch.set_float32_matmul_precision``: with less than "highest" they are off by up to 1e-3.

    Args:
        weight: K prototypes, or a floating-point matrix [K, D]. Only directions matter; rows of zeros form one group.
        eps: largest distance within a group; cosine distance ``1 - <mu_i, mu_j>`` or euclidean ``||mu_i - mu_j||``.
        metric: "cosine" or "euclidean".

    Raises:
        ValueError: ``weight`` is not a matrix of at least one row, the metric is unknown or eps negative.
        RuntimeError: the memory of ``weight`` has been freed.
    Source: Govindarajan et al., "On partial prototype collapse in the DINO family of self-supervised methods", BMVC 2024
        (arXiv:2410.14060). 0.025 is the eps of later tables; the metric and the greedy rule are reconstructed.

    Example:
        >>> weight = torch.randn(100, 64)
        >>> unique_prototypes(weight).count, unique_prototypes(torch.cat([weight, 2 * weight])).count
        (100, 100)
    """
    if metric not in METRICS:
        raise ValueError(f"metric is {metric!r}; expected one of {', '.join(METRICS)}")
    if isinstance(weight, Prototypes):
        weight = weight.effective_weight()
    if not isinstance(weight, Tensor):
        raise ValueError(f"weight is a {type(weight).__name__}; expected Prototypes, or a matrix [K, D]")
    refuse_freed(weight)
    if weight.isnan().any():
        raise ValueError(f"weight contains {int(weight.isnan().sum())} NaN; expected finite prototypes")
    if weight.ndim != 2 or not weight.shape[0] or not weight.is_floating_point() or not eps >= 0:
        raise ValueError(
            f"weight is {weight.dtype} of shape {tuple(weight.shape)} and eps {eps}; expected a "
            "floating-point matrix [K, D] with K >= 1 and an eps >= 0"
        )
    # ||a - b||^2 = 2 - 2 <a, b> for unit vectors: one similarity serves both metrics
    least = 1 - (eps if metric == "cosine" else eps**2 / 2)
    wide = weight.to(accumulation_dtype(weight.dtype))
    # by the largest element first: squares of small or large ones leave the range of the dtype
    directions = functional.normalize(
        wide / wide.abs().amax(dim=1, keepdim=True).masked_fill_(~wide.any(dim=1)[:, None], 1.0)
    )
    has_direction = directions.any(dim=1)
    if not has_direction.all():
        directions = directions[has_direction]
    with no_autocast(weight.device):  # similarities near 1 need their fp32 digits
        groups = _greedy_groups(directions, least)
    group = groups.new_full((weight.shape[0],), int(groups.max()) + 1 if len(groups) else 0)  # of the zero rows
    group[has_direction] = groups
    sizes = group.bincount()
    return UniquePrototypes(len(sizes), sizes.max().item() / weight.shape[0], group)


def _greedy_groups(directions_KD: Tensor, least: float) -> Tensor:
    """[K] groups of unit rows, block by block; overwrites the rows."""
    groups, count = [], 0
    for block_CD in torch.split(directions_KD, BLOCK):
        group_C = _first_within_reach(block_CD, directions_KD[:count], least)
        new = _found_groups(block_CD, group_C, count, least)
        # representatives move to the front; there are never more of them than rows already visited
        directions_KD[count : count + len(new)] = block_CD[new]
        count += len(new)
        groups.append(group_C)
    return torch.cat(groups)


def _first_within_reach(block_CD: Tensor, representatives_MD: Tensor, least: float) -> Tensor:
    """[C] int64: the first representative within reach of each prototype, or -1."""
    group_C = torch.full((block_CD.shape[0],), -1, dtype=torch.int64, device=block_CD.device)
    for start in range(0, representatives_MD.shape[0], BLOCK):
        similarity_CM = block_CD @ representatives_MD[start : start + BLOCK].T
        # a maximum is cheap; the first one has to be found only in rows whose maximum is large enough
        found = ((similarity_CM.amax(dim=1) >= least) & (group_C < 0)).nonzero().flatten()
        # argmax of a boolean finds the first true
        group_C[found] = (similarity_CM[found] >= least).int().argmax(dim=1) + start
    return group_C


def _found_groups(block_CD: Tensor, group_C: Tensor, first: int, least: float) -> list[int]:
    """Assign prototypes without a group to new groups, numbered from ``first``, in place; returns the representatives."""
    near_CC = block_CD @ block_CD.T >= least
    new: list[int] = []
    for row in range(block_CD.shape[0]):
        if group_C[row] < 0:
            near = near_CC[row] & (group_C < 0)
            near[row] = True  # rounding may put a prototype just out of reach of itself
            group_C[near] = first + len(new)
            new.append(row)
    return new
