"""Image files of every kind, good and bad, for the tests of this folder."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, arange

from vmf_pretrain.data.photos import Photos
from vmf_pretrain.data.source import Names, Stamp

SIDE = 16


class FileSource:
    """A source of a few paths."""

    def __init__(self, *paths: Path) -> None:
        self.paths = paths
        self.names = Names([str(path) for path in paths])
        self.sizes = [path.stat().st_size for path in paths]
        self.skipped: dict[str, int] = {}
        self.notes: list[str] = []

    def labels(self) -> tuple[Tensor | None, list[str]]:
        return None, []

    def read(self, index: int) -> bytes:
        return self.paths[index].read_bytes()

    def stamp(self, index: int) -> Stamp:
        found = self.paths[index].stat()
        return Stamp(found.st_size, found.st_mtime_ns)


def photos(*paths: Path, size: int = 32, **options: Any) -> Photos:
    return Photos(FileSource(*paths), arange(len(paths)), None, size, **options)


def gradient(side: int = SIDE) -> NDArray[np.uint8]:
    """A ramp from dark at the left to bright at the right, 8 bits."""
    return np.tile(np.linspace(0, 255, side).round().astype(np.uint8), (side, 1))


def colours() -> Image.Image:
    return Image.fromarray(np.dstack([gradient(), gradient().T, np.full((SIDE, SIDE), 128, np.uint8)]))


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def gray(values: NDArray[Any]) -> Image.Image:
    return Image.fromarray(values)


def with_chunk(png: bytes, kind: bytes, data: bytes) -> bytes:
    """A PNG with one more chunk after its header."""
    start = 8 + 25
    chunk = struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return png[:start] + chunk + png[start:]


def damaged_tiff() -> bytes:
    """A TIFF whose directory names a size as text: Pillow raises TypeError."""
    tiff = bytearray(encoded(colours(), "TIFF"))
    place = struct.unpack_from("<I", tiff, 4)[0]
    for entry in range(struct.unpack_from("<H", tiff, place)[0]):
        at = place + 2 + 12 * entry
        if struct.unpack_from("<H", tiff, at)[0] == 257:  # ImageLength
            struct.pack_into("<HHI", tiff, at, 257, 2, 4)
    return bytes(tiff)


def bomb() -> bytes:
    """A PNG of 20,000 x 20,000 pixels in a few kilobytes, as its header says."""
    header = struct.pack(">IIBBBBB", 20000, 20000, 8, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(2000))), (b"IEND", b""))
    body = b"".join(struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + body


def cut(whole: bytes) -> bytes:
    return whole[: len(whole) * 3 // 5]


def noise(side: int = 64) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8))


def noise_cut(kind: str) -> bytes:
    return cut(encoded(noise(), kind))


BAD: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"",
    "text": lambda: b"these are not pixels",
    "other format": lambda: encoded(colours(), "PPM"),
    "bomb": bomb,
    "damaged tiff": damaged_tiff,
    "not finite": lambda: encoded(gray(np.where(gradient() > 99, np.nan, 1).astype(np.float32)), "TIFF"),
    "infinite": lambda: encoded(gray(np.where(gradient() > 99, np.inf, 1).astype(np.float32)), "TIFF"),
    **{f"cut {kind}": partial(noise_cut, kind) for kind in ("JPEG", "PNG", "WEBP", "BMP", "TIFF")},
    "cut GIF": lambda: cut(encoded(noise().quantize(256), "GIF")),
}
