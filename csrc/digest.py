"""What a compiled module was built from, as one number: setup.py puts it into the module, ``bench.gpu.module`` compares.

Run or imported by path, for an isolated build has no package around it.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

SUFFIXES = (".cpp", ".cu", ".cuh", ".h")
DIGITS = 16  # of 64: no one forges them


def source_digest(folder: Path) -> str:
    """Of the names and bytes of a folder's sources; 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.glob("*") if path.suffix in SUFFIXES):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:DIGITS]
