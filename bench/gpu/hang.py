"""Distinguishes a slow call from one that hangs: at its time limit, a slow call still runs Python.

A kernel that never ends keeps the host inside a wait, where no signal handler of Python's runs; a thread of C ends the process.
"""

from __future__ import annotations

import contextlib
import faulthandler
import signal
import threading
from collections.abc import Iterator

HANG_SECONDS = 8  # after its limit that a call may go on without running Python
RING_AGAIN_SECONDS = 5.0  # a compiler that catches everything may swallow the first
STANDARD_ERROR = 2


class OvertimeError(Exception):
    """A call exceeded its time limit."""


@contextlib.contextmanager
def limited(seconds: float, *, may_hang: bool) -> Iterator[None]:
    """Raise ``OvertimeError`` in the main thread after so long; elsewhere no limit can be set, and none is.

    ``may_hang``: where no Python runs for ``HANG_SECONDS`` more, the process ends, and says where it stood.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(_signal: int, _frame: object) -> None:
        raise OvertimeError(f"took more than {seconds:.0f} s")

    previous = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds, RING_AGAIN_SECONDS)
    if may_hang:
        faulthandler.dump_traceback_later(seconds + HANG_SECONDS, exit=True, file=STANDARD_ERROR)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
