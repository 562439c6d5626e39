"""The parts of the page: text, numbers, data as links, charts and histograms, and colours that can be told apart."""

from __future__ import annotations

import itertools
import math
import re
from importlib import resources
from urllib.parse import unquote

import pytest
import torch

from vmf_pretrain.data.waiting import TOO_MUCH
from vmf_pretrain.evaluation.histograms import LOWEST_USAGE, histogram, singular_values, usage_histogram
from vmf_pretrain.evaluation.rank import rankme
from vmf_pretrain.report.page import panels
from vmf_pretrain.report.page.chart import MOST_POINTS, Axis, Band, Chart, Line, drawn, thinned
from vmf_pretrain.report.page.heat import edges
from vmf_pretrain.report.page.markup import csv_link, number, text

pytestmark = pytest.mark.quick

TEXT, SHAPE = 4.5, 3.0  # least contrasts of WCAG 2.1, level AA


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (79.2, "79.20"), (480, "480"), (12345.6, "12,346"), (0.0039, "0.003900"), (-1.5e-7, "-1.5e-07"), (None, "-"),
        (math.nan, "-"), (-math.inf, "-"), (True, "True"), (0.0, "0"), (3e12, "3e+12"),
    ],
)  # fmt: skip
def test_number_for_people(value: object, said: str) -> None:
    assert number(value) == said


def test_text_is_no_markup_whatever_it_holds() -> None:
    assert (
        text("<b a=\"1\" b='2'>&\x00\udcff")
        == "&lt;b a=&quot;1&quot; b=&#x27;2&#x27;&gt;&amp;\N{REPLACEMENT CHARACTER}?"
    )


def test_saved_table_is_read_back_and_computes_nothing() -> None:
    link = csv_link("a <b>.csv", ["x", "two\nlines"], [["=1+1", 2.5], [None, math.nan], ['say "x", y', -3]])
    assert 'download="a-b-.csv"' in link
    content = unquote(re.findall(r'href="data:text/csv;charset=utf-8,([^"]*)"', link)[0])
    assert content == 'x,two lines\n\'=1+1,2.5\n,\n"say ""x"", y",-3\n'


@pytest.mark.parametrize(
    ("axis", "ticks"),
    [
        (Axis(0.0, 5.9, 0, 1, False), [0, 2, 4]),
        (Axis(-0.1, 1.02, 0, 1, False), [0, 0.25, 0.5, 0.75, 1.0]),
        (Axis(1e-4, 2e3, 0, 1, True), [1e-4, 1e-2, 1, 100]),
        (Axis(39.0, 41.0, 0, 1, True), [39, 39.5, 40, 40.5, 41]),
    ],
)
def test_ticks_are_round_and_within(axis: Axis, ticks: list[float]) -> None:
    assert axis.ticks() == pytest.approx(ticks)


def test_chart_has_gaps_where_nothing_is_known_and_bands_in_words() -> None:
    points = [(1, 1.0), (2, math.nan), (3, 2.0), (4, 3.0), (5, None), (6, math.inf)]
    svg = drawn(Chart("A & B", "step", "nats", [Line("<i>", points)], [Band(0.0, 0.5, "low")]))
    assert svg.count("<polyline") == 2, "a stretch of two points, and the key of the legend"
    assert svg.count("<circle") == 1
    assert "A &amp; B, nats over step: &lt;i&gt; from 1 at 1 to 3 at 4." in svg
    assert ">low</text>" in svg
    with pytest.raises(ValueError, match="needs a finite point"):
        drawn(Chart("", "", "", [Line("", [(1, None)])]))


def test_labels_of_bands_do_not_cover_each_other() -> None:
    bands = [Band(value, value, str(value)) for value in (0.0, 0.0, 0.5, 0.51, 1.0)]
    svg = drawn(Chart("", "step", "", [Line("", [(0, 0.0), (9, 1.0)])], bands))
    heights = sorted(float(y) for y in re.findall(r'class="label" x="\d+" y="([\d.]+)"', svg))
    assert len(heights) == 5
    assert min(after - before for before, after in itertools.pairwise(heights)) >= 14


def test_thinned_line_keeps_spikes_and_ends() -> None:
    points = [(float(x), 1.0 if x != 12345 else 99.0) for x in range(50_000)]
    few = thinned(points)
    assert len(few) <= MOST_POINTS
    assert (12345.0, 99.0) in few
    assert (few[0], few[-1]) == (points[0], points[-1])
    assert [x for x, _ in few] == sorted({x for x, _ in few})


def test_singular_values_are_those_of_the_features() -> None:
    features = torch.randn(50, 12) * torch.logspace(0, -4, 12)
    found = singular_values(features)
    exact = torch.linalg.svdvals(features.double())
    assert found["ranks"] == list(range(1, 13))
    assert found["values"] == pytest.approx((exact / exact[0]).tolist(), rel=1e-4)
    shares = torch.tensor(found["values"]) / sum(found["values"])
    assert math.exp(-torch.xlogy(shares, shares).sum()) == pytest.approx(rankme(features), rel=1e-3)
    many = singular_values(torch.randn(300, 200))
    assert (many["ranks"][0], many["ranks"][-1], len(many["ranks"]) <= 128) == (1, 200, True)
    assert singular_values(torch.zeros(3, 4))["values"] == [0.0] * 3


def test_histogram_counts_every_value_in_the_bin_that_holds_it() -> None:
    values = torch.tensor([0.1, 0.11, 1.3, 10.0, math.nan, 0.0])
    found = histogram(values)
    assert (found["low"], found["high"], sum(found["counts"])) == (0.1, 10.0, 4)
    ends = edges(found)
    for value in (0.11, 1.3):
        place = next(place for place, end in enumerate(ends[1:]) if value < end)
        assert found["counts"][place] > 0, f"{value} is in no bin"
    same = histogram(torch.full((7,), 40.0))
    assert same["low"] < 40 < same["high"]
    assert sum(same["counts"]) == 7
    assert histogram(torch.tensor([]))["counts"] == []


def test_unused_prototypes_are_counted_apart() -> None:
    usage = torch.tensor([0.5, 0.5 - 1e-6, 1e-6, 0.0])
    found = usage_histogram(usage)
    assert (found["below"], sum(found["counts"])) == (2, 2)
    assert found["low"] > LOWEST_USAGE


def test_waiting_is_too_much_where_training_says_so() -> None:
    assert panels.TOO_MUCH == TOO_MUCH


def test_colours_can_be_read_in_light_and_dark() -> None:
    style = resources.files("vmf_pretrain.report.page").joinpath("page.css").read_text()
    parts = re.split(r"@media \(prefers-color-scheme: dark\)|@media print", style)
    light, dark, printed = (dict(re.findall(r"--(\w+): (#[0-9a-f]{3,6})", part)) for part in parts)
    for colours in (light, dark):
        for name in ("ink", "faint", "link", "good", "bad"):
            worst = min(contrast(colours[name], colours[ground]) for ground in ("back", "card"))
            assert worst >= TEXT, f"{name} has a contrast of {worst:.2f}"
        for name in ("bin", *(f"c{place}" for place in range(1, 9))):
            assert contrast(colours[name], colours["back"]) >= SHAPE, name
    assert {name: printed[name] for name in ("c1", "c8", "bin")} == {name: light[name] for name in ("c1", "c8", "bin")}


def contrast(one: str, other: str) -> float:
    """WCAG's ratio of two colours."""
    bright, dull = sorted((luminance(one), luminance(other)), reverse=True)
    return (bright + 0.05) / (dull + 0.05)


def luminance(colour: str) -> float:
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
