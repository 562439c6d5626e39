"""A run goes on when one of its files cannot be written, and says so: one mechanism for all that is not a checkpoint."""

import warnings
from collections import Counter
from collections.abc import Callable


def warn(sentence: str) -> None:
    """Say a sentence as a warning of Python, each one time."""
    warnings.warn(sentence, stacklevel=3)


class TolerantWrites:
    """Tries writes, and counts and says those that fail.

    Args:
        say: takes a sentence for the user; called once for each kind of file and reason, and when a kind is written again.
    """

    def __init__(self, say: Callable[[str], None] = warn) -> None:
        self.say = say
        self._said: set[tuple[str, str]] = set()
        self._failing: set[str] = set()
        self.failures: Counter[str] = Counter()  # writes that failed, by kind

    def attempt(self, kind: str, write: Callable[[], object]) -> bool:
        """Call ``write``; True if it worked, False if the disk refused.

        Args:
            kind: which files are written, as the user calls them: "metrics.jsonl", "plots", "summary.json".
            write: raises OSError if the disk is full, gone or read-only; anything else that it raises is raised.
        """
        try:
            write()
        except OSError as error:
            self.failures[kind] += 1
            self._failing.add(kind)
            reason = error.strerror or str(error)
            if (kind, reason) not in self._said:
                self._said.add((kind, reason))
                self.say(f"{kind} could not be written: {reason}; training goes on, and it is tried again each time.")
            return False
        if kind in self._failing:
            self._failing.remove(kind)
            self._said = {
                (said, reason) for said, reason in self._said if said != kind
            }  # the next trouble is news again
            self.say(f"{kind} is written again, after {self.failures[kind]} failures in all.")
        return True
