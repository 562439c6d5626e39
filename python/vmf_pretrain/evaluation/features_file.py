"""Features with the names of their images in one file, npz or parquet, written some images at a time.

Legend: M images, F features, h x w patches of an image.
"""

import importlib
import zipfile
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.evaluation.outputs import PATCHES
from vmf_pretrain.evaluation.stored import Features
from vmf_pretrain.storage.durable import temporary

CLASS_KIND = "class"
FEATURES, NAMES, BAD = "features", "names", "bad"


def writer_for(path: Path) -> Callable[[Path, Features, str], None]:
    """What writes a file of this ending.

    Raises:
        PretrainError: the ending is of no kind of file that is written, or a package for it is missing.
    """
    if path.suffix == ".npz":
        return write_npz
    if path.suffix != ".parquet":
        raise PretrainError(f"--out is {path}; expected a name that ends in .npz or .parquet.")
    if find_spec("pyarrow") is None:
        raise PretrainError(
            "a .parquet file needs pyarrow; install it with: pip install pyarrow, or choose a name in .npz."
        )
    return write_parquet


def write_npz(path: Path, features: Features, kind: str) -> None:
    """``features`` [M, F], or [M, h, w, F] of patches, float32; ``names`` [M]; ``bad``: names of images that cannot be read.

    No part is a pickle. The file is written whole or not at all, from one stored part of the features at a time.

    Raises:
        OSError: the disk is full or read-only.
        PretrainError: images differ in their number of patches.
    """
    rows = _rows(features, kind)
    first = next(rows)
    shape = (len(features), *first.shape[1:])
    with temporary(path.with_name(f".{path.name}.tmp")) as unfinished:
        with zipfile.ZipFile(unfinished, "w", zipfile.ZIP_STORED) as archive:
            with archive.open(f"{FEATURES}.npy", "w", force_zip64=True) as entry:
                header = {"descr": "<f4", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_2_0(entry, header)
                for block in _chained(first, rows):
                    entry.write(_same_shape(block, shape).tobytes())
            for name, texts in ((NAMES, features.names()), (BAD, sorted(features.bad))):
                with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                    np.lib.format.write_array(entry, np.array(texts, dtype=np.str_), allow_pickle=False)
        unfinished.replace(path)


def write_parquet(path: Path, features: Features, kind: str) -> None:
    """Columns ``name`` and ``features``, a list of fixed length; of patches row by row. The schema's metadata has the shape.

    Needs pyarrow. Raises as ``write_npz``.
    """
    arrow: Any = importlib.import_module("pyarrow")
    parquet: Any = importlib.import_module("pyarrow.parquet")
    rows, names = _rows(features, kind), features.names()
    first = next(rows)
    shape = first.shape[1:]
    width = int(np.prod(shape))
    facts = {"shape": str(list(shape)), "kind": kind, BAD: "\n".join(sorted(features.bad))}
    schema = arrow.schema([("name", arrow.string()), (FEATURES, arrow.list_(arrow.float32(), width))], metadata=facts)
    start = 0
    with temporary(path.with_name(f".{path.name}.tmp")) as unfinished:
        with parquet.ParquetWriter(unfinished, schema) as table:
            for block in _chained(first, rows):
                flat = arrow.array(_same_shape(block, (0, *shape)).reshape(-1))
                values = arrow.FixedSizeListArray.from_arrays(flat, width)
                some: Sequence[str] = names[start : start + len(block)]
                table.write_table(arrow.Table.from_arrays([arrow.array(some, arrow.string()), values], schema=schema))
                start += len(block)
        unfinished.replace(path)


def _rows(features: Features, kind: str) -> Iterator[NDArray[np.float32]]:
    """[m, ...] float32 of some images at a time; at least one of them."""
    if kind == PATCHES:
        found: Iterator[Tensor] = (grid.unsqueeze(0) for grid in features.patches())
    elif kind == CLASS_KIND:
        found = features.last_chunks()
    else:
        found = features.chunks(kind)
    return (block.float().contiguous().numpy() for block in found)


def _chained(first: NDArray[np.float32], rest: Iterator[NDArray[np.float32]]) -> Iterator[NDArray[np.float32]]:
    yield first
    yield from rest


def _same_shape(block: NDArray[np.float32], shape: Sequence[int]) -> NDArray[np.float32]:
    if block.shape[1:] != tuple(shape[1:]):
        raise PretrainError(
            f"an image has features of shape {list(block.shape[1:])}; expected {list(shape[1:])}, as the first one."
        )
    return block
