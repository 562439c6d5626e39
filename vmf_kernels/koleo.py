"""KoLeo: spread the features of a batch by their nearest-neighbour distances."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from vmf_kernels.prototypes import accumulation_dtype


class KoLeoLoss(nn.Module):
    """Kozachenko-Leonenko regulariser: ``-mean_i log(min_{j != i} ||x_i - x_j|| + eps)`` over L2-normalised rows.

    Meant for the student's class tokens before the head, once for each global crop. Formed in fp32 (fp64 for fp64 features)
    whatever autocast says: in fp16 eps rounds to 0 and two equal images give infinity.

    Args:
        eps: added to the distance and to its components, > 0.

    Raises:
        ValueError: ``eps`` is not positive.
    Source: Sablayrolles et al., "Spreading vectors for similarity search", ICLR 2019, section 3.2.
    """

    def __init__(self, eps: float = 1e-8) -> None:
        super().__init__()
        if not eps > 0:
            raise ValueError(f"eps is {eps}; expected a number > 0")
        self.eps = eps

    def forward(self, features: Tensor) -> Tensor:
        """[B, D] features to a [] loss, nats.

        Raises:
            ValueError: ``features`` is not a matrix, or has a single row, which has no neighbour.
        """
        if features.ndim != 2 or features.shape[0] < 2:
            raise ValueError(f"features have shape {tuple(features.shape)}; expected [B, D] with B >= 2 rows")
        with torch.autocast(device_type=features.device.type, enabled=False):
            rows = functional.normalize(features.to(accumulation_dtype(features.dtype)), dim=-1, eps=self.eps)
            with torch.no_grad():
                similarity = rows @ rows.T
                similarity.fill_diagonal_(-torch.inf)
                nearest = similarity.argmax(dim=1)
            # eps inside the norm as well: its slope at 0 distance is undefined
            distance = functional.pairwise_distance(rows, rows[nearest], p=2, eps=self.eps)
            return -(distance + self.eps).log().mean()
