"""KoLeo: spreads the features of a batch by their nearest-neighbour distances.

Legend: B images of a rank, C crops, N images of all ranks, D embedding dim.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import functional

from vmf_kernels.prototypes import accumulation_dtype
from vmf_kernels.ranks import gather_counts, gather_rows
from vmf_kernels.tensors import no_autocast

NO_MATRIX = -1  # the number of rows of something that is not a matrix


class KoLeoLoss(nn.Module):
    """Kozachenko-Leonenko regulariser: ``-mean_i log(min_{j != i} ||x_i - x_j|| + eps)`` over L2-normalised rows.

    It is meant for the student's class tokens before the head. It is computed in fp32 (fp64 for fp64 features), also under
    autocast: in fp16, eps rounds to 0, and two equal images would give infinity. The gradient of fp16 features is clamped to
    the range of fp16, which three equal rows would exceed. Neighbours are taken from this rank's rows, by their products as
    published: a row of zeros is to the others as far as an orthogonal one. On a GPU products follow
    ``torch.set_float32_matmul_precision``; with less than "highest", close neighbours are distinguished less well.

    Args:
        eps: added to the distance and to its components, > 0.
        topk: nearest neighbours of a row, over which the logarithm is averaged, >= 1.
        crops: crops C whose losses are summed, >= 1. Rows are view-major; two crops of an image are never neighbours.

    Raises:
        ValueError: ``eps`` is not positive, or ``topk`` or ``crops`` below 1.
    Source: Sablayrolles et al., "Spreading vectors for similarity search", ICLR 2019, section 3.2; top-k:
        facebookresearch/dinov3 dinov3/loss/koleo_loss.py; sum over crops: facebookresearch/dinov2.

    Example:
        >>> round(KoLeoLoss()(torch.eye(4)).item(), 2)  # every nearest neighbour is sqrt(2) away: -log(2) / 2
        -0.35
    """

    _whose = "rows"

    def __init__(self, eps: float = 1e-8, *, topk: int = 1, crops: int = 1) -> None:
        super().__init__()
        self.eps, self.topk, self.crops = checked_eps(eps), topk, crops
        for name, count in (("topk", topk), ("crops", crops)):
            if count < 1:
                raise ValueError(f"{name} is {count}; expected an int >= 1")

    def forward(self, features: Tensor) -> Tensor:
        """[C * B, D] features to a [] loss, nats.

        Raises:
            ValueError: ``features`` is not such a matrix, or a crop has too few rows (at most ``topk``).
        """
        counts = self._counts(features.shape[0] if features.ndim == 2 else NO_MATRIX, features.device)
        self._check(features, counts)
        with no_autocast(features.device):
            rows_RD = functional.normalize(_widened(features), dim=-1, eps=self.eps)
            rows_BCD = rows_RD.reshape(self.crops, rows_RD.shape[0] // self.crops, rows_RD.shape[1]).transpose(0, 1)
            among_NCD, start = self._candidates(rows_BCD, [count // self.crops for count in counts])
            losses = [self._of_crop(rows_BCD[:, c], among_NCD[:, c], start) for c in range(self.crops)]
            return torch.stack(losses).sum()

    def _counts(self, rows: int, device: torch.device) -> list[int]:
        """Number of rows of each rank that can have neighbours, ``NO_MATRIX`` if its features are not a matrix."""
        return [rows]

    def _check(self, features: Tensor, counts: list[int]) -> None:
        """Raise ValueError unless all ranks' rows fit. It depends on ``counts`` only, so all ranks raise or none does."""
        wrong = any(count == NO_MATRIX or count % self.crops for count in counts)
        if wrong or sum(counts) // self.crops <= self.topk:
            rows = "B" if self.crops == 1 else f"{self.crops} * B"
            others = "" if len(counts) == 1 else f" and the ranks {counts} rows"
            raise ValueError(
                f"features have shape {tuple(features.shape)}{others}; expected [{rows}, D] with B >= {self.topk + 1} "
                f"{self._whose}"
            )

    def _candidates(self, rows_BCD: Tensor, counts: list[int]) -> tuple[Tensor, int]:
        """[N, C, D] candidates for neighbours, and where ``rows_BCD`` begin among them; ``counts`` are the ranks' B."""
        return rows_BCD, 0

    def _of_crop(self, rows_BD: Tensor, among_ND: Tensor, start: int) -> Tensor:
        if not rows_BD.shape[0]:
            return among_ND[:0].sum()  # 0, but with the gather in its graph: other ranks wait for its backward pass
        with torch.no_grad():
            similarity_BN = rows_BD @ among_ND.T
            similarity_BN.diagonal(start).fill_(-torch.inf)
            # among equally near neighbours argmax takes the first, topk any
            one = self.topk == 1
            nearest = similarity_BN.argmax(1, keepdim=True) if one else similarity_BN.topk(self.topk).indices
        # eps inside the norm too, whose derivative at distance 0 is undefined
        distance = functional.pairwise_distance(rows_BD[:, None], among_ND[nearest], p=2, eps=self.eps)
        return -(distance + self.eps).log().mean()


