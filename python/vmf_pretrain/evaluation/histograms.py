"""Numbers whose spread over directions or prototypes tells more than a mean, small enough to be logged at every evaluation.

Legend: N images, F feature dim, K prototypes.
"""

import math
from typing import Any

import torch
from torch import Tensor

BINS = 32
MOST_VALUES = 128  # singular values that are kept, of large F
LOWEST_USAGE = 1e-4  # of uniform; below it a prototype is dead, whatever the exact number
LOWEST_RATIO = 1e-8  # of the largest singular value: below it a root of an fp64 eigenvalue is rounding
NARROWEST = 1.01  # ratio of a histogram's ends: values that are all the same have bins too


def singular_values(features: Tensor) -> dict[str, list[float]]:
    """Singular values of features as they are, as shares of the largest, with their ranks from 1.

    Args:
        features: [N, F], finite.

    Returns:
        ``ranks``, all up to F or MOST_VALUES of them at even ratios, and ``values`` in [0, 1], descending.
    """
    rows = features.double()
    # those of the small matrix: as svdvals, in less time
    squares = torch.linalg.eigvalsh(rows.T @ rows).flip(0)[: min(features.shape)].clamp(min=0.0)
    largest = squares[0].clamp(min=torch.finfo(squares.dtype).tiny)
    shares = (squares / largest).sqrt()
    shares[shares < LOWEST_RATIO] = 0.0
    spaced = torch.logspace(0, math.log10(len(shares)), MOST_VALUES, dtype=torch.float64)
    ranks = range(1, len(shares) + 1) if len(shares) <= MOST_VALUES else sorted({round(one) for one in spaced.tolist()})
    return {"ranks": list(ranks), "values": [_short(shares[rank - 1]) for rank in ranks]}


def usage_histogram(usage: Tensor) -> dict[str, Any]:
    """Histogram of [K] mean probabilities times K, from LOWEST_USAGE up; ``below`` counts those under it, in no bin."""
    relative = usage.double() * len(usage)
    alive = relative[relative >= LOWEST_USAGE]
    return {**histogram(alive), "below": len(relative) - len(alive)}


def histogram(values: Tensor) -> dict[str, Any]:
    """BINS counts from ``low`` to ``high`` at even ratios, and the ``median``, of those values that are positive and finite."""
    values = values[values.isfinite() & (values > 0)]
    if not len(values):
        return {"low": None, "high": None, "median": None, "counts": []}
    logs = values.double().log()
    low, high = float(logs.min()), float(logs.max())
    if high - low < math.log(NARROWEST):
        middle = (low + high) / 2
        low, high = middle - math.log(NARROWEST) / 2, middle + math.log(NARROWEST) / 2
    places = ((logs - low) / (high - low) * BINS).long().clamp(0, BINS - 1)
    counts = torch.bincount(places, minlength=BINS)
    return {
        "low": _short(math.exp(low)),
        "high": _short(math.exp(high)),
        "median": _short(values.double().median()),
        "counts": counts.tolist(),
    }


def _short(value: float | Tensor) -> float:
    """Five digits: more than a picture shows."""
    return float(f"{float(value):.5g}")
