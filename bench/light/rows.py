"""Row passes on exact inputs, and the merge of their parts.

Legend: R rows, K prototypes, D embedding dim, N splits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
from torch import Tensor

from bench.light import exact
from bench.light.inputs import LOGIT_TERMS, Array, integers, padded, padded_vector, signs, sparse_signs
from bench.light.stand import FEW, LOWEST, MANY, Stand
from vmf_kernels.backends.cuda import passes as cuda_passes
from vmf_kernels.backends.triton import passes as triton_passes
from vmf_kernels.backends.triton import rows as triton_rows
from vmf_kernels.backends.triton.passes import Parts

PASS_NAMES = {"scores": "scores", "keys": "student", "own": "teacher"}  # by what the values are
SCALES = {"scores": 1.0, "keys": 1.0, "own": 0.5}  # base-2 logits by product
NARROW = {64: 24, 128: 100, 192: 130, 256: 200, 384: 330}  # a dim that the width is padding for
MISSING = 37  # prototypes, to whole tiles
UNIT = 4.0


class Case(NamedTuple):
    """Sizes, in tiles."""

    name: str
    row_tiles: int
    paddings: int  # K is so many times what it is padded to
    split_tiles: int | None  # None: one split
    empty_splits: int = 0
    has_padding: bool = False  # of rows, prototypes and columns
    rows: int = MANY  # what the tile is chosen for


CASES = (
    Case("one tile a split", 1, 1, 1),
    Case("three tiles and padding", 3, 3, 3, has_padding=True),
    Case("short and empty last splits", 2, 5, 3, empty_splits=1),
    Case("few rows", 1, 2, 2, rows=FEW),
    Case("one long walk", 2, 8, None),
    Case("more blocks than multiprocessors", 8, 17, 2),
)
TOY_CASES = CASES[1:3]


class Problem(NamedTuple):
    """Arrays [R or K padded, width]; biases are [K] without padding."""

    rows: Array
    keys: Array
    values: Array
    bias: Array
    value_bias: Array
    splits: int
    split_size: int


def problem_of(stand: Stand, case: Case, values: str) -> tuple[Problem, Any, Any]:
    """The arrays, the layout and the tile of a case."""
    dim = NARROW[stand.variant.dim] if case.has_padding and stand.is_cuda else stand.variant.dim
    layout = stand.layout(dim)
    tile = stand.tile(PASS_NAMES[values], layout, case.rows)
    keys_of_tile = stand.keys_of_tile(tile, layout, own_values=values == "own")
    count, rows = case.paddings * stand.padding, case.row_tiles * tile.rows
    size = count if case.split_tiles is None else case.split_tiles * keys_of_tile
    empty = 0 if stand.toy and stand.is_cuda else case.empty_splits  # the stand-in of the tests refuses them
    real, real_rows = (count - MISSING, rows - 5) if case.has_padding else (count, rows)
    sparse = (padded(sparse_signs(real, dim, LOGIT_TERMS, seed), count, layout.width) for seed in (1, 2))
    problem = Problem(
        padded(signs((real_rows, dim), 3), rows, layout.width),
        next(sparse),
        integers((count, layout.width), -2, 2, 4) * (np.arange(layout.width) < dim),
        integers((real,), -1, 1, 5),
        integers((real,), -3, 3, 6),
        -(-count // size) + empty,
        size,
    )
    return problem, layout, tile


def logits_of(rows: Array, keys: Array, bias: Array, scale: float) -> Array:
    """[R, K padded] base 2; products of small integers, which fp32 forms exactly."""
    products = rows.astype(np.float32) @ keys.astype(np.float32).T
    return products.astype(np.float64) * scale + padded_vector(bias, len(keys), LOWEST)


def expected(problem: Problem, values: str, *, has_value_bias: bool) -> dict[str, exact.Exact]:
    """The exact results of the pass."""
    logits = logits_of(problem.rows, problem.keys, problem.bias, SCALES[values])
    of = {"scores": None, "keys": problem.keys, "own": problem.values}[values]
    bias = padded_vector(problem.value_bias, len(problem.keys), LOWEST) if has_value_bias else None
    return exact.row_pass(logits, of, bias, problem.splits, problem.split_size)


def check_rows(stand: Stand) -> None:
    """All cases of a row pass; "own" has a value bias but in the first."""
    values = stand.variant.family.removeprefix("rows-")
    for case in TOY_CASES if stand.toy else CASES:
        stand.say("preparing", case.name)
        problem, layout, tile = problem_of(stand, case, values)
        has_value_bias = values == "own" and case is not CASES[0]
        keys = stand.packed(problem.keys, problem.bias, SCALES[values], layout)
        own = stand.packed(problem.values, problem.value_bias, 1.0, layout, has_value_bias)
        of, rows = {"scores": None, "keys": keys, "own": own}[values], stand.matrix(problem.rows)

        def launch(
            problem: Problem = problem, rows: Tensor = rows, keys: Any = keys, of: Any = of, tile: Any = tile
        ) -> Any:
            count = len(problem.rows)
            statistics = stand.poisoned("statistics", 4, problem.splits, count)
            room = statistics if of is None else stand.poisoned("barycentre", problem.splits, count, rows.shape[1])
            parts = Parts(statistics, room)
            with handed_out(problem.splits, problem.split_size, parts):
                stand.kernels.row_pass(rows, keys, of, PASS_NAMES[values], tile)
            return {"statistics": statistics} | ({} if of is None else {"barycentre": room})

        stand.run(case.name, launch, expected(problem, values, has_value_bias=has_value_bias))


@contextmanager
def handed_out(splits: int, size: int, parts: Parts) -> Iterator[None]:
    """Row passes inside share out the prototypes like this, and write there: through the interface that the operator has."""
    with ExitStack() as stack:
        for module in (cuda_passes, triton_passes):
            for name, result in (("shared_out", (splits, size)), ("empty_parts", parts)):
                stack.enter_context(mock.patch.object(module, name, mock.Mock(return_value=result)))
        yield


def check_merge(stand: Stand) -> None:
    """Check the merge of the parts of one exact row pass."""
    case = CASES[2]
    stand.say("preparing", case.name)
    problem, layout, _ = problem_of(stand, case, "own")
    parts_of = expected(problem, "own", has_value_bias=True)
    given = [parts_of[name].value.astype(np.float32) for name in ("statistics", "barycentre")]
    weight = 2.0 ** integers((len(problem.rows),), -1, 2, 7)
    weight[-3:] = 0  # as padding has
    parts, weights, unit = Parts(*map(stand.floats, given)), stand.floats(weight), stand.floats(UNIT)
    statistics, barycentre = (array.astype(np.float64) for array in given)
    known = exact.merged(statistics, barycentre, weight, UNIT)

    def launch() -> Mapping[str, Tensor]:
        merged = triton_rows.merge_teachers(parts, weights, unit, layout, has_value_bias=True)
        offset = triton_rows.merge_offsets(parts, weights, unit, layout)
        return merged._asdict() | {"offset alone": offset, "log_sum_exp": triton_rows.merge_log_sum_exp(parts, None)}

    stand.run(case.name, launch, known | {"offset alone": known["offset"]})
