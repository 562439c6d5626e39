"""Tile sizes: which block of rows and prototypes a program of each pass holds, by device, precision and embedding dim.

The table is ``tiles.json`` beside this file, written by ``python -m bench.tune``. The file says once what chose its entries; an
entry that something else chose, such as a measurement, says so itself.

Legend: R rows, K prototypes, D embedding dim.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vmf_kernels.backends.triton.launch import INTERPRETER_ARCH, Target

TABLE_PATH = Path(__file__).parent / "tiles.json"
WIDTHS = (64, 128, 192, 256, 384, 512, 768, 1024)  # embedding dims that the table has entries for
MAX_DIM = WIDTHS[-1]
FEW_ROWS = 64  # with at most so many rows, a smaller block of rows saves more padding than it costs
# student and scores read one matrix (keys = values, or no values), teacher two
PASSES = ("student", "teacher", "scores", "columns")
ROW_PASSES = PASSES[:3]
SMALL_SHARED_MEMORY = (86, 89, 120, 121)  # 99 KiB of shared memory a block, unlike their generation's data-centre part
PRECISIONS = ("16-bit", "tf32", "ieee")
NO_TENSOR_CORES = "ieee"
NOTE = "chosen_by"  # of the file, or of an entry beside the fields of its tile
INTERPRETER_PAD = 64
MAX_WIDTH_OF_ANY_CHUNKS = 384
MOST_SPLITS = 128  # of the prototypes: about one a multiprocessor
# The cost of a part besides its products, in prototypes that a program could process in that time: its fp32 barycentre is
# written and read back, 8 bytes a number, while a prototype takes 4 operations; at 600 TFLOP/s and 4.3 TB/s.
PROTOTYPES_A_PART = 280
# As wide as can be, because between the products of two chunks the compiler waits for the tensor cores; but wider tiles of
# fp32 do not fit the registers: products without tensor cores are unrolled over the whole chunk.
WIDEST_CHUNK = {"16-bit": 256, "tf32": 64, NO_TENSOR_CORES: 32}


class Layout(NamedTuple):
    """How the embedding dim is cut into tiles whose sides are powers of two, and the precision of their products."""

    chunk: int
    chunks: int
    precision: str  # one of PRECISIONS

    @property
    def width(self) -> int:
        """D with its padding."""
        return self.chunk * self.chunks


@dataclass(frozen=True)
class Tile:
    """Launch parameters of one pass.

    Attributes:
        rows, prototypes: of a program's block.
        parts: programs that share the columns of the accumulated [., D] block; each forms the logits again.
        warps, stages: of a program, and of its software pipeline.
        tma: load blocks through tensor descriptors.
    """

    rows: int
    prototypes: int
    parts: int = 1
    warps: int = 4
    stages: int = 2
    tma: bool = False


def layout_of(dim: int, precision: str) -> Layout:
    """Chunks for an embedding dim: D = 384 is three of 128, not one of 512."""
    if dim > MAX_WIDTH_OF_ANY_CHUNKS:  # from here on passes may share the columns, and every part takes as many chunks
        dim = next(width for width in WIDTHS if dim <= width)
    whole = max(16, 1 << (dim - 1).bit_length())
    # three quarters of a power of two are three chunks
    chunk = whole // 4 if whole >= 256 and dim <= whole // 4 * 3 else whole
    chunk = min(WIDEST_CHUNK[precision], chunk)
    return Layout(chunk, -(-dim // chunk), precision)


def precision_of(dtype: torch.dtype) -> str:
    """Class of the products: "16-bit", or for fp32 what torch is set to: "tf32" or "ieee"."""
    if dtype != torch.float32:
        return "16-bit"
    # the newer of torch's two switches, which the older one sets as well: asking the older raises where both have been used
    chosen = torch.backends.cuda.matmul.fp32_precision
    return "tf32" if chosen == "tf32" else NO_TENSOR_CORES


def tile_of(name: str, target: Target, precision: str, dim: int, rows: int | None = None) -> Tile:
    """The tile of a pass in ``PASSES``.

    Args:
        name: of the pass.
        target: device.
        precision: from ``precision_of``.
        dim: embedding dim, at most ``MAX_DIM``.
        rows: of a row pass; a few take smaller blocks.
    """
    if target.arch == INTERPRETER_ARCH:
        return INTERPRETER_TILES[name]
    entries = table()[family(target.arch)][precision][str(next(width for width in WIDTHS if dim <= width))]
    few = f"{name} few"
    key = few if rows is not None and rows <= FEW_ROWS and few in entries else name
    return Tile(**{field: value for field, value in entries[key].items() if field != NOTE})


def has_tile(name: str, target: Target, precision: str, dim: int) -> bool:
    """Whether the table has one: none where no tile fits the part."""
    if target.arch == INTERPRETER_ARCH:
        return name in INTERPRETER_TILES
    part = table().get(family(target.arch), {}).get(precision, {})
    entries = part.get(str(next(width for width in WIDTHS if dim <= width)), {})
    return name in entries


def family(arch: int) -> str:
    """Name of the table's part for a compute capability: the nearest below with the same amount of shared memory."""
    if arch in SMALL_SHARED_MEMORY:
        return "86"
    return str(max(known for known in (80, 90, 100) if known <= max(arch, 80)))


def pad_to(target: Target) -> int:
    """What the number of prototypes is padded to: a multiple of every tile's."""
    return INTERPRETER_PAD if target.arch == INTERPRETER_ARCH else 256


@functools.cache
def table() -> Mapping[str, Any]:
    """The parsed ``tiles.json``: family -> precision -> width -> pass -> fields of ``Tile``, and what chose them if it says."""
    parsed: Mapping[str, Any] = json.loads(TABLE_PATH.read_text())["tiles"]
    return parsed


# Small, so that the few rows and prototypes a test can afford there still straddle the edges.
INTERPRETER_TILES = {
    "student": Tile(16, 32),
    "teacher": Tile(16, 64),
    "scores": Tile(32, 32),
    "columns": Tile(16, 32),
}


@functools.cache  # 20 to 40 microseconds
def split_count(
    row_blocks: int, prototype_blocks: int, multiprocessors: int, most: int, part_blocks: float = 0.0
) -> int:
    """Splits of the prototypes: as many as take the least time, the fewest of equals.

    Args:
        row_blocks, prototype_blocks: blocks of either.
        multiprocessors: of the device; one program runs on each at a time.
        most: bound from the workspace, at least 1.
        part_blocks: blocks of prototypes that a program could pass over while its part is stored and merged.
    """

    def blocks(splits: int) -> float:
        """Blocks of prototypes that a multiprocessor goes through, one after the other, or could in that time."""
        waves = -(-row_blocks * splits // multiprocessors)
        parts = row_blocks * splits / multiprocessors  # stored and merged at the rate of memory, which all share
        return waves * -(-prototype_blocks // splits) + parts * part_blocks

    return min(range(1, max(1, min(most, prototype_blocks, MOST_SPLITS)) + 1), key=blocks)
