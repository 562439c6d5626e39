"""Where a run prints: a terminal or a pipe that may be closed while training goes on."""

import contextlib
import os
import sys
from typing import Any, TextIO

from rich.console import Console


class Unbroken:
    """A text stream that drops what it cannot write.

    Args:
        stream: to write to; a terminal that was closed, or a pipe that nobody reads any more, is let go of.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._broken = False

    def write(self, text: str) -> int:
        """Write, or drop."""
        if not self._broken:
            try:
                return self._stream.write(text)
            except (OSError, ValueError):
                self._let_go()
        return len(text)

    def flush(self) -> None:
        """Flush, or nothing."""
        if not self._broken:
            try:
                self._stream.flush()
            except (OSError, ValueError):
                self._let_go()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _let_go(self) -> None:
        self._broken = True
        with contextlib.suppress(OSError, ValueError):  # so that Python's own flush at the end does not fail either
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


def run_console(*, quiet: bool = False) -> Console:
    """The console of a run, on standard output."""
    return Console(file=Unbroken(sys.stdout), quiet=quiet)  # type: ignore[arg-type]
