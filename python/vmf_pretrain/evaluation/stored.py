"""Features on disk: files of some images each, under a fingerprint of what they are of.

Legend: N images, M of them readable, n blocks, F features, h x w patches of an image.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.data.images import Images
from vmf_pretrain.evaluation.outputs import CLASS, PATCHES, Kinds
from vmf_pretrain.storage.durable import replace_durably, temporary
from vmf_pretrain.storage.tensor_file import read_header, read_tensors, write_tensors

CHUNK = 256  # images of a file: at ViT-B/16 with patches 147 MiB in fp32, and half a minute of two CPU cores
ROWS = "rows"
GRIDS = "grids"
BAD = "bad"  # entry of a file's header
DIGITS = 12  # of a fingerprint in the name of a folder


@dataclass(frozen=True, eq=False)
class Features:
    """Features of the readable ones among some images, on disk.

    Attributes:
        images: of N, readable or not.
        folder: with the files.
        rows: [M] int64 places of the readable images.
        bad: names of the others, and why each could not be read.
    """

    images: Images
    folder: Path
    rows: Tensor
    bad: Mapping[str, str]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def labels(self) -> Tensor:
        """[M] int64.

        Raises:
            ValueError: the images have none.
        """
        if self.images.labels is None:
            raise ValueError("the images have no labels")
        return self.images.labels[self.rows]

    def names(self) -> list[str]:
        """[M] what a person finds each image by."""
        return [self.images.name(row) for row in self.rows.tolist()]

    def chunks(self, name: str = CLASS) -> Iterator[Tensor]:
        """The features of all M images in order, some at a time, in the dtype they are stored in, on the CPU.

        Args:
            name: CLASS [_, n, F], MEAN_PATCH or UNNORMED [_, F].
        """
        for path in _files(self.folder, len(self.images)):
            yield from read_tensors(path, [name])[0].values()  # none where no image of the file could be read

    def whole(self, name: str = CLASS) -> Tensor:
        """The same in one tensor, float32."""
        return torch.cat([chunk.float() for chunk in self.chunks(name)])

    def last(self) -> Tensor:
        """[M, F] float32 class feature of the last block, what the network returns."""
        return torch.cat([chunk.float() for chunk in self.last_chunks()])

    def last_chunks(self) -> Iterator[Tensor]:
        """The same, [_, F] of some images at a time, as they are stored."""
        return (chunk[:, -1] for chunk in self.chunks())

    def patches(self) -> Iterator[Tensor]:
        """[h, w, F] of each of the M images in order, as they are stored; sizes may differ."""
        for path in _files(self.folder, len(self.images)):
            found = read_tensors(path, [GRIDS, PATCHES])[0]
            if not found:  # no image of the file could be read
                continue
            grids = found[GRIDS].tolist()
            for flat, (height, width) in zip(
                torch.split(found[PATCHES], [h * w for h, w in grids]), grids, strict=True
            ):
                yield flat.reshape(height, width, -1)


def rows_at(parts: Iterable[Tensor], places: Tensor) -> Iterator[Tensor]:
    """The rows at ascending places [k] among those of all parts [_, ...] together, some at a time."""
    start = 0
    for part in parts:
        inside = places[(places >= start) & (places < start + len(part))] - start
        if len(inside):
            yield part[inside]
        start += len(part)


def features_in(folder: Path, images: Images) -> Features:
    """The features that all files of a folder hold together."""
    rows, bad = [], dict[str, str]()
    for path in _files(folder, len(images)):
        tensors, metadata = read_tensors(path, [ROWS])
        rows.append(tensors[ROWS])
        bad |= json.loads(metadata[BAD])
    return Features(images, folder, torch.cat(rows), bad)


def folder_for(store: Path, base: Mapping[str, Any], kinds: Kinds) -> tuple[Path, Kinds]:
    """The folder for features, and which kinds are in it: one that has them already, or a new one.

    Args:
        store: the folder of all features.
        base: what they are of, beside their kinds, as JSON holds it.
        kinds: those that are wanted.
    """
    name = fingerprint(base)[:DIGITS]
    for path in sorted(store.glob(f"{name}-*/spec.json")):
        try:
            there = Kinds.from_facts(json.loads(path.read_text(encoding="utf-8"))["kinds"])
        except (OSError, ValueError, KeyError, TypeError):
            continue  # not ours, or damaged
        if there.covers(kinds):
            return path.parent, there
    folder = store / "-".join([name, str(kinds.blocks), *sorted(kinds.parts)])
    spec = {"of": base, "kinds": kinds.facts()}
    folder.mkdir(parents=True, exist_ok=True)
    replace_durably(folder / "spec.json", (json.dumps(spec, indent=2) + "\n").encode())
    return folder, kinds


def missing(folder: Path, count: int) -> list[int]:
    """Numbers of the files that are not there, or damaged."""
    return [number for number, path in enumerate(_files(folder, count)) if not _whole(path)]


def write_chunk(
    folder: Path, number: int, rows: Tensor, kept: Mapping[str, list[Tensor]], bad: Mapping[str, str]
) -> None:
    """Write one file, whole or not at all.

    Args:
        folder: of the features.
        number: of the file.
        rows: [m] int64 places of its readable images.
        kept: by name, m tensors, one of each image.
        bad: names of its unreadable images, and why.

    Raises:
        OSError: the disk is full or read-only.
    """
    tensors = {ROWS: rows}
    for name, images in kept.items():
        if name == PATCHES:
            tensors[GRIDS] = torch.tensor([image.shape[:2] for image in images], dtype=torch.int64).reshape(-1, 2)
            tensors[name] = torch.cat([image.flatten(0, 1) for image in images])
        else:
            tensors[name] = torch.stack(images)
    path = _path(folder, number)
    with temporary(path.with_name(f".{path.name}.tmp")) as unfinished:
        write_tensors(unfinished, tensors, {BAD: json.dumps(dict(bad))})
        unfinished.replace(path)


def fingerprint(facts: Mapping[str, Any]) -> str:
    """SHA-256 of anything that JSON holds."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def chunk_of(number: int, count: int) -> range:
    """Places of the images of a file."""
    return range(number * CHUNK, min(count, (number + 1) * CHUNK))


def _files(folder: Path, count: int) -> list[Path]:
    return [_path(folder, number) for number in range(-(-count // CHUNK))]


def _path(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.safetensors"


def _whole(path: Path) -> bool:
    """Whether a file is there and well formed; one that was cut short is not."""
    try:
        return path.is_file() and ROWS in read_header(path).tensors
    except PretrainError:
        return False
