"""Safetensors files: written while they are hashed, and read only after every number of the header has been checked.

The library of that name holds Python's global lock while it copies, which stops the training step when a thread writes in the
background. It also needs a second copy in memory, and accepts a name that occurs twice.

Source: https://huggingface.co/docs/safetensors/index#format. A file is eight bytes with the length of the header
(little-endian), the header as JSON, then the tensors' bytes.
"""

import hashlib
import itertools
import json
import math
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from vmf_pretrain.config.errors import PretrainError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
LENGTH_BYTES = 8  # of the number in front of the header
LONGEST_HEADER = 10 * 2**20  # bytes: room for some 60,000 tensors, and parsing it takes 0.1 GB of memory at most
MOST_ELEMENTS = 2**62  # of a tensor; more overflow the arithmetic of sizes
PICKLES = (b"\x80", b"PK\x03\x04")  # how a pickle begins, and torch.save's archive of pickles


@dataclass(frozen=True)
class Header:
    """What a tensor file says of itself.

    Attributes:
        tensors: name to (shape, dtype, first byte, end byte), bytes counted from the end of the header.
        metadata: texts by name.
        start: where the tensors' bytes begin in the file.
    """

    tensors: dict[str, tuple[tuple[int, ...], torch.dtype, int, int]]
    metadata: dict[str, str]
    start: int

    def specs(self) -> dict[str, Tensor]:
        """Shape and dtype of every tensor, as tensors of the meta device."""
        return {
            name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype, *_) in self.tensors.items()
        }


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> str:
    """Write a file and wait until it is on disk.

    Args:
        path: a new file.
        tensors: any strides and devices; storage may be shared.
        metadata: texts to keep in the header.

    Returns:
        The SHA-256 of the file, in hexadecimal.

    Raises:
        OSError: the disk is full or read-only, or something is at ``path``, were it a symbolic link.
        ValueError: a tensor has a dtype that such a file cannot hold.
    """
    named = sorted(
        tensors.items(), key=lambda item: (-item[1].element_size(), item[0])
    )  # larger first: all are aligned
    digest = hashlib.sha256()
    with path.open("xb") as file:
        parts: Iterable[bytes | memoryview] = itertools.chain(
            [_header_of(dict(named), metadata or {})], (_bytes_of(tensor) for _, tensor in named)
        )
        for part in parts:
            digest.update(part)
            file.write(part)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def read_tensors(path: Path, names: Collection[str] | None = None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file, on the CPU, and the texts of its header. Nothing in the file can run code.

    Args:
        path: the file.
        names: of the tensors to read, whether they are there or not; None reads all.

    Raises:
        PretrainError: it cannot be read or is no well-formed tensor file; no memory beyond its own size was taken.
    """
    try:
        with path.open("rb") as file:
            header = _header_in(file, path)
            wanted = [name for name in header.tensors if names is None or name in names]
            return {name: _tensor_in(file, header, name) for name in wanted}, header.metadata
    except OSError as error:
        raise PretrainError(f"tensor file {path} cannot be read: {error.strerror or error}.") from None


def read_header(path: Path) -> Header:
    """The checked header of a file, without its tensors. Raises as ``read_tensors`` does."""
    try:
        with path.open("rb") as file:
            return _header_in(file, path)
    except OSError as error:
        raise PretrainError(f"tensor file {path} cannot be read: {error.strerror or error}.") from None


def _header_of(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    place = 0
    for name, tensor in tensors.items():
        end = place + tensor.numel() * tensor.element_size()
        if tensor.dtype not in NAMES:
            raise ValueError(f"{name} is {tensor.dtype}; expected one of {', '.join(map(str, NAMES))}")
        entries[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % LENGTH_BYTES)  # so that the tensors begin at a multiple of their element's size
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _tensor_in(file: BinaryIO, header: Header, name: str) -> Tensor:
    shape, dtype, begin, _ = header.tensors[name]
    tensor = torch.empty(shape, dtype=dtype)
    file.seek(header.start + begin)
    read, wanted = 0, _bytes_of(tensor)
    while read < len(wanted):
        got = file.readinto(wanted[read:])  # type: ignore[attr-defined]
        if not got:
            raise OSError(f"it became shorter while {name} was read")
        read += got
    return tensor


def _header_in(file: BinaryIO, path: Path) -> Header:
    size, first = os.fstat(file.fileno()).st_size, file.read(LENGTH_BYTES)
    length = int.from_bytes(first, "little")
    try:
        if len(first) < LENGTH_BYTES:
            raise ValueError(f"it has {size} bytes")
        if length > size - LENGTH_BYTES or length > LONGEST_HEADER:
            if first.startswith(PICKLES):
                raise ValueError("it looks like a pickle, as torch.save writes, which runs code when it is loaded")
            limit = f"at most {LONGEST_HEADER} are read"
            raise ValueError(f"it claims a header of {length} bytes; it has {size} in all, and {limit}")
        entries = _parsed(file.read(length))
        metadata = _metadata(entries.pop("__metadata__", {}))
        tensors = {name: _entry(name, entry) for name, entry in entries.items()}
        _check_places(tensors, size - LENGTH_BYTES - length)
    except ValueError as error:
        raise PretrainError(f"{path} is no well-formed safetensors file: {error}.") from None
    return Header(tensors, metadata, LENGTH_BYTES + length)


def _parsed(raw: bytes) -> dict[str, Any]:
    """The header's JSON object. Raises ValueError."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = next(name for name in found if sum(name == other for other, _ in pairs) > 1)
            raise ValueError(f"its header has {twice!r} twice")
        return found

    try:
        entries = json.loads(raw.decode(), object_pairs_hook=once)
    except RecursionError:
        raise ValueError("its header is nested too deeply") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"its header is not JSON ({error})") from None
    if not isinstance(entries, dict):
        raise ValueError("its header is no JSON object")
    return entries


