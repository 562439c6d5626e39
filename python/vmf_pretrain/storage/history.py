"""How a run started and ended, each time: history.jsonl."""

from collections.abc import Mapping
from typing import Any, Literal

from vmf_pretrain.storage.lines import JsonLines, read_lines
from vmf_pretrain.storage.run_folder import RunFolder
from vmf_pretrain.storage.tolerant import TolerantWrites

How = Literal["finished", "stopped", "failed"]


class History:
    """Starts and ends of a run, appended to what earlier processes wrote.

    Args:
        folder: of the run.
        tolerant: counts and says what the disk refuses.
    """

    def __init__(self, folder: RunFolder, tolerant: TolerantWrites) -> None:
        self._lines = JsonLines(folder.history, tolerant)

    def started(self, step: int, facts: Mapping[str, Any]) -> None:
        """The run begins or goes on at a step; ``facts`` are the command, the time, versions, machine and images."""
        self._lines.write({"event": "start", "step": step, **facts})

    def ended(self, step: int, how: How, reason: str, time: str, *, traceback: str = "") -> None:
        """The run has ended after a step, and why: in a sentence or nothing, and where in the program, if it has crashed."""
        event = {"event": "end", "step": step, "how": how, "reason": reason, "time": time, "traceback": traceback}
        self._lines.write(event)
        self._lines.flush()


def read_history(folder: RunFolder) -> list[dict[str, Any]]:
    """Every start and end so far; nothing of a run that an earlier version made."""
    return read_lines(folder.history)
