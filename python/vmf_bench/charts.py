"""Log-log charts as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape

Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT = 640, 400
LEFT, RIGHT, TOP, BOTTOM = 64, 24, 12, 48  # margins
RADIUS = 4.0
FEW_STEPS, MANY_STEPS = (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7)  # ticks of a decade
MOST_DECADES = 2.5, 1.0  # with so many ticks
MARGIN = 1.25  # factor between the outermost points and the frame
COLOURS = {
    "native": "#0b62b8",
    "streaming": "#4aa3e0",
    "triton": "#00875a",
    "cuda": "#12b886",
    "stored-logits": "#7048c6",
    "published": "#c8401a",
    "published-compiled": "#e8743b",
    "one-log-softmax": "#b07d00",
    "one-log-softmax-compiled": "#d9a514",
    "lightly": "#c2418f",
    "linear-cross-entropy": "#7a5c48",
    "linear-cross-entropy-chunked": "#a58a76",
    "flex-attention": "#5f7a2b",
    "liger": "#6b7280",
    "cache-chunks": "#94a3b8",
    "cache-chunks-recomputed": "#475569",
}
OTHER_COLOUR = "#888888"


@dataclass(frozen=True)
class Axis:
    """A logarithmic axis from ``low`` to ``high``, drawn between the pixels ``start`` and ``end``."""

    label: str
    low: float
    high: float
    start: float
    end: float
    marked: tuple[float, ...] = ()  # ticks; none for round numbers

    def at(self, value: float) -> float:
        """Pixel of a value."""
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> Iterator[float]:
        """What is marked; else powers of ten, and numbers between them where there are few."""
        yield from self.marked
        decades = math.log10(self.high / self.low)
        few, many = MOST_DECADES
        steps = (1,) if decades > few else FEW_STEPS if decades > many else MANY_STEPS
        for exponent in range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1):
            for step in steps:
                value = step * 10.0**exponent
                if not self.marked and self.low <= value <= self.high:
                    yield value


def chart(
    series: Mapping[str, Points],
    x_label: str,
    y_label: str,
    lines: Mapping[str, Points] | None = None,
    joined: bool = True,
) -> str:
    """An SVG of points, by name of a loss.

    Args:
        series: positive x and y; ``COLOURS`` has the colours.
        x_label, y_label: what the axes show, with units.
        lines: further lines by label, such as a roof.
        joined: whether the points of a series are one line, over few x, which are then marked.

    Raises:
        ValueError: there is no point.
    """
    guides = lines or {}
    values = [point for points in (*series.values(), *guides.values()) for point in points]
    if not values:
        raise ValueError("a chart needs a point")
    sizes = tuple(sorted({x for x, _ in values})) if joined else ()
    x_axis = replace(_axis(x_label, [x for x, _ in values], LEFT, WIDTH - RIGHT), marked=sizes)
    y_axis = _axis(y_label, [y for _, y in values], HEIGHT - BOTTOM, TOP)
    body = [*_frame(x_axis, y_axis), *_guides(guides, x_axis, y_axis)]
    for name, points in series.items():
        body.append(_series(name, sorted(points), x_axis, y_axis, joined))
    label = escape(f"{y_label} against {x_label}", quote=True)
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(body)}</svg>'


def _axis(label: str, values: Sequence[float], start: float, end: float) -> Axis:
    return Axis(label, min(values) / MARGIN, max(values) * MARGIN, start, end)


def _frame(x_axis: Axis, y_axis: Axis) -> Iterator[str]:
    """Grid, ticks and labels."""
    for value in x_axis.ticks():
        x = x_axis.at(value)
        yield f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
        yield f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{_number(value)}</text>'
    for value in y_axis.ticks():
        y = y_axis.at(value)
        yield f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_number(value)}</text>'
    middle_x, middle_y = (LEFT + WIDTH - RIGHT) / 2, (TOP + HEIGHT - BOTTOM) / 2
    yield f'<text x="{middle_x}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x_axis.label)}</text>'
    turned = f'transform="rotate(-90 14 {middle_y})"'
    yield f'<text x="14" y="{middle_y}" text-anchor="middle" {turned}>{escape(y_axis.label)}</text>'


def _guides(lines: Mapping[str, Points], x_axis: Axis, y_axis: Axis) -> Iterator[str]:
    for label, points in lines.items():
        path = _path(points, x_axis, y_axis)
        yield f'<polyline class="guide" points="{path}"><title>{escape(label)}</title></polyline>'
        x, y = points[-1]
        place = f'x="{x_axis.at(x) - 4:.1f}" y="{y_axis.at(y) - 6:.1f}"'
        yield f'<text {place} text-anchor="end">{escape(label)}</text>'


def _series(name: str, points: Points, x_axis: Axis, y_axis: Axis, joined: bool) -> str:
    colour, label = COLOURS.get(name, OTHER_COLOUR), escape(name, quote=True)
    parts = [f'<polyline points="{_path(points, x_axis, y_axis)}" stroke="{colour}"/>'] if joined else []
    for x, y in points:
        place = f'cx="{x_axis.at(x):.1f}" cy="{y_axis.at(y):.1f}" r="{RADIUS}" fill="{colour}"'
        parts.append(f"<circle {place}><title>{label}: {_number(x)}, {y:.4g}</title></circle>")
    return f'<g class="series" data-loss="{label}">{"".join(parts)}</g>'


def _path(points: Points, x_axis: Axis, y_axis: Axis) -> str:
    return " ".join(f"{x_axis.at(x):.1f},{y_axis.at(y):.1f}" for x, y in points)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1 and value == round(value) else f"{value:.3g}"
