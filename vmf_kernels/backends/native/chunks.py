"""Which rows of both networks form a chunk: whole images if they fit the workspace, else some of an image's views.

Legend: G / V teacher / student views, B images, S / T student / teacher rows.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

WORKSPACE_BYTES = 72 * 2**20  # of logits, without their padding; with more, 640 rows were not faster (bench/LOG.md)
WORKSPACE_SHARE = 0.5  # of the memory of all rows' logits: a small batch must save memory too
LEAST_WORKSPACE_BYTES = 16 * 2**20  # with less, reading the prototypes limits the products
MOST_ROWS = 768  # the block of G and the panels of rows have to stay in cache
MOST_ROWS_OF_AN_IMAGE = (
    1024  # of one with many views: cutting it repeats products, which costs more than a cache too small
)
LEAST_ROWS = 16
ROW_PADDING = 16  # the logits of each network take a multiple of this many columns; fixed by the module


class Chunk(NamedTuple):
    """Views and images of one step. Every pair of views of every image is in exactly one chunk.

    If the pairs of a row are in several chunks, its weight in each is that of the pairs in that chunk.
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
        prototypes: K of the rank with the most.
        first_columns: columns of logits that fit memory outside the workspace, for the first chunk only; used if this does
            not lead to more chunks.
    """
    most = rows_at_once(sum(views) * images, prototypes) // sum(views)
    whole = min(WORKSPACE_BYTES // (prototypes * torch.float32.itemsize), MOST_ROWS_OF_AN_IMAGE)
    if sum(views) <= whole:
        most = max(most, 1)
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
    """Columns of logits of a chunk with so many views and images: each network's rows with their padding."""
    return sum(padded(count * images) for count in views)


def padded(rows: int) -> int:
    """Columns of the logits of ``rows`` rows."""
    return -(-rows // ROW_PADDING) * ROW_PADDING


def rows_at_once(rows: int, prototypes: int) -> int:
    """The number of rows whose logits the workspace holds."""
    row_bytes = prototypes * torch.float32.itemsize
    budget = min(WORKSPACE_BYTES, max(LEAST_WORKSPACE_BYTES, int(WORKSPACE_SHARE * rows * row_bytes)))
    return min(MOST_ROWS, max(budget // row_bytes, LEAST_ROWS))


def row_ranges(rows: int, prototypes: int) -> Iterator[slice]:
    """Ranges of nearly equal size that cover ``rows``."""
    return _ranges(rows, _even(rows, rows_at_once(rows, prototypes)))


def _chunks_of_views(views: tuple[int, int], images: int, rows: int) -> list[Chunk]:
    """One image after the other, each with some views of either network: ``rows`` rows at most."""
    teachers, students = (list(_ranges(count, _even(count, max(1, rows // 2)))) for count in views)
    return [
        Chunk(slice(image, image + 1), student, teacher)
        for image, student, teacher in itertools.product(range(images), students, teachers)
    ]


def _even(count: int, most: int) -> int:
    """The size of the parts if ``count`` is cut into as few as possible, of at most ``most`` and nearly equal size."""
    return max(1, math.ceil(count / max(1, math.ceil(count / most))))


def _even_sizes(count: int, most: int) -> list[int]:
    return [part.stop - part.start for part in _ranges(count, _even(count, most))]


def _ranges(count: int, size: int) -> Iterator[slice]:
    for first in range(0, count, size):
        yield slice(first, min(first + size, count))
