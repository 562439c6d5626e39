"""How well a ranking of the database answers queries: mean average precision, and precision among the first.

Legend: N images of the database, Q queries, F features, A cut-offs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from vmf_pretrain.evaluation.average_precision import trapezoid_average_precision
from vmf_pretrain.evaluation.retrieval.ground_truth import GroundTruth
from vmf_pretrain.evaluation.retrieval.levels import LEVELS, Level

CUT_OFFS = (1, 5, 10)  # as published
SIMILARITIES_AT_ONCE = 2**22  # 16 MiB of fp32, and twice 32 MiB of places


@dataclass(frozen=True, eq=False)
class LevelScores:
    """Scores of one level.

    Attributes:
        level: its name.
        average_precision: [Q] in [0, 1], NaN for a query without positives.
        precision: [Q, A] in [0, 1] among the first 1, 5 and 10, NaN likewise.
    """

    level: str
    average_precision: NDArray[np.float64]
    precision: NDArray[np.float64]

    def means(self) -> dict[str, float]:
        """mAP and mP@k in percent, over the queries with positives; NaN if there are none."""
        answered = ~np.isnan(self.average_precision)
        if not answered.any():
            return {name: float("nan") for name in ("map", *(f"mp@{k}" for k in CUT_OFFS))}
        precision = 100 * self.precision[answered].mean(axis=0)
        found = {f"mp@{k}": float(value) for k, value in zip(CUT_OFFS, precision, strict=True)}
        return {"map": float(100 * self.average_precision[answered].mean()), **found}


def retrieval_scores(
    queries: Tensor, database: Tensor, truth: GroundTruth, levels: Sequence[Level] = LEVELS
) -> list[LevelScores]:
    """Scores by cosine similarity; images of equal similarity stand in the order of the database.

    Args:
        queries: [Q, F] features, of any norm.
        database: [N, F] features.
        truth: Q queries to N images.
        levels: what counts.

    Raises:
        ValueError: the shapes do not fit.
    """
    expected = (len(truth.queries), len(truth.images))
    if (len(queries), len(database)) != expected or queries.shape[1:] != database.shape[1:]:
        raise ValueError(
            f"queries have shape {tuple(queries.shape)} and the database {tuple(database.shape)}; "
            f"expected [{expected[0]}, F] and [{expected[1]}, F]"
        )
    found = [LevelScores(level.name, *_unanswered(len(queries))) for level in levels]
    database_NF = functional.normalize(database.float(), dim=1)
    rows = max(1, SIMILARITIES_AT_ONCE // max(1, len(database)))
    for first in range(0, len(queries), rows):
        block = functional.normalize(queries[first : first + rows].float(), dim=1)
        order = (block @ database_NF.T).sort(dim=1, descending=True, stable=True).indices
        for row, places_N in enumerate(order.argsort(dim=1).numpy(), start=first):
            for level, scores in zip(levels, found, strict=True):
                _score(scores, row, places_N, level.positives(truth.queries[row]), level.junk(truth.queries[row]))
    return found


def _unanswered(queries: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    return np.full(queries, np.nan), np.full((queries, len(CUT_OFFS)), np.nan)


def _score(scores: LevelScores, row: int, places_N: NDArray[np.int64], positives: list[int], junk: list[int]) -> None:
    """Set the scores of one query, whose ranking has each image at its place."""
    ranks = ranks_without(places_N[positives], places_N[junk])
    if len(ranks):
        scores.average_precision[row] = trapezoid_average_precision(ranks, len(ranks))
        scores.precision[row] = [precision_among(ranks, k) for k in CUT_OFFS]


def ranks_without(positives: NDArray[np.int64], junk: NDArray[np.int64]) -> NDArray[np.int64]:
    """Ascending ranks of the positives once the junk is removed from the ranking."""
    ranks = np.sort(positives)
    return ranks - np.searchsorted(np.sort(junk), ranks)


def precision_among(ranks: NDArray[np.int64], first: int) -> float:
    """Share of positives among the first; where the last positive stands before that, among those up to it, as published."""
    length = min(first, int(ranks[-1]) + 1)
    return float((ranks < length).sum() / length)