def _metadata(entry: Any) -> dict[str, str]:
    if not isinstance(entry, dict) or not all(isinstance(value, str) for value in entry.values()):
        raise ValueError("its __metadata__ does not hold texts alone")
    return entry


def _entry(name: str, entry: Any) -> tuple[tuple[int, ...], torch.dtype, int, int]:
    """Shape, dtype, first and end byte of one tensor. Raises ValueError."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name!r} lacks one of dtype, shape and data_offsets, or has more")
    dtype, shape, offsets = DTYPES.get(str(entry["dtype"])), entry["shape"], entry["data_offsets"]
    if dtype is None:
        raise ValueError(f"{name!r} has the dtype {entry['dtype']!r}; expected one of {', '.join(DTYPES)}")
    if not _counts(shape) or not _counts(offsets) or len(offsets) != 2:
        raise ValueError(
            f"{name!r} has the shape {shape!r:.80} and offsets {offsets!r:.80}; expected whole numbers >= 0"
        )
    if math.prod(max(side, 1) for side in shape) > MOST_ELEMENTS:
        raise ValueError(f"{name!r} has the shape {shape!r:.80}, which is too large")
    begin, end = offsets
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name!r} of shape {shape!r:.80} and {entry['dtype']} cannot lie in bytes {begin} to {end}")
    return tuple(shape), dtype, begin, end


def _counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _check_places(tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype, int, int]], size: int) -> None:
    """The tensors fill the ``size`` bytes after the header, each byte once. Raises ValueError."""
    reached = 0
    for name, (_, _, begin, end) in sorted(tensors.items(), key=lambda item: item[1][2:]):
        if begin != reached:
            raise ValueError(f"{name!r} begins at byte {begin}; expected {reached}, where the one before ends")
        reached = end
    if reached != size:
        raise ValueError(f"its tensors end at byte {reached} but {size} bytes follow the header")
