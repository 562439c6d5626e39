"""Results that are written to disk as soon as they are known, and attempts whose failure is a result."""

from __future__ import annotations

import json
import os
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from vmf_bench.errors import DisagreementError, UnavailableError

Result = TypeVar("Result")
TRACEBACK_LINES = 12
REASONS: tuple[tuple[type[Exception], str], ...] = (
    (UnavailableError, "not available"),
    (DisagreementError, "refused"),
    (torch.cuda.OutOfMemoryError, "out of memory"),
)


class Record:
    """A JSON object in a file, rewritten whole at every change, so that a cut-off loses nothing; threads may share it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data: dict[str, Any] = {}
        self.lock = threading.RLock()
        path.parent.mkdir(parents=True, exist_ok=True)

    def put(self, *keys: str, value: Any) -> None:
        """Set ``data[keys[0]][keys[1]]...`` and save."""
        with self.lock:
            target = self.data
            for key in keys[:-1]:
                target = target.setdefault(key, {})
            target[keys[-1]] = value
            self.save()

    def save(self) -> None:
        """Write the file; a reader sees the old one or the new one."""
        with self.lock:
            partial = self.path.with_suffix(".partial")
            partial.write_text(json.dumps(self.data, indent=1, allow_nan=True) + "\n")
            os.replace(partial, self.path)


class Under:
    """A record's object under a key, to be written to like a record."""

    def __init__(self, record: Record, key: str) -> None:
        self.record, self.key = record, key

    def put(self, *keys: str, value: Any) -> None:
        """Set the value under the key, and save."""
        self.record.put(self.key, *keys, value=value)


def attempt(action: Callable[[], Result]) -> tuple[Result | None, dict[str, str]]:
    """The result and {"status": "ok"}, or None and why there is none: one benchmark's failure must not end the others."""
    try:
        return action(), {"status": "ok"}
    except Exception as error:  # whatever fails is what gets recorded
        status = next((status for kind, status in REASONS if isinstance(error, kind)), "failed")
        outcome = {"status": status, "reason": f"{type(error).__name__}: {error}"[:2000]}
        if status == "failed":
            outcome["traceback"] = "".join(traceback.format_exception(error)[-TRACEBACK_LINES:])[-4000:]
        return None, outcome
