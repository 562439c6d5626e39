"""Tar shards as WebDataset writes them, indexed once and then read at random, so that order and resume are a folder's.

A member is found by its offset; its name is never used as a path.
"""

import tarfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.data.bad_images import UnreadableImageError, first_names
from vmf_pretrain.data.decode import SUFFIXES
from vmf_pretrain.data.folder import files_below, labels_of
from vmf_pretrain.data.plain_files import open_plain, require_bounded
from vmf_pretrain.data.source import Names, Stamp

ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
CLASS_SUFFIX = ".cls"
LARGEST_CLASS = 32  # bytes of a class number
OTHERS = "members of other kinds"
HIDDEN = "hidden members"
NOT_FILES = "members that are no plain files"
OUTSIDE = "members whose names lead out of the archive"
CUT = "members cut off at the end of a shard"


@dataclass
class ShardIndex:
    """What a shard holds: images by name, offset and size in bytes; classes by key; what was skipped; names that are cut."""

    images: list[tuple[str, int, int]] = field(default_factory=list)
    classes: dict[str, str] = field(default_factory=dict)
    skipped: Counter[str] = field(default_factory=Counter)
    cut: list[str] = field(default_factory=list)


class ShardSource:
    """The images in the tar files below a folder: shards by path, members in their order.

    Args:
        root: the folder of the shards.

    Raises:
        PretrainError: there is no image, or a shard is compressed, damaged, or has a class that is no number.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        files, self.skipped = files_below(root, ARCHIVES)
        self.shards = [root.joinpath(*parts) for parts, _ in files]
        indices = [index_shard(shard) for shard in self.shards]
        images = [(place, *image) for place, index in enumerate(indices) for image in index.images]
        if not images:
            raise PretrainError(
                f"data.folder {root} holds no tar shard with an image; expected .tar files with {', '.join(SUFFIXES)}."
            )
        self.names = Names([f"{self.shards[place].relative_to(root)}/{name}" for place, name, _, _ in images])
        self._places: NDArray[np.int64] = np.array([(place, at, size) for place, _, at, size in images], dtype=np.int64)
        self._classes = [indices[place].classes.get(_key(name)) for place, name, _, _ in images]
        for index in indices:
            self.skipped += index.skipped
        cut = [f"{shard.name}/{name}" for shard, index in zip(self.shards, indices, strict=True) for name in index.cut]
        self.notes = [f"Cut off at the end of a shard, and not used: {first_names(cut)}."] if cut else []
        given = sum(name is not None for name in self._classes)
        if 0 < given < len(images):
            self.notes.append(f"Only {given} of {len(images)} images have a class ({CLASS_SUFFIX}), so none is used.")

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Bytes of each image."""
        sizes: NDArray[np.int64] = self._places[:, 2]
        return sizes

    def read(self, index: int) -> bytes:
        """The bytes of a member; the shard is opened for each, because thousands of open files are too many."""
        place, offset, size = (int(value) for value in self._places[index])
        require_bounded(size)  # a sparse file of a few blocks may claim any size
        with open_plain(self.shards[place]) as file:
            file.seek(offset)
            encoded = file.read(size)
        if len(encoded) < size:
            raise UnreadableImageError(f"its shard has been cut since the run began: {len(encoded)} of {size} bytes")
        return encoded

    def stamp(self, index: int) -> Stamp:
        """Size of the member and time of its shard."""
        place, _, size = (int(value) for value in self._places[index])
        return Stamp(size, self.shards[place].stat().st_mtime_ns)

    def labels(self) -> tuple[Tensor | None, list[str]]:
        """[N] int64 classes by .cls members, and their names; none if an image has none or there is one class."""
        return labels_of(self._classes)


def index_shard(path: Path) -> ShardIndex:
    """What a shard holds; of one that is cut, what is whole.

    Raises:
        PretrainError: the shard is compressed, is no tar file, or has a class that is no number.
    """
    index = ShardIndex()
    try:
        length = path.stat().st_size
        with path.open("rb") as file:
            _refuse_compressed(path, file.read(8))
        with tarfile.open(path, "r:") as archive:
            _read_members(archive, length, index)
    except tarfile.ReadError as error:
        if not index.images:
            raise PretrainError(f"shard {path} is no tar file ({error}); mend or remove it.") from None
        index.cut.append("whatever follows the last whole member")
        index.skipped[CUT] += 1
    except OSError as error:
        raise PretrainError(f"shard {path} cannot be read ({error.strerror}); mend or remove it.") from None
    except ValueError as error:
        raise PretrainError(f"shard {path}: {error}") from None
    return index


def _read_members(archive: tarfile.TarFile, length: int, index: ShardIndex) -> None:
    while True:
        try:
            member = archive.next()
        except tarfile.ReadError:
            if index.cut:  # the end that the last member says lies beyond the end of the file
                return
            raise
        if member is None:
            if not _is_end_mark(archive):
                raise tarfile.ReadError("no header and no end mark after the last whole member")
            return
        if member.isreg() and not member.issparse() and member.offset_data + member.size > length:
            index.cut.append(member.name)
            index.skipped[CUT] += 1
        else:
            _sort(archive, member, index)


def _is_end_mark(archive: tarfile.TarFile) -> bool:
    """Whether the archive ends where tarfile stopped, which it also does at a damaged header."""
    assert archive.fileobj is not None
    archive.fileobj.seek(archive.offset)
    return archive.fileobj.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)


def _sort(archive: tarfile.TarFile, member: tarfile.TarInfo, index: ShardIndex) -> None:
    """Put a whole member where it belongs."""
    name = PurePosixPath(member.name)
    if name.is_absolute() or ".." in name.parts:
        index.skipped[OUTSIDE] += 1
    elif member.isdir():
        pass
    elif not member.isreg() or member.issparse():
        index.skipped[NOT_FILES] += 1
    elif any(part.startswith(".") for part in name.parts):
        index.skipped[HIDDEN] += 1
    elif name.suffix.lower() == CLASS_SUFFIX:
        index.classes[_key(member.name)] = _class_in(archive, member)
    elif name.suffix.lower() in SUFFIXES:
        index.images.append((member.name, member.offset_data, member.size))
    else:
        index.skipped[OTHERS] += 1


def _class_in(archive: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    file = archive.extractfile(member)
    text = b"" if file is None else file.read(LARGEST_CLASS + 1)
    try:
        return f"{int(text):08d}"  # sorted as text as they are as numbers
    except ValueError:
        raise ValueError(
            f"member {member.name} holds {text[:LARGEST_CLASS]!r}; expected the number of a class."
        ) from None


def _key(name: str) -> str:
    """What the members of one sample share: the name to the first point of its last part."""
    folder, _, base = name.rpartition("/")
    return f"{folder}/{base.partition('.')[0]}"


def _refuse_compressed(path: Path, start: bytes) -> None:
    for magic, kind in COMPRESSED.items():
        if start.startswith(magic):
            raise PretrainError(
                f"shard {path} is compressed with {kind}; decompress it, because its images are read at random "
                "(they are compressed themselves, so the tar file grows little)."
            )
