"""Which rows of both networks go through together: whole images where they fit the workspace, else some of their views.

Legend: G / V teacher / student views, B images, S / T student / teacher rows.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

WORKSPACE_BYTES = 72 * 2**20  # of logits, less their padding; with more, 640 rows were no faster (bench/LOG.md)
WORKSPACE_SHARE = 0.5  # of what the logits of all rows would take: a small batch must save memory too
LEAST_WORKSPACE_BYTES = 16 * 2**20  # below, the products are bound by reading the prototypes
MOST_ROWS = 768  # the block of G and the panels of rows have to stay in cache
LEAST_ROWS = 16
ROW_PADDING = 16  # of either network's rows among the columns of logits; the module's own


class Chunk(NamedTuple):
    """Views and images of one step; every pair of views of every image is in exactly one.

    A row whose pairs are in several counts in each with the weight of the pairs there.
    """

    images: slice
    student_views: slice
    teacher_views: slice

    def students_of(self, rows: Tensor) -> Tensor:
        """[student views, images, ...] of view-major [V, B, ...]."""
        return rows[self.student_views, self.images]

    def teachers_of(self, rows: Tensor) -> Tensor:
        """[teacher views, images, ...] of view-major [G, B, ...]."""
        return rows[self.teacher_views, self.images]


def chunks_of(views: tuple[int, int], images: int, prototypes: int, first_columns: int = 0) -> list[Chunk]:
    """Chunks of a pairing.

    Args:
        views: of teacher and student.
        images: B.
        prototypes: K, of the rank that has most.
        first_columns: of logits that have room elsewhere, for the first chunk alone; used where no more chunks come of it.
    """
    most = rows_at_once(sum(views) * images, prototypes) // sum(views)
    if most == 0:
        return _chunks_of_views(views, images, rows_at_once(sum(views) * images, prototypes))
    every = [slice(0, count) for count in views]
    if 0 < images <= most:
        return [Chunk(slice(0, images), every[1], every[0])]
    sizes = _even_sizes(images, most)
    fitting = range(min(images, MOST_ROWS // sum(views), first_columns // sum(views)), 0, -1)
    free = next((count for count in fitting if columns_of(views, count) <= first_columns), 0)
    if free and 1 + math.ceil((images - free) / most) <= len(sizes):
        sizes = [free, *_even_sizes(images - free, most)]
    ends = list(itertools.accumulate(sizes))
    return [Chunk(slice(end - size, end), every[1], every[0]) for size, end in zip(sizes, ends, strict=True)]


def columns_of(views: tuple[int, int], images: int) -> int:
    """Columns of logits that a chunk of so many views and images takes: each network's rows with their padding."""
    return sum(padded(count * images) for count in views)


def padded(rows: int) -> int:
    """Columns that the logits of ``rows`` take."""
    return -(-rows // ROW_PADDING) * ROW_PADDING


def rows_at_once(rows: int, prototypes: int) -> int:
    """How many rows' logits the workspace holds."""
    row_bytes = prototypes * torch.float32.itemsize
    budget = min(WORKSPACE_BYTES, max(LEAST_WORKSPACE_BYTES, int(WORKSPACE_SHARE * rows * row_bytes)))
    return min(MOST_ROWS, max(budget // row_bytes, LEAST_ROWS))


def row_ranges(rows: int, prototypes: int) -> Iterator[slice]:
    """Ranges of nearly equal size that cover ``rows``."""
    return _ranges(rows, _even(rows, rows_at_once(rows, prototypes)))


def _chunks_of_views(views: tuple[int, int], images: int, rows: int) -> list[Chunk]:
    """One image after the other, and of each some views of either network: ``rows`` of them at most."""
    teachers, students = (list(_ranges(count, _even(count, max(1, rows // 2)))) for count in views)
    return [
        Chunk(slice(image, image + 1), student, teacher)
        for image, student, teacher in itertools.product(range(images), students, teachers)
    ]


def _even(count: int, most: int) -> int:
    """Size of the fewest parts of at most ``most``, all of nearly one size."""
    return max(1, math.ceil(count / max(1, math.ceil(count / most))))


def _even_sizes(count: int, most: int) -> list[int]:
    return [part.stop - part.start for part in _ranges(count, _even(count, most))]


def _ranges(count: int, size: int) -> Iterator[slice]:
    for first in range(0, count, size):
        yield slice(first, min(first + size, count))
