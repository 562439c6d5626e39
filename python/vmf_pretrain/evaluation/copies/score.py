"""How well originals are found by their copies: average precision among the first 20, as DINO evaluates Copydays.

Legend: N images of the database, Q queries, F features.
"""

from collections.abc import Sequence
from pathlib import PurePath

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from vmf_pretrain.evaluation.average_precision import trapezoid_average_precision

FIRST = 20  # what stands behind is not found
SHARED = 4  # first characters of a name that copies share with their original
SIMILARITIES_AT_ONCE = 2**22


def originals_of(queries: Sequence[str], originals: Sequence[str]) -> list[list[int]]:
    """Places among the originals whose file names begin with the same four characters as each query's."""
    places: dict[str, list[int]] = {}
    for place, name in enumerate(originals):
        places.setdefault(PurePath(name).name[:SHARED], []).append(place)
    return [places.get(PurePath(name).name[:SHARED], []) for name in queries]


def copy_precisions(queries: Tensor, database: Tensor, positives: Sequence[Sequence[int]]) -> NDArray[np.float64]:
    """[Q] average precision in [0, 1]; positives behind the first 20 count as never found, NaN without positives.

    Args:
        queries: [Q, F] features, of any norm.
        database: [N, F] features of originals and distractors; of equal similarity, the first stands first.
        positives: places in the database of each query's originals.

    Raises:
        ValueError: there are not as many lists of positives as queries.
    Source: Douze et al., "Evaluation of GIST descriptors for web-scale image search", CIVR 2009; top 20 and the features as
    Caron et al., "Emerging properties in self-supervised vision transformers", ICCV 2021, appendix.
    """
    if len(queries) != len(positives):
        raise ValueError(f"{len(positives)} lists of positives for {len(queries)} queries")
    database_NF = functional.normalize(database.float(), dim=1)
    at_once = max(1, SIMILARITIES_AT_ONCE // len(database_NF))
    found: list[float] = []
    for block in torch.split(functional.normalize(queries.float(), dim=1), at_once):
        order = (block @ database_NF.T).sort(dim=1, descending=True, stable=True).indices
        for row in order[:, :FIRST]:
            wanted = positives[len(found)]
            ranks = torch.isin(row, torch.tensor(wanted, dtype=torch.int64)).nonzero()[:, 0]
            found.append(trapezoid_average_precision(ranks.numpy(), len(wanted)))
    return np.array(found)
