"""Charts: every point lies where its numbers say."""

from __future__ import annotations

import math
import re

import pytest

from vmf_bench.charts import BOTTOM, COLOURS, HEIGHT, LEFT, RIGHT, TOP, WIDTH, chart
from vmf_bench.variants import VARIANTS

pytestmark = pytest.mark.quick

POINTS = {"native": [(100.0, 1.0), (1000.0, 10.0), (10_000.0, 100.0)], "published": [(100.0, 2.0), (10_000.0, 500.0)]}


def circles(svg: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', svg)]


def test_decades_are_equally_long_and_a_power_law_is_a_line() -> None:
    (x0, y0), (x1, y1), (x2, y2), *_ = circles(chart(POINTS, "rows", "ms"))
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.2)
    assert y2 < y0, "larger numbers lie higher"


def test_every_point_lies_inside_the_frame() -> None:
    for x, y in circles(chart(POINTS, "rows", "ms")):
        assert LEFT < x < WIDTH - RIGHT
        assert TOP < y < HEIGHT - BOTTOM


def test_the_sizes_that_were_measured_are_marked_and_the_axes_are_labelled() -> None:
    svg = chart(POINTS, "student rows", "milliseconds")
    texts = re.findall(r"<text[^>]*>([^<]+)</text>", svg)
    assert {"100", "1,000", "10,000", "student rows", "milliseconds"} <= set(texts), f"texts are {texts}"


def test_a_guide_is_drawn_with_its_label() -> None:
    svg = chart(POINTS, "x", "y", lines={"the <roof>": [(100.0, 50.0), (10_000.0, 50.0)]}, joined=False)
    assert svg.count("<polyline") == 1, "points that are not joined have no line of their own"
    assert "the &lt;roof&gt;" in svg


def test_a_chart_without_a_point_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a point"):
        chart({}, "x", "y")


def test_one_point_has_an_axis() -> None:
    ((x, y),) = circles(chart({"native": [(100.0, 1.0)]}, "x", "y"))
    assert math.isfinite(x)
    assert math.isfinite(y)


def test_every_loss_that_is_timed_has_a_colour_of_its_own() -> None:
    timed = [name for name, variant in VARIANTS.items() if variant.timed]
    assert sorted(timed) == sorted(COLOURS)
    assert len(set(COLOURS.values())) == len(COLOURS)
