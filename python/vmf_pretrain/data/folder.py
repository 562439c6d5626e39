"""A folder of image files, searched recursively.

Links are followed. What is skipped is counted: hidden entries, files of other kinds, links that lead nowhere or in a circle.
"""

import errno
import os
import stat
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, tensor

from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.data.decode import SUFFIXES
from vmf_pretrain.data.plain_files import read_plain
from vmf_pretrain.data.source import Names, Stamp

HIDDEN = "hidden files and folders"
OTHERS = "files of other kinds"
RUNS = "folders of runs"
RUN_HOLDS = {"config.yaml", "checkpoints"}
CIRCLES = "links that lead in a circle"
BROKEN = "links that lead nowhere"

File = tuple[tuple[str, ...], int]  # parts of a path below the root, size in bytes


class FolderSource:
    """The images below a folder, sorted by path.

    Attributes:
        classes: [N] the first sub-folder of each image; None where it lies in none.

    Args:
        root: the folder.
        suffixes: endings of file names that are taken, in lower case.
        setting: that names the folder, for errors.

    Raises:
        PretrainError: the folder does not exist, cannot be entered in whole, or holds no such file.
    """

    def __init__(self, root: Path, suffixes: Sequence[str] = SUFFIXES, *, setting: str = "data.folder") -> None:
        self.root = root
        files, self.skipped = files_below(root, suffixes, setting=setting)
        if not files:
            raise PretrainError(f"{setting} {root} holds no image; expected files ending in {', '.join(suffixes)}.")
        self.paths = Names([str(Path(*parts)) for parts, _ in files])
        self.sizes: NDArray[np.int64] = np.array([size for _, size in files], dtype=np.int64)
        self.notes: Sequence[str] = ()
        self.classes: Sequence[str | None] = [parts[0] if len(parts) > 1 else None for parts, _ in files]

    @property
    def names(self) -> Sequence[str]:
        """Paths below the folder."""
        return self.paths

    def read(self, index: int) -> bytes:
        """The bytes of a file."""
        return read_plain(self.root / self.paths[index])

    def stamp(self, index: int) -> Stamp:
        """Size and time of the file."""
        found = (self.root / self.paths[index]).stat()
        return Stamp(found.st_size, found.st_mtime_ns)

    def labels(self) -> tuple[Tensor | None, list[str]]:
        """[N] int64 classes by first sub-folder, and their names; none if an image lies outside or there is one class."""
        return labels_of(self.classes)


def labels_of(classes: Sequence[str | None]) -> tuple[Tensor | None, list[str]]:
    """[N] int64 places of the classes among their sorted names, and those names; none if one lacks or all are the same."""
    names = sorted({name for name in classes if name is not None})
    if len(names) < 2 or None in classes:
        return None, []
    places = {name: place for place, name in enumerate(names)}
    return tensor([places[name] for name in classes if name is not None]), names


def files_below(
    root: Path, suffixes: Sequence[str], *, setting: str = "data.folder"
) -> tuple[list[File], Counter[str]]:
    """Files below ``root``, sorted by the parts of their paths; and what was skipped.

    Raises:
        PretrainError: ``root`` is no folder, or a folder cannot be entered.
    """
    if not root.is_dir():
        raise PretrainError(f"{setting} {root} is not a folder; expected one with images.")
    # a link to a folder above the root is a circle too: it leads back to the root
    whole = root.resolve()
    search = _Search(tuple(suffixes), frozenset((at.st_dev, at.st_ino) for at in map(os.stat, whole.parents)))
    while search.waiting:
        parts, above = search.waiting.pop()
        folder = root.joinpath(*parts)
        try:
            search.enter(folder, parts, above)
        except OSError as error:
            raise PretrainError(f"folder {folder} cannot be searched ({error.strerror}); mend or remove it.") from None
    return sorted(search.found), search.skipped


class _Search:
    """Files found so far, and folders that wait to be entered, each with the folders above it."""

    def __init__(self, suffixes: tuple[str, ...], above: frozenset[tuple[int, int]]) -> None:
        self.suffixes = suffixes
        self.found: list[File] = []
        self.waiting: list[tuple[tuple[str, ...], frozenset[tuple[int, int]]]] = [((), above)]
        self.skipped: Counter[str] = Counter()

    def enter(self, folder: Path, parts: tuple[str, ...], above: frozenset[tuple[int, int]]) -> None:
        """Look at every entry of a folder."""
        status = folder.stat()
        here = above | {(status.st_dev, status.st_ino)}
        with os.scandir(folder) as found:
            entries = list(found)
            if {entry.name for entry in entries} >= RUN_HOLDS:
                self.skipped[RUNS] += 1  # its plots are no data: the next run would see other images
                return
            for entry in entries:
                kind = self._kind_skipped(entry, (*parts, entry.name), here)
                if kind is not None:
                    self.skipped[kind] += 1

    def _kind_skipped(
        self, entry: "os.DirEntry[str]", parts: tuple[str, ...], above: frozenset[tuple[int, int]]
    ) -> str | None:
        """Keep an entry, or say as what it is skipped."""
        if entry.name.startswith("."):
            return HIDDEN
        try:
            status = entry.stat()
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ELOOP) and entry.is_symlink():
                return BROKEN if error.errno == errno.ENOENT else CIRCLES
            raise
        if stat.S_ISDIR(status.st_mode):
            if (status.st_dev, status.st_ino) in above:
                return CIRCLES
            self.waiting.append((parts, above))
        elif stat.S_ISREG(status.st_mode) and entry.name.lower().endswith(self.suffixes):
            self.found.append((parts, status.st_size))
        else:
            return OTHERS
        return None
