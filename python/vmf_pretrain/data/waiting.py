"""How much of a run's time goes by in waiting for data."""

import time
from collections.abc import Callable, Iterator
from typing import TypeVar

Item = TypeVar("Item")

TOO_MUCH = 0.2  # share of the time above which it is worth doing something
ADVICE = "raise data.workers, set data.cache, or lower views.local_count"


class Waiting(Iterator[Item]):
    """An iterator that times how long its items are waited for.

    Args:
        items: where the items come from.
        clock: seconds that only rise.
    """

    def __init__(self, items: Iterator[Item], clock: Callable[[], float] = time.perf_counter) -> None:
        self._items = items
        self._clock = clock
        self.restart()

    def __next__(self) -> Item:
        asked = self._clock()
        try:
            return next(self._items)
        finally:
            self.seconds += self._clock() - asked

    def restart(self) -> None:
        """Measure from now on."""
        self.seconds = 0.0
        self._since = self._clock()

    @property
    def share(self) -> float:
        """Share of the time since the last restart, 0 to 1."""
        passed = self._clock() - self._since
        return self.seconds / passed if passed > 0 else 0.0

    @property
    def advice(self) -> str | None:
        """What to do if the share is too large, else None."""
        if self.share <= TOO_MUCH:
            return None
        return f"{self.share:.0%} of the time is spent waiting for data; {ADVICE}."
