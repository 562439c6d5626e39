"""Where measurements show that these kernels are faster than Triton's; "auto" follows this table.

The table is ``measured.json`` beside this file, ``{compute capability * 10: {"bf16" or "fp16": {width: [measurement, ...]}}}``.
A command of bench/ writes it from a committed result file. It starts empty: "auto" takes nothing that was not measured.

Legend: R rows, K prototypes, D embedding dim.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

TABLE_PATH = Path(__file__).parent / "measured.json"
MOST_TIMES = 2  # a measurement with more than so many times the prototypes is ignored; chosen, not measured


class Measurement(NamedTuple):
    """A forward and backward pass of both backends, measured side by side. Entries of the table have these fields."""

    rows: int  # the student's
    prototypes: int
    cuda_ms: float
    triton_ms: float
    source: str  # the result file in bench/results

    @property
    def won(self) -> bool:
        """Whether these kernels were faster."""
        return self.cuda_ms < self.triton_ms


def wins(arch: int, element: str, width: int, rows: int, prototypes: int) -> bool:
    """Whether these kernels were faster at the nearest measured numbers of rows, below and above ``rows``.

    Above the largest measured number of rows, that one decides. Below the smallest, the answer is no. Measurements with more
    than twice the prototypes are ignored: with fewer prototypes, launches and the steps between the passes weigh more.

    Args:
        arch: compute capability * 10.
        element: "bf16" or "fp16".
        width: D with its padding.
        rows: R.
        prototypes: K.
    """
    known = [one for one in measurements(arch, element, width) if one.prototypes <= MOST_TIMES * prototypes]
    below = max((one.rows for one in known if one.rows <= rows), default=None)
    above = min((one.rows for one in known if one.rows >= rows), default=below)
    return below is not None and all(one.won for one in known if one.rows in (below, above))


def measurements(arch: int, element: str, width: int) -> list[Measurement]:
    """The table's entries for one device family, dtype and width."""
    entries = table().get(str(arch), {}).get(element, {}).get(str(width), [])
    return [Measurement(**entry) for entry in entries]


@functools.cache
def table() -> Mapping[str, Any]:
    """The parsed ``measured.json``."""
    parsed: Mapping[str, Any] = json.loads(TABLE_PATH.read_text())["measured"]
    return parsed
