"""Where measurements show that these kernels beat Triton's: what "auto" goes by.

The table is ``measured.json`` beside this file, ``{compute capability * 10: {"bf16" or "fp16": {width: [measurement, ...]}}}``,
written by a command of bench/ from a committed result file. Nothing is taken that nobody measured: the table starts empty.

Legend: R rows, K prototypes, D embedding dim.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

TABLE_PATH = Path(__file__).parent / "measured.json"
MOST_TIMES = 2  # the prototypes at hand, in a measurement that still tells something of them: a choice, not measured


class Measurement(NamedTuple):
    """One forward and backward pass of both backends, measured side by side; an entry of the table has these fields."""

    rows: int  # the student's
    prototypes: int
    cuda_ms: float
    triton_ms: float
    source: str  # the result file in bench/results that it is from

    @property
    def won(self) -> bool:
        """Whether these kernels were the faster ones."""
        return self.cuda_ms < self.triton_ms


def wins(arch: int, element: str, width: int, rows: int, prototypes: int) -> bool:
    """Whether these kernels were faster at the nearest measured numbers of rows on either side.

    Beyond the most rows that were measured those decide; below the fewest nothing is known, and the answer is no. Measurements
    of more than twice the prototypes tell nothing: with fewer, launches and what lies between the passes weigh more.

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
