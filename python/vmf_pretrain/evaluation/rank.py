"""Effective rank of features.

Legend: N rows, F feature dim.
"""

import torch
from torch import Tensor


def rankme(features: Tensor) -> float:
    """Effective rank of features: exp of the entropy of the singular values divided by their sum.

    Args:
        features: [N, F] floating point, as they are (not centred).

    Returns:
        Between 1 and min(N, F), in dimensions; 0 if every feature is 0.

    Raises:
        ValueError: ``features`` is not a matrix with at least one row.
    Source: Garrido et al., "RankMe", ICML 2023, equation 1, without its epsilon inside the logarithm.
    """
    if features.ndim != 2 or not features.shape[0]:
        raise ValueError(f"features have shape {tuple(features.shape)}; expected [N, F] with N >= 1")
    singular = torch.linalg.svdvals(features.double())
    total = singular.sum()
    if total == 0:
        return 0.0
    return float(entropy(singular / total).exp())


def entropy(probabilities: Tensor) -> Tensor:
    """[] Shannon entropy, nats; 0 log 0 = 0."""
    return -torch.xlogy(probabilities, probabilities).sum()
