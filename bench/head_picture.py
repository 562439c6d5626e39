"""The picture of the README: time and memory of the loss at full size, as an SVG of bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

RIVALS = ("published", "one log-softmax", "published, compiled")
OURS = "vmf_kernels"
COLOURS = {"published": "#c8401a", "one log-softmax": "#b07d00", "published, compiled": "#e8743b", OURS: "#0b62b8"}
LABELS = 150  # pixels for the names on the left
BARS = 230  # pixels of the longest bar of a panel
VALUES = 70  # pixels for the value behind it
ROW, BAR, HEADING = 22, 14, 40  # pixels
WIDTH = LABELS + 2 * (BARS + VALUES)


@dataclass(frozen=True)
class Group:
    """What one size has taken, by name of a loss: milliseconds, and MiB beyond inputs and gradients."""

    rows: str
    milliseconds: Mapping[str, float]
    mebibytes: Mapping[str, float]


def groups_of(results: Mapping[str, Any]) -> list[Group]:
    """The native backend in fp32 at every size of ``results/cpu/head.json``."""
    found = []
    for one in results["benchmarks"]:
        given, extra = one["params"] or {}, one["extra_info"]
        if given.get("backend") == "native" and given.get("dtype") == "fp32" and "rival_medians" in extra:
            taken = {**{name: extra["rival_medians"][name] for name in RIVALS}, OURS: one["stats"]["median"]}
            memory = {**{name: extra["extra_mib"][name] for name in RIVALS}, OURS: extra["extra_mib"]["ours"]}
            rows = str(given["workload"])
            found.append(Group(rows, {name: 1e3 * seconds for name, seconds in taken.items()}, memory))
    return found


def picture(groups: Sequence[Group]) -> str:
    """An SVG with a panel for time and one for memory; in each, the longest bar has the same length.

    It has its own background, because a page that shows it may be dark.
    """
    height = len(groups) * (HEADING + ROW * (len(RIVALS) + 1)) + 34
    slowest = max(max(group.milliseconds.values()) for group in groups)
    largest = max(max(group.mebibytes.values()) for group in groups)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'role="img" font-family="system-ui, sans-serif" font-size="12" fill="#1b1f24">',
        f"<title>{escape(described(groups))}</title>",
        f'<rect width="{WIDTH}" height="{height}" rx="6" fill="#ffffff"/>',
        _text(LABELS, 22, "time of a step, ms", weight=600),
        _text(LABELS + BARS + VALUES, 22, "memory beyond inputs and gradients, MiB", weight=600),
    ]
    top = 30
    for group in groups:
        parts.append(_text(12, top + 24, f"{group.rows} student / teacher rows, 65,536 prototypes", weight=600))
        top += HEADING
        for name in (*RIVALS, OURS):
            parts.append(_text(12, top + BAR - 3, name, weight=600 if name == OURS else 400))
            parts += _bar(LABELS, top, group.milliseconds[name], slowest, COLOURS[name])
            parts += _bar(LABELS + BARS + VALUES, top, group.mebibytes[name], largest, COLOURS[name])
            top += ROW
    return "\n".join([*parts, "</svg>"]) + "\n"


def described(groups: Sequence[Group]) -> str:
    """The picture in words, for who cannot see it."""
    sizes = [
        f"at {group.rows} rows "
        + ", ".join(f"{n} {group.milliseconds[n]:.0f} ms and {group.mebibytes[n]:.0f} MiB" for n in (*RIVALS, OURS))
        for group in groups
    ]
    return "Time and memory of the loss: " + "; ".join(sizes)


def _bar(left: float, top: float, value: float, most: float, colour: str) -> list[str]:
    width = max(1.0, BARS * value / most)
    return [
        f'<rect x="{left:.0f}" y="{top}" width="{width:.1f}" height="{BAR}" rx="2" fill="{colour}"/>',
        _text(left + width + 6, top + BAR - 3, f"{value:,.0f}"),
    ]


def _text(x: float, y: float, words: str, weight: int = 400) -> str:
    return f'<text x="{x:.1f}" y="{y}" font-weight="{weight}">{escape(words)}</text>'
