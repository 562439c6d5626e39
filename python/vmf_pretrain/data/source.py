"""Where encoded images come from: a folder, tar shards or a user's Dataset."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor


class Names(Sequence[str]):
    """Many strings in two arrays: a list of a million strings is copied into every worker as its references are counted."""

    def __init__(self, names: Sequence[str]) -> None:
        encoded = [name.encode("utf-8", "surrogateescape") for name in names]
        self._bytes = b"".join(encoded)
        self._ends: NDArray[np.int64] = np.cumsum([len(name) for name in encoded], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...
    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        start = int(self._ends[index - 1]) if index else 0
        return self._bytes[start : int(self._ends[index])].decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))


@dataclass(frozen=True)
class Stamp:
    """Size in bytes, and time of the last change in nanoseconds, of the file that holds an image."""

    size: int
    changed: int


class Source(Protocol):
    """Encoded images by number, before any is held out."""

    @property
    def names(self) -> Sequence[str]:
        """What a person finds each image by."""
        ...

    @property
    def sizes(self) -> Sequence[int] | NDArray[np.int64]:
        """Bytes of each image; 0 where they are not known."""
        ...

    @property
    def skipped(self) -> Mapping[str, int]:
        """How many things were skipped, by what they are."""
        ...

    @property
    def notes(self) -> Sequence[str]:
        """Sentences on what a person should know."""
        ...

    def labels(self) -> tuple[Tensor | None, list[str]]:
        """[N] int64 classes and their names, or None and none."""
        ...

    def read(self, index: int) -> bytes | Image.Image | Tensor:
        """The bytes of a file, an open image, or uint8 pixels [3, H, W].

        Raises:
            OSError: the file cannot be read.
            UnreadableImageError: what was read is no image.
        """
        ...

    def stamp(self, index: int) -> Stamp | None:
        """What changes when the image does, or None where nothing does.

        Raises:
            OSError: the file cannot be read.
        """
        ...
