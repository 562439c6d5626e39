"""How far the features of a batch are spread: what tells a collapse of the backbone from one of its head.

Legend: R rows of this rank, F features.
"""

import torch
from torch import Tensor

from vmf_pretrain.networks import ranks


@torch.no_grad()
def feature_numbers(features: Tensor) -> dict[str, Tensor]:
    """Rank and variance of a batch's features over all ranks; every rank must call it.

    ``feature_rank`` is the participation ratio of the covariance, the squared sum of its eigenvalues over the sum of their
    squares: between 1 and F, and 0 if all rows are the same. Unlike the entropy of singular values (RankMe) it needs a matrix
    product and no decomposition, for which the host would have to wait for a GPU.
    ``feature_variance`` is the share of the mean square that is not the mean's: between 0 (all rows are the same) and 1.

    Args:
        features: [R, F] floating point, on every rank as many.

    Returns:
        [] float32, dimensionless.
    """
    rows = features.detach().float()
    middle = ranks.averaged(rows.sum(dim=0) / len(rows))
    # before the product: the difference of two large second moments would lose the small eigenvalues
    centred = rows - middle
    covariance = ranks.averaged(centred.T @ centred / len(rows))
    variance, squares = covariance.trace(), covariance.square().sum()
    least = torch.finfo(torch.float32).tiny
    whole = variance + middle.square().sum()
    return {
        "feature_rank": variance.square() / squares.clamp(min=least),
        "feature_variance": variance / whole.clamp(min=least),
    }
