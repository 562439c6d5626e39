"""Files that are written whole or not at all; neither writing nor deletion follows a symbolic link in a file's place."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


def write_durably(path: Path, content: bytes) -> None:
    """Write a new file and wait until it is on disk. Raises OSError, also if something is there, were it a symbolic link."""
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def replace_durably(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: whoever reads ``path``, even after a crash, finds the old content or the new.

    Raises:
        OSError: it cannot be written; the old content is still there, and nothing else.
    """
    with temporary(path.with_name(f".tmp-{path.name}")) as unfinished:
        write_durably(unfinished, content)
        os.replace(unfinished, path)
        sync_folder(path.parent)


@contextlib.contextmanager
def temporary(path: Path) -> Iterator[Path]:
    """Yields ``path``, at which nothing is; on exit, its file or folder is removed unless it was renamed.

    A file of a killed process is removed, and so is a link, which would lead what is written to another file.
    """
    remove(path)
    try:
        yield path
    finally:
        remove(path)


def remove(path: Path) -> None:
    """Remove a file, a folder with all in it, or a symbolic link but not what it leads to; what cannot be removed stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def leads_out(folder: Path) -> bool:
    """Whether ``folder`` is a symbolic link out of the folder that it stands in: nothing may be deleted through it."""
    return folder.is_symlink() and not folder.resolve().is_relative_to(folder.parent.resolve())


def sync_folder(folder: Path) -> None:
    """Wait until the folder's entries are on disk."""
    if os.name == "nt":  # cannot open a folder; NTFS journals its entries
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
