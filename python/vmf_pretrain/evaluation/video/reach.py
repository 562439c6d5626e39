"""How far from its place a patch is sought in other frames."""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Reach(NamedTuple):
    """Half widths of a neighbourhood by the distance in rows, from 0 up: columns at most so far away are in it."""

    half_widths: tuple[int, ...]

    @property
    def rows(self) -> int:
        """The largest distance in rows."""
        return len(self.half_widths) - 1

    def within(self, rows: slice, columns: slice, source_rows: slice, source_columns: slice) -> Tensor:
        """[rows x columns, source rows, source columns] bool: whether a patch of one frame is sought at a place of another."""
        down, across = (
            (torch.arange(a.start, a.stop)[:, None] - torch.arange(b.start, b.stop)).abs()
            for a, b in ((rows, source_rows), (columns, source_columns))
        )
        widths = torch.tensor([*self.half_widths, -1])[down.clamp(max=self.rows + 1)]
        return (across[None, :, None, :] <= widths[:, None, :, None]).flatten(0, 1)


def square(radius: int) -> Reach:
    """All places at most ``radius`` rows and columns away."""
    return Reach((radius,) * (radius + 1))


def circle(radius: int) -> Reach:
    """All places at most ``radius`` patches away."""
    return Reach(tuple(math.isqrt(radius**2 - row**2) for row in range(radius + 1)))
