"""Files that grow by whole records: what a crash or a full disk left half written is cut off before the next one."""

import json
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vmf_pretrain.storage.durable import replace_durably
from vmf_pretrain.storage.tolerant import TolerantWrites

MOST_WAITING = 16 * 2**20  # bytes of records that wait in memory for the disk: some 50,000 lines of metrics


class Appended:
    """A file that records are appended to. While the disk refuses, records wait in memory, where the oldest give way first.

    Args:
        path: the file; its folder is made if it is missing.
        kind: what the user calls it.
        tolerant: counts and says what fails.
        start: what the file is to hold before the first record; None to go on with what it holds.
    """

    def __init__(self, path: Path, kind: str, tolerant: TolerantWrites, start: bytes | None) -> None:
        self.path, self._kind, self._tolerant = path, kind, tolerant
        self._start = start
        self._whole: int | None = None  # length up to the last whole record
        self._waiting: deque[bytes] = deque()
        self.lost = 0  # records that no memory was left for
        self._tolerant.attempt(self._kind, self._write)

    def append(self, record: bytes) -> None:
        """Append a record, and those that wait. It is in the file when this returns, unless the disk refuses."""
        self._waiting.append(record)
        self._tolerant.attempt(self._kind, self._write)
        while sum(map(len, self._waiting)) > MOST_WAITING:
            self._waiting.popleft()
            self.lost += 1

    def flush(self) -> None:
        """Try once more to write the records that wait; say it if some are lost for good."""
        if self._waiting or self._start is not None:
            self._tolerant.attempt(self._kind, self._write)
        missing = self.lost + len(self._waiting)
        if missing:
            self._tolerant.say(f"{missing} records of {self._kind} are lost.")

    def _write(self) -> None:
        if self._start is not None:
            self.path.parent.mkdir(exist_ok=True)
            replace_durably(self.path, self._start)
            self._whole, self._start = len(self._start), None
        if not self._waiting:
            return
        with self.path.open("ab") as file:
            if self._whole is None:
                self._whole = file.tell()
            if file.tell() > self._whole:  # a write before this one stopped half-way
                file.truncate(self._whole)
            file.write(b"".join(self._waiting))
            file.flush()
            self._whole = file.tell()
        self._waiting.clear()


class JsonLines:
    """A file of one JSON object per line.

    Args:
        path: the file.
        tolerant: counts and says what fails.
        keep: which of the records in the file stay, when a run goes on; a last line cut short by a crash never does.
    """

    def __init__(
        self, path: Path, tolerant: TolerantWrites, keep: Callable[[dict[str, Any]], bool] = lambda record: True
    ) -> None:
        kept = [record for record in read_lines(path) if keep(record)]
        start = "".join(json.dumps(record) + "\n" for record in kept).encode()
        self._file = Appended(path, path.name, tolerant, start)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record."""
        self._file.append((json.dumps(dict(record)) + "\n").encode())

    def flush(self) -> None:
        """Try once more to write what the disk refused."""
        self._file.flush()


class Followed:
    """The records of a file of JSON objects that another process appends to.

    Args:
        path: the file, which need not be there yet.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._read = path, 0  # bytes

    def new(self) -> list[dict[str, Any]]:
        """The whole records since the last call; from the start again if the file has become shorter, as on a resume."""
        try:
            size = self._path.stat().st_size
            if size < self._read:
                self._read = 0
            if size == self._read:
                return []
            with self._path.open("rb") as file:
                file.seek(self._read)
                found = file.read()
        except OSError:  # not there yet, or on a disk that is away for a while
            return []
        whole = found[: found.rfind(b"\n") + 1]
        self._read += len(whole)
        return _records(whole.decode("utf-8", errors="replace"))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Every record of a file of JSON objects; what follows a line that is none, cut short by a crash, is ignored.

    Raises:
        OSError: the file is there but cannot be read.
    """
    if not path.exists():
        return []
    return _records(path.read_text(encoding="utf-8", errors="replace"))


def _records(text: str) -> list[dict[str, Any]]:
    records = []
    for line in text.splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            break
        if not isinstance(record, dict):
            break
        records.append(record)
    return records