class DistributedKoLeoLoss(KoLeoLoss):
    """``KoLeoLoss`` with neighbours from the rows of all ranks of a group, separately for each crop.

    Each rank returns the mean over its own rows, as DDP expects. If all ranks have equally many rows, the average over ranks
    is the loss of all rows in one process, and likewise the gradients; otherwise weight each rank's loss by its share of the
    rows. Gradients flow to the neighbours on other ranks. A rank may have 0 rows; its loss is 0. The backward pass must run on
    every rank: features must require a gradient on all ranks or on none. With one rank, or without a process group, it equals
    ``KoLeoLoss``.

    Args:
        eps, topk, crops: as for ``KoLeoLoss``.
        group: ranks whose rows are candidates for neighbours; None means all ranks.

    Raises:
        ValueError: as ``KoLeoLoss``, but rows are counted over all ranks; if one rank's rows do not fit, all ranks raise.
        RuntimeError: a second derivative is computed on more than one rank.
    Source: facebookresearch/dinov3 dinov3/loss/koleo_loss.py (its groups of ranks are ``group`` here).

    Example:
        >>> features = torch.randn(6, 4)
        >>> torch.equal(DistributedKoLeoLoss()(features), KoLeoLoss()(features))  # one rank
        True
    """

    _whose = "rows over all ranks"

    def __init__(self, eps: float = 1e-8, *, topk: int = 1, crops: int = 1, group: ProcessGroup | None = None) -> None:
        super().__init__(eps, topk=topk, crops=crops)
        self.group = group

    def _counts(self, rows: int, device: torch.device) -> list[int]:
        return gather_counts(rows, device, self.group)

    def _candidates(self, rows_BCD: Tensor, counts: list[int]) -> tuple[Tensor, int]:
        return gather_rows(rows_BCD, self.group, counts)


def _widened(features: Tensor) -> Tensor:
    """``features`` in the dtype of the sums; their gradient is clamped to the range of their own dtype."""
    dtype = features.dtype
    wide = features.to(accumulation_dtype(dtype))
    if dtype == torch.float16 and wide.requires_grad:
        wide.register_hook(lambda gradient: in_range(gradient, dtype))
    return wide


def in_range(gradient: Tensor, dtype: torch.dtype) -> Tensor:
    """``gradient``, clamped to the range of fp16 for fp16: three equal rows have a gradient of order 1 / eps."""
    most = torch.finfo(dtype).max
    return gradient.clamp(-most, most) if dtype == torch.float16 else gradient


def checked_eps(eps: float) -> float:
    """The value itself; raises ValueError unless it is positive."""
    if not eps > 0:
        raise ValueError(f"eps is {eps}; expected a number > 0")
    return eps
