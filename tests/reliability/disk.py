"""A disk that fails when it is told to: every file that Python opens to write, every rename, folder and fsync passes here.

Python's audit events see what any library asks for, whichever function it asks with.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from _typeshed import FileDescriptorLike

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
FULL, READ_ONLY = errno.ENOSPC, errno.EROFS


class Call(NamedTuple):
    """What is asked of the disk: "open", "rename", "mkdir" or "fsync", and the path below the watched folder."""

    what: str
    path: str


class Disk:
    """What has been asked so far; ``fails`` says for a number, counted from 0, and a call which error it ends in, or None."""

    def __init__(self, folder: Path, fails: Callable[[int, Call], int | None]) -> None:
        self.folder, self.fails = folder, fails
        self.calls: list[Call] = []
        self.failed: list[Call] = []

    def asked(self, what: str, path: Any) -> None:
        """Note a call below the folder, and fail if it is time."""
        if not isinstance(path, str | bytes | os.PathLike):
            return  # a descriptor, whose file was opened before
        whole = os.path.abspath(os.fsdecode(path))
        if os.path.commonpath([whole, self.folder]) != str(self.folder):
            return
        call = Call(what, os.path.relpath(whole, self.folder))
        self.calls.append(call)
        number = self.fails(len(self.calls) - 1, call)
        if number is not None:
            self.failed.append(call)
            raise OSError(number, os.strerror(number), whole)


_watched: list[Disk] = []  # an audit hook stays for ever: this says whether it has something to do


def _hear(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watched:
        return
    if event == "open" and arguments[2] & WRITES:
        _watched[-1].asked("open", arguments[0])
    elif event == "os.rename":
        _watched[-1].asked("rename", arguments[1])
    elif event == "os.mkdir":
        _watched[-1].asked("mkdir", arguments[0])


sys.addaudithook(_hear)


@contextlib.contextmanager
def disk(folder: Path, fails: Callable[[int, Call], int | None] = lambda number, call: None) -> Iterator[Disk]:
    """Watch all that is written below a folder, of this process and all its threads."""
    sync, watched = os.fsync, Disk(folder.resolve(), fails)

    def synced(fd: FileDescriptorLike) -> None:
        watched.asked("fsync", os.readlink(f"/proc/self/fd/{fd}"))
        sync(fd)

    os.fsync = synced
    _watched.append(watched)
    try:
        yield watched
    finally:
        _watched.remove(watched)
        os.fsync = sync
