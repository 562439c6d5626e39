"""Curves as inline SVG, from the data, with the data as CSV beside them; the page's script reads values out of that CSV.

A chart is read without colours too: each line has its own dashes, and without a pointer, by arrow keys.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from vmf_pretrain.report.page.markup import LARGE, Html, csv_link, number, text

WIDTH, HEIGHT = 480, 270
LEFT, RIGHT, TOP, BOTTOM = 62, 12, 10, 40  # margins
COLOURS = 8  # that page.css has, as c1 to c8
MOST_POINTS = 2000  # of a line that is drawn; of more, those at the ends of each stretch of steps
PAD = 0.06  # of the range, above and below
NICE = (1, 2, 2.5, 5, 10)
TICKS = 5
DECADES = 1.2  # a logarithmic axis with fewer has more than powers of ten
LABEL_HEIGHT = 14
LABEL_ABOVE = 24  # pixels of the lower edge: a band's label there stands above it

Point = tuple[float, float | None]


@dataclass(frozen=True)
class Line:
    """A curve.

    Attributes:
        name: in the legend.
        points: x and y, x rising; y None where it is not known, which leaves a gap.
        colour: its number, so that a run has one colour in all charts; None takes the place among the lines.
    """

    name: str
    points: Sequence[Point]
    colour: int | None = None

    def style(self, place: int) -> str:
        """The classes that draw it, as the line at a place."""
        return f"line c{(place if self.colour is None else self.colour) % COLOURS + 1}"


@dataclass(frozen=True)
class Band:
    """A range of y that means something; a line where both ends are the same."""

    low: float
    high: float
    label: str


@dataclass(frozen=True)
class Chart:
    """What is drawn.

    Attributes:
        title: above it.
        x, y: titles of the axes, with units.
        lines: the curves, at least one with a finite point.
        bands: behind them.
        note: a sentence below the title, or nothing.
        log_x, log_y: whether an axis is logarithmic; what is not positive is left out there.
    """

    title: str
    x: str
    y: str
    lines: Sequence[Line]
    bands: Sequence[Band] = ()
    note: str = ""
    log_x: bool = False
    log_y: bool = False


@dataclass(frozen=True)
class Axis:
    """From ``low`` to ``high``, drawn between the pixels ``start`` and ``end``."""

    low: float
    high: float
    start: float
    end: float
    log: bool

    def at(self, value: float) -> float:
        """Pixel of a value."""
        low, high, here = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (here - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round numbers within it."""
        if self.log and math.log10(self.high / self.low) > DECADES:
            first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
            every = max(1, math.ceil((last - first + 1) / (TICKS + 1)))
            return [10.0**power for power in range(first, last + 1, every)]
        rough = (self.high - self.low) / TICKS
        size = 10.0 ** math.floor(math.log10(rough))
        step = next(nice * size for nice in NICE if nice * size >= rough * (1 - 1e-9))
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [place * step for place in range(first, last + 1)]


def drawn(chart: Chart) -> Html:
    """The figure: title, legend, SVG, a place for values that are read out, and the link to the data."""
    shown = replace(chart, lines=[replace(line, points=thinned(_usable(line, chart))) for line in chart.lines])
    x_axis, y_axis = _axes(shown)
    inner = "".join(
        [
            *_frame(shown, x_axis, y_axis),
            *(_line(place, line, x_axis, y_axis) for place, line in enumerate(shown.lines)),
        ]
    )
    cursor = f'<line class="cursor" y1="{TOP}" y2="{HEIGHT - BOTTOM}" visibility="hidden"/>'
    scale = f'data-x="{x_axis.low!r} {x_axis.high!r} {x_axis.start} {x_axis.end} {int(x_axis.log)}"'
    svg = (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" tabindex="0" aria-label="{text(_said(shown))}" {scale}>'
        f"{inner}{cursor}</svg>"
    )
    save = csv_link(f"{chart.title}.csv", [chart.x, *(line.name for line in chart.lines)], _rows(shown))
    note = f'<span class="note">{text(chart.note)}</span>' if chart.note else ""
    return Html(
        f'<figure class="chart"><figcaption><strong>{text(chart.title)}</strong> {note}</figcaption>{_legend(shown)}{svg}'
        f'<p class="below"><output class="readout" aria-live="polite"></output>{save}</p></figure>'
    )


def thinned(points: Sequence[Point]) -> list[Point]:
    """At most MOST_POINTS: of each stretch the lowest and the highest, so that no spike is lost, and the last one."""
    if len(points) <= MOST_POINTS:
        return list(points)
    size = math.ceil(2 * len(points) / (MOST_POINTS - 1))
    kept: list[Point] = []
    for start in range(0, len(points), size):
        known = [point for point in points[start : start + size] if point[1] is not None]
        ends = {min(known, key=_height), max(known, key=_height)} if known else {points[start]}
        kept += sorted(ends, key=lambda point: point[0])
    return kept if kept[-1] == points[-1] else [*kept, points[-1]]


def _height(point: Point) -> float:
    assert point[1] is not None
    return point[1]


def _usable(line: Line, chart: Chart) -> list[Point]:
    """Points whose place is known; y is None where it cannot be drawn."""
    points = [(x, y) for x, y in line.points if math.isfinite(x) and (x > 0 or not chart.log_x)]
    return [(x, y if y is not None and math.isfinite(y) and (y > 0 or not chart.log_y) else None) for x, y in points]


