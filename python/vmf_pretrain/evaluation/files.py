"""Which files a result depends on, beside images."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from vmf_pretrain.config.errors import PretrainError


def digest_of(files: Iterable[Path]) -> str:
    """SHA-256 of the names, sizes and times of files, as they stand, without reading them.

    Raises:
        PretrainError: one cannot be looked at.
    """
    found = hashlib.sha256()
    for path in files:
        try:
            status = path.stat()
        except OSError as error:
            raise PretrainError(f"{path} cannot be read ({error.strerror}).") from None
        found.update(f"{path.name}\t{status.st_size}\t{status.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
    return found.hexdigest()
