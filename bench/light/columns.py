"""Column passes on exact inputs: both networks' rows, and the usage alone.

Legend: S / T student / teacher rows, K prototypes, D embedding dim.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from bench.light import exact
from bench.light.inputs import LOG2_E, LOGIT_TERMS, Array, integers, padded, signs, sparse_signs
from bench.light.rows import MISSING, NARROW, logits_of
from bench.light.stand import Stand
from vmf_kernels.backends.triton.passes import Columns, Side

SCALES = {"student": 1.0, "teacher": 0.5}  # base-2 logits by product
SEEDS = {"student": 10, "teacher": 20}
UNIT, TOTAL = 4.0, 8.0
WEIGHTLESS = 7  # every so many rows has an offset of infinity


class Case(NamedTuple):
    """Sizes, in tiles."""

    name: str
    student_tiles: int
    teacher_tiles: int
    paddings: int  # K is so many times what it is padded to
    has_padding: bool = False  # of prototypes and columns; an odd dim
    total: float = TOTAL


CASES = (
    Case("one block", 1, 1, 1),
    Case("padding", 3, 2, 2, has_padding=True),
    Case("more teachers", 1, 5, 3, total=0.0),  # which counts as 1
    Case("more blocks than multiprocessors", 4, 2, 72),
)
TOY_CASES = CASES[1:3]


class Half(NamedTuple):
    """One network: tensors for the kernel, and its weights and rows for the exact result."""

    side: Side
    weights: Array  # [K padded, R]
    rows: Array  # [R, width]


def half_of(stand: Stand, name: str, rows: int, count: int, dim: int) -> Half:
    """The student or the teacher with so many rows; ``count`` prototypes, without padding."""
    layout, scale, seed = stand.layout(dim), SCALES[name], SEEDS[name]
    padded_count = -(-count // stand.padding) * stand.padding
    keys = padded(sparse_signs(count, dim, LOGIT_TERMS, seed), padded_count, layout.width)
    features = padded(signs((rows, dim), seed + 2), rows, layout.width)
    bias = integers((count,), -1, 1, seed + 3)
    offset = integers((rows,), 3, 4, seed + 4) - (2 if scale < 1 else 0)
    offset[::WEIGHTLESS] = np.inf
    logits = logits_of(features, keys, bias, scale)
    side = Side(stand.matrix(features), stand.packed(keys, bias, scale, layout), stand.floats(offset))
    return Half(side, np.exp2(logits - offset[:, None]).T, features)


def check_columns(stand: Stand) -> None:
    """All cases of the column pass; of "usage" without a student."""
    alone = stand.variant.family == "usage"
    for case in TOY_CASES if stand.toy else CASES:
        stand.say("preparing", case.name)
        dim = narrow_dim(stand) if case.has_padding else stand.variant.dim
        layout = stand.layout(dim)
        tile = stand.tile("columns", layout)
        count = case.paddings * stand.padding - (MISSING if case.has_padding else 0)
        student = half_of(stand, "student", case.student_tiles * tile.rows, count, dim)
        teacher = half_of(stand, "teacher", case.teacher_tiles * tile.rows, count, dim)
        cotangents = padded(integers((len(teacher.rows), dim), -2, 2, 9), len(teacher.rows), layout.width)
        run(stand, case, None if alone else student, teacher, cotangents, dim)


def run(stand: Stand, case: Case, student: Half | None, teacher: Half, cotangents: Array, dim: int) -> None:
    """Launch one case and compare."""
    count = teacher.side.keys.prototypes
    tile = stand.tile("columns", teacher.side.keys.layout)
    unit, total, pulled = stand.floats(UNIT), stand.floats(case.total), stand.matrix(cotangents)

    def launch() -> Any:
        out = room(stand, count, dim, alone=student is None)
        stand.kernels.column_pass(
            None if student is None else student.side, teacher.side, pulled, unit, total, out, tile
        )
        return written(out)

    networks = (
        None if student is None else exact.Network(student.weights[:count], student.rows[:, :dim]),
        exact.Network(teacher.weights[:count], cotangents[:, :dim]),
    )
    stand.run(case.name, launch, exact.column_pass(*networks, factor(), UNIT, case.total or 1.0))


def narrow_dim(stand: Stand) -> int:
    """A dim with padding: odd, so that rows of the result start at no multiple of 8 bytes."""
    return NARROW[stand.variant.dim] - 1 if stand.is_cuda else stand.variant.dim - 1


def factor() -> np.float32:
    """The factor of the vectors, computed as in the kernels."""
    return np.float32(1.0 / (LOG2_E / SCALES["student"] * UNIT))


def room(stand: Stand, count: int, dim: int, *, alone: bool) -> Columns:
    """Buffers for the results of a pass."""
    usage = stand.poisoned("usage", count)
    if alone:
        return Columns(None, None, usage)
    return Columns(stand.poisoned("vectors", count, dim), stand.poisoned("bias_gradient", count), usage)


def written(out: Columns) -> dict[str, Any]:
    """Results by name, without those not requested."""
    return {name: tensor for name, tensor in out._asdict().items() if tensor is not None}
