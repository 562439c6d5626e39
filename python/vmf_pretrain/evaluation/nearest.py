"""The most similar rows of a set that may be too large for memory.

Legend: M rows whose neighbours are sought, N rows among which, n of them at a time, k neighbours, F features.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

ROWS_AT_ONCE = 512  # of the M: with COLUMNS_AT_ONCE 16 MiB of fp32 cosines, which a CPU's last cache holds
COLUMNS_AT_ONCE = 8192  # of the N
GROUP = (
    16  # columns whose largest cosine stands for them; near the square root of COLUMNS_AT_ONCE / k for k from 10 to 200
)


def nearest(rows: Tensor, among: Iterable[Tensor], count: int) -> tuple[Tensor, Tensor]:
    """The rows of ``among`` with the largest cosine, the largest first. Exact; the matrix of all cosines is never stored.

    Args:
        rows: [M, F] floating point, of any norm; on the device that computes.
        among: [n, F] at a time, N in all, of any norm; moved to that device.
        count: k; if N is smaller, all N.

    Returns:
        Cosines [M, k], float32, and the places of the neighbours among all N, int64, on the device of ``rows``. Of equal
        cosines at the end of the list some are taken, always the same ones.

    Raises:
        ValueError: ``among`` has no row, or rows of another F.
    """
    sought = functional.normalize(rows.float(), dim=1)
    best = sought.new_empty(len(sought), 0)
    places = torch.empty(len(sought), 0, dtype=torch.int64, device=sought.device)
    start = 0
    for block in _blocks(among):
        if block.shape[1] != rows.shape[1]:
            raise ValueError(f"rows have {rows.shape[1]} columns but those they are compared with {block.shape[1]}")
        columns = functional.normalize(block.to(sought.device).float(), dim=1).T
        found = [_best_of(part @ columns, count) for part in torch.split(sought, ROWS_AT_ONCE)]
        best = torch.cat([best, torch.cat([values for values, _ in found])], dim=1)
        places = torch.cat([places, torch.cat([index for _, index in found]) + start], dim=1)
        best, order = best.topk(min(count, best.shape[1]), dim=1)
        places = places.gather(1, order)
        start += len(block)
    if start == 0:
        raise ValueError("there is no row to be compared with; expected at least one")
    return best, places


def _best_of(cosines: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` largest of each row [M, n] and their columns, in any order.

    The columns are seen as groups, and only the groups with the largest maxima can hold them: a search among the maxima and
    one among the members of ``count`` groups is several times cheaper than one among all columns.
    """
    rows, columns = cosines.shape
    groups = columns // GROUP
    if groups <= count:
        return cosines.topk(min(count, columns), dim=1)
    # member g of a group stands ``groups`` columns after member g - 1, so that maxima are of whole vectors
    members = cosines[:, : groups * GROUP].reshape(rows, GROUP, groups)
    _, chosen = members.amax(dim=1).topk(count, dim=1, sorted=False)
    candidates = (chosen.unsqueeze(1) + groups * torch.arange(GROUP, device=cosines.device)[:, None]).flatten(1)
    rest = torch.arange(groups * GROUP, columns, device=cosines.device).expand(rows, -1)
    candidates = torch.cat([candidates, rest], dim=1)
    values, order = cosines.gather(1, candidates).topk(count, dim=1, sorted=False)
    return values, candidates.gather(1, order)


def _blocks(among: Iterable[Tensor]) -> Iterator[Tensor]:
    """The same rows, COLUMNS_AT_ONCE at a time."""
    waiting: list[Tensor] = []
    for part in among:
        for piece in torch.split(part, COLUMNS_AT_ONCE):
            waiting.append(piece)
            if sum(map(len, waiting)) >= COLUMNS_AT_ONCE:
                joined = torch.cat(waiting)
                yield joined[:COLUMNS_AT_ONCE]
                waiting = [joined[COLUMNS_AT_ONCE:]] if len(joined) > COLUMNS_AT_ONCE else []
    if waiting:
        yield torch.cat(waiting)
