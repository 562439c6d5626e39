"""Attempts whose failure is a result: one loss that fails must not end the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from vmf_bench.errors import DisagreementError, LeftOutError, UnavailableError

Result = TypeVar("Result")
LONGEST_REASON = 300  # characters: compilers print pages
STATUSES: tuple[tuple[type[Exception], str], ...] = (
    (UnavailableError, "not available"),
    (LeftOutError, "left out"),
    (DisagreementError, "disagrees"),
    (torch.OutOfMemoryError, "out of memory"),
    (MemoryError, "out of memory"),
)
FAULTS = ("disagrees", "failed", "out of memory")  # statuses that tell against the loss
KINDS = ("not available", "left out", "disagrees")  # whose message is the whole reason


def attempt(action: Callable[[], Result]) -> tuple[Result | None, dict[str, str]]:
    """The result and {"status": "ok"}; or None, the status and the reason."""
    try:
        return action(), {"status": "ok"}
    except Exception as error:  # code of others may raise anything, and what it raises is what the row shows
        status = next((status for kind, status in STATUSES if isinstance(error, kind)), "failed")
        text = " ".join(str(error).split())[:LONGEST_REASON]
        return None, {"status": status, "reason": text if status in KINDS else f"{type(error).__name__}: {text}"}
