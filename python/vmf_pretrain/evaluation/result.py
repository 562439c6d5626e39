"""What a task finds: figures with their intervals, a row for each image or query, and pictures."""

import csv
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vmf_pretrain.evaluation.pictures import plot_intervals
from vmf_pretrain.storage.durable import replace_durably

RESULT = "result.json"  # written last: the sign that a task has finished


@dataclass(frozen=True)
class Figure:
    """One number.

    Attributes:
        name: for people, such as "top-1, k 20".
        value: the number.
        low, high: of its 95 % bootstrap interval, or None.
        unit: "%" or another.
        spread: standard deviation over draws, of which ``value`` is the mean, or None.
    """

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    unit: str = "%"
    spread: float | None = None

    def __post_init__(self) -> None:
        if not math.isfinite(self.value):
            raise ValueError(f"{self.name} is {self.value}; a figure must be finite")


@dataclass(frozen=True, eq=False)
class Result:
    """What a task found.

    Attributes:
        figures: the numbers, at least one, the most important one first; ``figures.png`` shows those of its unit.
        rows: one of each image or query, by column; for the CSV.
        pictures: by name without ending, what writes a PNG to a path.
        notes: sentences on how the figures came about, that a reader needs to compare them.
        facts: anything else that JSON holds, such as counts.
    """

    figures: Sequence[Figure]
    rows: Sequence[Mapping[str, Any]] = ()
    pictures: Mapping[str, Callable[[Path], None]] = field(default_factory=dict)
    notes: Sequence[str] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)


def write_result(folder: Path, result: Result, depends: Mapping[str, Any]) -> None:
    """Write PNGs (``figures.png`` of the figures, those of the task), ``rows.csv`` and, last, ``result.json``.

    Args:
        folder: of the task; made if it is missing.
        result: of the task.
        depends: what the result depends on and was made with, as JSON holds it.

    Raises:
        OSError: the disk is full or read-only; there is no ``result.json`` then.
    """
    folder.mkdir(parents=True, exist_ok=True)
    alike = [figure for figure in result.figures if figure.unit == result.figures[0].unit]
    lines = [(figure.name, figure.value, figure.low, figure.high) for figure in alike]
    plot_intervals(lines, result.figures[0].unit, folder / "figures.png")
    for name, draw in result.pictures.items():
        draw(folder / f"{name}.png")
    if result.rows:
        replace_durably(folder / "rows.csv", _csv(result.rows))
    figures = [asdict(figure) for figure in result.figures]
    said = {"figures": figures, "notes": list(result.notes), "facts": dict(result.facts), **depends}
    replace_durably(folder / RESULT, (json.dumps(said, indent=2) + "\n").encode())


def read_result(folder: Path) -> Result | None:
    """Figures, notes and facts of a task that has finished, without rows and pictures; None if it has not."""
    try:
        said = json.loads((folder / RESULT).read_text(encoding="utf-8"))
        figures = [Figure(**figure) for figure in said["figures"]]
        return Result(figures, notes=list(said["notes"]), facts=dict(said["facts"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _csv(rows: Sequence[Mapping[str, Any]]) -> bytes:
    text = io.StringIO()
    table = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    return text.getvalue().encode("utf-8", "surrogateescape")