def _axes(chart: Chart) -> tuple[Axis, Axis]:
    x = [x for line in chart.lines for x, _ in line.points]
    y = [y for line in chart.lines for _, y in line.points if y is not None]
    if not y:
        raise ValueError("a chart needs a finite point")
    y += [end for band in chart.bands for end in (band.low, band.high) if end > 0 or not chart.log_y]
    return (
        _axis(min(x), max(x), (LEFT, WIDTH - RIGHT), log=chart.log_x, pad=0.0),
        _axis(min(y), max(y), (HEIGHT - BOTTOM, TOP), log=chart.log_y, pad=PAD),
    )


def _axis(low: float, high: float, ends: tuple[float, float], *, log: bool, pad: float) -> Axis:
    if log:
        more = max(high / low, 1.1) ** pad if high > low else 2.0
        return Axis(low / more, high * more, *ends, log)
    if low == high and not pad:  # a single step
        return Axis(low, low + 1.0, *ends, log)
    spread = high - low if high > low else max(abs(high), 1.0)
    more = pad * spread if high > low else spread / 2
    return Axis(low - more, high + more, *ends, log)


def _frame(chart: Chart, x_axis: Axis, y_axis: Axis) -> Iterator[str]:
    """Bands, grid, ticks and titles."""
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    for band in chart.bands:
        low, high = y_axis.at(max(band.low, y_axis.low)), y_axis.at(min(band.high, y_axis.high))
        if band.low == band.high:
            yield f'<line class="mark" x1="{LEFT}" x2="{right}" y1="{low:.1f}" y2="{low:.1f}"/>'
        else:
            yield f'<rect class="band" x="{LEFT}" y="{high:.1f}" width="{right - LEFT}" height="{low - high:.1f}"/>'
    for value in y_axis.ticks():
        y = y_axis.at(value)
        yield f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{short(value)}</text>'
    whole = all(x == round(x) for line in chart.lines for x, _ in line.points)
    for value in (tick for tick in x_axis.ticks() if not whole or tick == round(tick)):
        x = x_axis.at(value)
        yield f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}"/>'
        yield f'<text x="{x:.1f}" y="{bottom + 17}" text-anchor="middle">{short(value)}</text>'
    yield f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>'
    yield f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{text(chart.x)}</text>'
    middle = (TOP + bottom) / 2
    yield f'<text x="13" y="{middle}" text-anchor="middle" transform="rotate(-90 13 {middle})">{text(chart.y)}</text>'
    for y, label in _labels(chart.bands, y_axis):
        yield f'<text class="label" x="{right - 4}" y="{y:.1f}" text-anchor="end">{text(label)}</text>'


def _labels(bands: Sequence[Band], y_axis: Axis) -> Iterator[tuple[float, str]]:
    """Where the bands' labels stand: below their bands, or above those at the lower edge, and never over each other."""
    bottom = HEIGHT - BOTTOM
    middles = [(y_axis.at((band.low + band.high) / 2), band.label) for band in bands]
    wanted = [(y - 8 if y > bottom - LABEL_ABOVE else y + 16, label) for y, label in middles]
    free = math.inf
    for y, label in sorted(wanted, reverse=True):
        free = min(y, free - LABEL_HEIGHT)
        yield free, label


def _line(place: int, line: Line, x_axis: Axis, y_axis: Axis) -> str:
    """Stretches without a gap, each a polyline; a point that stands alone is a dot."""
    parts = []
    stretch: list[str] = []
    for x, y in [*line.points, (0.0, None)]:
        if y is not None:
            stretch.append(f"{x_axis.at(x):.1f},{y_axis.at(y):.1f}")
            continue
        if len(stretch) == 1:
            across, down = stretch[0].split(",")
            parts.append(f'<circle cx="{across}" cy="{down}" r="3"/>')
        elif stretch:
            parts.append(f'<polyline points="{" ".join(stretch)}"/>')
        stretch = []
    return f'<g class="{line.style(place)}" data-line="{place}">{"".join(parts)}</g>'


def _legend(chart: Chart) -> str:
    """Each line's name and last value; a click hides the line."""
    items = []
    for place, line in enumerate(chart.lines):
        last = next((y for _, y in reversed(line.points) if y is not None), None)
        key = f'<svg class="key" viewBox="0 0 22 8" aria-hidden="true"><g class="{line.style(place)}">'
        key += '<polyline points="0,4 22,4"/></g></svg>'
        value = f'<span class="last">{text(number(last))}</span>'
        items.append(
            f'<li><button type="button" aria-pressed="true" data-line="{place}">{key}<bdi>{text(line.name)}</bdi> '
            f"{value}</button></li>"
        )
    return f'<ul class="legend">{"".join(items)}</ul>'


def _said(chart: Chart) -> str:
    """The chart in words, for who cannot see it."""
    parts = []
    for line in chart.lines:
        known = [(x, y) for x, y in line.points if y is not None]
        if known:
            (first, begin), (last, end) = known[0], known[-1]
            parts.append(f"{line.name} from {number(begin)} at {number(first)} to {number(end)} at {number(last)}")
    return f"{chart.title}, {chart.y} over {chart.x}: {'; '.join(parts)}."


def _rows(chart: Chart) -> list[list[float | None]]:
    """One of each x: the values of the lines there."""
    values = [dict(line.points) for line in chart.lines]
    return [[x, *(found.get(x) for found in values)] for x in sorted({x for found in values for x in found})]


def short(value: float) -> str:
    """A round number, without what its multiplication leaves behind."""
    if abs(value) >= 1 and value == round(value) and abs(value) < LARGE:
        return f"{value:,.0f}"
    return f"{value:.6g}".replace("e-0", "e-").replace("e+0", "e")
