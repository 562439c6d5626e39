"""Histograms over the steps as inline SVG: a column of bins for each evaluation, the darker the fuller."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vmf_pretrain.report.page.chart import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Axis, short
from vmf_pretrain.report.page.markup import Html, csv_link, number, text

MOST_COLUMNS = 48  # of more evaluations, some at even distances
LEAST_SPAN = 1.3  # ratio of the axis' ends
MARGIN = 1.1  # ratio beyond the outermost bins
FAINTEST = 0.12  # opacity of a bin that holds one thing


@dataclass(frozen=True)
class Heat:
    """What is drawn.

    Attributes:
        title: above it.
        y: title of the axis of the bins, which is logarithmic.
        columns: step and histogram, as ``evaluation/histograms.py`` has it, with bins.
        mark: a value that is marked by a line, and what it is; or None.
        note: a sentence below the title.
    """

    title: str
    y: str
    columns: Sequence[tuple[int, Mapping[str, Any]]]
    mark: tuple[float, str] | None
    note: str


def drawn(heat: Heat) -> Html:
    """The figure, with the histograms as CSV."""
    columns = _some(heat.columns)
    axis = _axis(heat, columns)
    width = (WIDTH - RIGHT - LEFT) / len(columns)
    inner = "".join(
        part for place, column in enumerate(columns) for part in _column(LEFT + place * width, width, column, axis)
    )
    rows = [row for step, found in heat.columns for row in _rows(step, found)]
    save = csv_link(f"{heat.title}.csv", ["step", "from", "to", "prototypes"], rows)
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{text(_said(heat))}">'
    frame = "".join(_frame(heat, columns, axis, width))
    return Html(
        f'<figure class="heat"><figcaption><strong>{text(heat.title)}</strong> <span class="note">{text(heat.note)}</span>'
        f'</figcaption>{svg}{frame}{inner}{_mark(heat, axis)}</svg><p class="below">{save}</p></figure>'
    )


def edges(found: Mapping[str, Any]) -> list[float]:
    """The ends of a histogram's bins, at even ratios."""
    low, high, count = float(found["low"]), float(found["high"]), len(found["counts"])
    return [low * (high / low) ** (place / count) for place in range(count + 1)]


def _some(columns: Sequence[tuple[int, Mapping[str, Any]]]) -> Sequence[tuple[int, Mapping[str, Any]]]:
    if len(columns) <= MOST_COLUMNS:
        return columns
    last = len(columns) - 1
    return [columns[round(place * last / (MOST_COLUMNS - 1))] for place in range(MOST_COLUMNS)]


def _axis(heat: Heat, columns: Sequence[tuple[int, Mapping[str, Any]]]) -> Axis:
    marked = [] if heat.mark is None else [heat.mark[0]]
    low = min([float(found["low"]) for _, found in columns] + marked) / MARGIN
    high = max([float(found["high"]) for _, found in columns] + marked) * MARGIN
    wider = max(1.0, LEAST_SPAN / (high / low)) ** 0.5
    return Axis(low / wider, high * wider, HEIGHT - BOTTOM, TOP, True)


def _column(left: float, width: float, column: tuple[int, Mapping[str, Any]], axis: Axis) -> Iterator[str]:
    step, found = column
    ends, fullest = edges(found), max(found["counts"])
    for low, high, count in zip(ends, ends[1:], found["counts"], strict=False):
        if not count:
            continue
        top, bottom = axis.at(high), axis.at(low)
        opacity = FAINTEST + (1 - FAINTEST) * math.sqrt(count / fullest)
        said = f"step {step:,}: {count:,} prototypes from {number(low)} to {number(high)}"
        place = f'x="{left:.1f}" y="{top:.1f}" width="{max(width - 1, 0.5):.1f}" height="{max(bottom - top, 0.5):.1f}"'
        yield f'<rect class="bin" {place} fill-opacity="{opacity:.2f}"><title>{text(said)}</title></rect>'


def _frame(heat: Heat, columns: Sequence[tuple[int, Mapping[str, Any]]], axis: Axis, width: float) -> Iterator[str]:
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    for value in axis.ticks():
        y = axis.at(value)
        yield f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{short(value)}</text>'
    every = max(1, math.ceil(len(columns) / 6))
    for place in range(0, len(columns), every):
        x = LEFT + (place + 0.5) * width
        yield f'<text x="{x:.1f}" y="{bottom + 17}" text-anchor="middle">{columns[place][0]:,}</text>'
    yield f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 6}" text-anchor="middle">optimizer step of the evaluation</text>'
    middle = (TOP + bottom) / 2
    yield f'<text x="13" y="{middle}" text-anchor="middle" transform="rotate(-90 13 {middle})">{text(heat.y)}</text>'


def _mark(heat: Heat, axis: Axis) -> str:
    if heat.mark is None:
        return ""
    value, label = heat.mark
    y = axis.at(value)
    line = f'<line class="mark" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
    return f'{line}<text class="label" x="{WIDTH - RIGHT - 4}" y="{y - 5:.1f}" text-anchor="end">{text(label)}</text>'


def _said(heat: Heat) -> str:
    """The first and the last column in words."""
    said = [
        f"at step {step:,} from {number(found['low'])} to {number(found['high'])}, median {number(found['median'])}"
        for step, found in (heat.columns[0], heat.columns[-1])
    ]
    return f"{heat.title}, {heat.y}: {'; '.join(dict.fromkeys(said))}."


def _rows(step: int, found: Mapping[str, Any]) -> Iterator[tuple[int, float, float, int]]:
    ends = edges(found)
    for low, high, count in zip(ends, ends[1:], found["counts"], strict=False):
        yield step, low, high, count
