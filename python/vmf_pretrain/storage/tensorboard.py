"""TensorBoard events, written by whoever has something to say.

TensorBoard's own writer has a thread. If the disk refuses, the thread ends: later calls raise what it raised, and its last
records are lost. Here an event file is a file of records like any other (``lines.py``).
"""

import io
import os
import re
import socket
import time
from pathlib import Path
from typing import Any

from vmf_pretrain.storage.lines import Appended
from vmf_pretrain.storage.tolerant import TolerantWrites

VERSION = "brain.Event:2"  # how an event file says what it is
KIND = "tensorboard"
PREFIX = "events.out.tfevents."  # by which TensorBoard knows its files
MOMENT = re.compile(rf"{re.escape(PREFIX)}(\d{{10,11}})\.")  # seconds since 1970


class TensorBoardEvents:
    """One event file; nothing is written, and that is said once, where TensorBoard is not installed.

    Args:
        folder: for ``tensorboard --logdir``.
        from_step: events of earlier files at later steps are hidden.
        tolerant: counts and says what fails.
    """

    def __init__(self, folder: Path, from_step: int, tolerant: TolerantWrites) -> None:
        self._file: Appended | None = None
        try:
            from tensorboard.compat.proto import event_pb2, summary_pb2
        except ModuleNotFoundError as error:
            tolerant.say(f"No TensorBoard events are written: {error.name} is missing (pip install tensorboard).")
            return
        self._events, self._summaries = event_pb2, summary_pb2
        first = event_pb2.Event(wall_time=time.time(), file_version=VERSION)
        restart = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        purge = event_pb2.Event(wall_time=time.time(), step=from_step + 1, session_log=restart)
        start = _framed(first) + _framed(purge)
        self._file = Appended(_unused(folder), KIND, tolerant, start)

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Add numbers at a step."""
        if self._file is None:
            return
        values = [self._summaries.Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        summary = self._summaries.Summary(value=values)
        self._file.append(_framed(self._events.Event(wall_time=time.time(), step=step, summary=summary)))

    def flush(self) -> None:
        """Try once more to write what the disk refused."""
        if self._file is not None:
            self._file.flush()


def _framed(event: Any) -> bytes:
    """An event as it stands in the file: with its length and checksums."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    record = io.BytesIO()
    RecordWriter(record).write(event.SerializeToString())
    return record.getvalue()


def _unused(folder: Path) -> Path:
    """A new file's name, which comes after those in the folder: TensorBoard reads files in the order of their names."""
    # the clock may have been set back since, or stand in the same second
    before = [int(found[1]) for path in folder.glob(f"{PREFIX}*") if (found := MOMENT.match(path.name))]
    moment = max([int(time.time()), *(one + 1 for one in before)])
    return folder / f"{PREFIX}{moment:010d}.{socket.gethostname()}.{os.getpid()}"
