"""The numbers of a run as it goes: metrics.jsonl, and the same as TensorBoard events."""

import math
from collections.abc import Mapping
from typing import Any

from vmf_pretrain.storage.lines import JsonLines, read_lines
from vmf_pretrain.storage.run_folder import RunFolder
from vmf_pretrain.storage.tensorboard import TensorBoardEvents
from vmf_pretrain.storage.tolerant import TolerantWrites
from vmf_pretrain.storage.trackers import Tracked

NO_SCALARS = ("step", "steps")  # where a record is in the run


class MetricsLog:
    """metrics.jsonl and TensorBoard events. On resume, records of steps that will run again are removed.

    Args:
        folder: of the run.
        from_step: the step that training begins or goes on at.
        tolerant: counts and says what the disk refuses; nothing here raises OSError for it.
        tensorboard: whether events are written beside metrics.jsonl.
        tracked: other libraries that get the same numbers.
    """

    def __init__(
        self,
        folder: RunFolder,
        from_step: int,
        tolerant: TolerantWrites | None = None,
        *,
        tensorboard: bool = True,
        tracked: Tracked | None = None,
    ) -> None:
        tolerant = tolerant or TolerantWrites()
        self._lines = JsonLines(folder.metrics, tolerant, lambda record: record.get("step", 0) <= from_step)
        self._events = TensorBoardEvents(folder.tensorboard, from_step, tolerant) if tensorboard else None
        self._tracked = tracked

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record; every number except the steps also becomes a TensorBoard scalar. Not finite becomes null."""
        finite = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in record.items()}
        self._lines.write(finite)
        numbers = {
            key: value for key, value in finite.items() if key not in NO_SCALARS and isinstance(value, int | float)
        }
        if self._events is not None:
            self._events.write(int(record["step"]), numbers)
        if self._tracked is not None and numbers:
            self._tracked.write(int(record["step"]), numbers)

    def close(self) -> None:
        """Try once more to write what the disk refused; say what is lost. Otherwise every record is in the files already."""
        self._lines.flush()
        if self._events is not None:
            self._events.flush()
        if self._tracked is not None:
            self._tracked.close()


def read_metrics(folder: RunFolder) -> list[dict[str, Any]]:
    """Every record so far; a last line cut short by a crash is ignored."""
    return read_lines(folder.metrics)
