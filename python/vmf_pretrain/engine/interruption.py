"""Ctrl-C and SIGTERM set a flag that the loop reads between steps; a second signal ends the program at once."""

import signal
from types import FrameType, TracebackType
from typing import Self

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """Context in which the first signal only sets ``requested``: nothing is saved inside a handler."""

    def __init__(self) -> None:
        self.requested: signal.Signals | None = None

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def exit_code(self) -> int:
        """128 plus the signal's number, as shells report it; 0 without one."""
        return 0 if self.requested is None else 128 + self.requested

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = signal.Signals(number)
        for each, handler in self._before.items():
            signal.signal(each, handler)
