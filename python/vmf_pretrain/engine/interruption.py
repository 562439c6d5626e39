"""Signals set a flag that the loop reads between steps.

Ctrl-C and SIGTERM stop the run after a checkpoint; a second one ends the program at once. SIGUSR1 asks for a checkpoint only.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any, Self

from vmf_pretrain.engine.votes import Counts

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SAVE = getattr(signal, "SIGUSR1", None)  # not on Windows

REPEATED = 2.0  # seconds in which torchrun repeats a signal


class Interruption:
    """Context in which the first signal only sets ``requested``: nothing is saved inside a handler.

    Outside of Python's main thread, which alone gets signals, it changes nothing.
    """

    def __init__(self) -> None:
        self.requested: signal.Signals | None = None
        self._asked = self._said = 0  # requests for a checkpoint, and those that the ranks have been told of
        self._noted = 0.0
        # torchrun passes on a Ctrl-C that the ranks got from the terminal as well: that is no second one
        self._repeated = REPEATED if "TORCHELASTIC_RUN_ID" in os.environ else 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
            if SAVE is not None:
                self._before[SAVE] = signal.signal(SAVE, self._ask)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def votes(self, bad_images: int, collapsed: int = 0) -> Counts:
        """What this rank says to the others; a request for a checkpoint is said once."""
        asked, before = self._asked, self._said
        self._said = asked
        terminate, interrupt = (self.requested is number for number in (signal.SIGTERM, signal.SIGINT))
        return Counts(bad_images, int(terminate), int(interrupt), int(asked > before), collapsed)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked += 1

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.requested is None:
            self.requested, self._noted = signal.Signals(number), now
        elif now - self._noted > self._repeated:
            for each in SIGNALS:
                signal.signal(each, self._before[each])
            signal.raise_signal(number)


@contextlib.contextmanager
def no_requests() -> Iterator[None]:
    """SIGUSR1 does nothing here, where it would end the process by default: there is nothing to save yet, or no longer."""
    if SAVE is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(SAVE, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(SAVE, before)
