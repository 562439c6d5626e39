"""Files of strangers: plain ones alone, of bounded size, whatever has become of them since their folder was searched."""

import os
import stat
from pathlib import Path
from typing import BinaryIO

from vmf_pretrain.data.bad_images import UnreadableImageError

LARGEST_IMAGE = 2**30  # bytes of a file; as many pixels as are decoded have half of that in 16-bit RGB


def open_plain(path: Path) -> BinaryIO:
    """The file, open for reading.

    Raises:
        UnreadableImageError: it is a pipe, a device or a socket, which could be waited for or read without end.
        OSError: it cannot be opened.
    """
    file = open(path, "rb", opener=_at_once)  # noqa: SIM115 -- the caller closes it
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise UnreadableImageError("it is no plain file")
    return file


def read_plain(path: Path) -> bytes:
    """The bytes of a file.

    Raises:
        UnreadableImageError: as ``open_plain``, or it is larger than LARGEST_IMAGE.
        OSError: it cannot be read.
    """
    with open_plain(path) as file:
        require_bounded(os.fstat(file.fileno()).st_size)
        return file.read(LARGEST_IMAGE)  # it may grow just now


def require_bounded(size: int) -> None:
    """Raise UnreadableImageError if an encoded image of ``size`` bytes is larger than LARGEST_IMAGE."""
    if size > LARGEST_IMAGE:
        raise UnreadableImageError(f"{size} bytes are more than {LARGEST_IMAGE}")


def _at_once(path: str, flags: int) -> int:
    """Opens a pipe without waiting for somebody to write to it."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
