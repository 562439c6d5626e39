"""Average precision as image retrieval and copy detection publish it: the trapezoid rule over the precision-recall curve.

The average precision of information retrieval is the rectangle rule, which is lower. Figures of the two do not compare.

Legend: P positives found.
"""

import numpy as np
from numpy.typing import ArrayLike


def trapezoid_average_precision(ranks: ArrayLike, positives: int) -> float:
    """Area under the precision-recall curve of one query, in [0, 1].

    Args:
        ranks: [P] int, rank of each positive found, from 0, ascending; P may be smaller than ``positives``.
        positives: how many positives there are.

    Returns:
        The area; NaN where there is no positive.

    Raises:
        ValueError: more ranks than positives, or ranks that do not ascend.
    Source: the evaluation of Philbin et al., "Object retrieval with large vocabularies", CVPR 2007, as revisited by
    Radenovic et al., "Revisiting Oxford and Paris", CVPR 2018.
    """
    ranks_P = np.asarray(ranks, dtype=np.int64)
    if len(ranks_P) > positives or (ranks_P < 0).any() or (np.diff(ranks_P) <= 0).any():
        raise ValueError(f"{len(ranks_P)} ranks of {positives} positives; expected at most as many, ascending from 0")
    if not positives:
        return float("nan")
    found_P = np.arange(len(ranks_P))
    # above the first rank there is nothing, and precision starts at 1
    before_P = np.where(ranks_P == 0, 1.0, found_P / np.maximum(ranks_P, 1))
    after_P = (found_P + 1) / (ranks_P + 1)
    return float((before_P + after_P).sum() / (2 * positives))
