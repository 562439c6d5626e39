"""Rows of many images, computed by all ranks: each reads and computes its share, and every rank gets all of them.

Legend: N images.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from vmf_pretrain.networks import ranks

BATCH = 256  # images a forward pass


def rows_by_ranks(
    places: Sequence[int],
    read: Callable[[Sequence[int]], Tensor],
    rows: Callable[[Iterator[Tensor]], Tensor],
) -> Tensor:
    """[N, ...] rows of the images at some places, in their order. Every rank must call it.

    Every rank has as many images in as many batches, as a network that is shared out over the ranks needs; where N is no
    multiple of the ranks, the last image is computed more than once.

    Args:
        places: N of them, at least one.
        read: the images at at most BATCH places, [B, ...]; a PretrainError that it raises on one rank is raised on all.
        rows: from batches of images to a row for each of them; the same holds for what it raises.
    """
    mine = share_of(places)
    parts = (mine[start : start + BATCH] for start in range(0, len(mine), BATCH))
    batches = (ranks.agreed(lambda part=part: read(part)) for part in parts)  # type: ignore[misc]
    found = ranks.agreed(lambda: rows(batches))
    return torch.cat(ranks.gathered([found]))[: len(places)]


def share_of(places: Sequence[int]) -> list[int]:
    """This rank's part of the places: as many as any other rank has."""
    each = -(-len(places) // ranks.count())
    start = ranks.rank() * each
    return [places[min(place, len(places) - 1)] for place in range(start, start + each)]
