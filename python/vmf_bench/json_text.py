"""The record as JSON that every parser reads."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any


def json_text(record: Mapping[str, Any], *, indent: int | None = None) -> str:
    """JSON of a record; numbers that JSON has no word for, NaN and infinities, become null."""
    return json.dumps(_finite(record), indent=indent, allow_nan=False)


def json_in_html(record: Mapping[str, Any]) -> str:
    """The same for a script element, which no text in it can end or comment out."""
    return json_text(record).replace("<", "\\u003c")


def _finite(value: Any) -> Any:
    """The value with None for every number in it that is not finite."""
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
