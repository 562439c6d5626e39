"""The page: it needs nothing but itself, shows every row, and a browser runs its script."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.bench_tool.toy import DTYPES, session
from tests.browser import dumped, needs_browser
from vmf_bench.attempts import attempt
from vmf_bench.check import check
from vmf_bench.inputs import HeadShape
from vmf_bench.machine import machine
from vmf_bench.measure import measure
from vmf_bench.page import page
from vmf_bench.plan import MAIN, PROTOTYPES, ROWS, Case
from vmf_bench.table import heading
from vmf_bench.variants import VARIANTS

HOSTILE = '<!--<script></script><b>it\'s "broken" & more \u2028\u00e9</b>'
VOID = ("meta", "input", "br")


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    """Three sizes of two losses, and a third that cannot run; a reason holds what HTML would take for markup."""
    variants = {name: VARIANTS[name] for name in ("streaming", "published", "triton")}
    shapes = {
        MAIN: HeadShape(3, prototypes=64, dim=16),
        ROWS: HeadShape(6, prototypes=64, dim=16),
        PROTOTYPES: HeadShape(3, prototypes=128, dim=16),
    }
    made = [Case(part, shape, torch.float32, 1.0) for part, shape in shapes.items()]
    cases = [measure(case, variants, session(), share=0.1) for case in made]
    refused = next(row for row in cases[0]["rows"] if row["name"] == "triton")
    refused |= {"reason": HOSTILE, "relative_errors": {"loss": math.nan, "features": -math.inf}}
    checks = check({"streaming": VARIANTS["streaming"]}, DTYPES[:1], torch.device("cpu"))
    facts = {"schema_version": 1, "command": "vmf-bench", "seconds": 1.0, "budget_seconds": 2.0, "machine": machine()}
    return {**facts, "checks": checks, "cases": cases, "left_out": [HOSTILE]}


class Elements(HTMLParser):
    """Whether elements nest, and their text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.links: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.links += [
            f"{tag} {name}={value}" for name, value in attrs if name in ("src", "href", "action", "xlink:href")
        ]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"{tag} closes what it did not open"

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.texts.append(data)


@pytest.fixture(scope="module")
def parsed(record: dict[str, Any]) -> Elements:
    found = Elements()
    found.feed(page(record))
    return found


@pytest.mark.quick
def test_the_page_is_whole_and_needs_nothing_else(record: dict[str, Any], parsed: Elements) -> None:
    assert parsed.open == [], f"left open: {parsed.open}"
    assert parsed.links == [], f"it refers to {parsed.links}"
    assert not re.search(r"https?://|@import|url\(", page(record)), "it would use the network"


@pytest.mark.quick
def test_texts_are_texts(record: dict[str, Any], parsed: Elements) -> None:
    assert parsed.texts.count(HOSTILE) == 1, "the sentence about what was left out"
    assert f"not available: {HOSTILE}" in parsed.texts
    assert "b" not in parsed.seen


@pytest.mark.quick
def test_the_record_in_the_page_is_json_and_no_markup(record: dict[str, Any]) -> None:
    found = re.search(r'<script type="application/json" id="record">([^<]*)</script>', page(record))
    assert found, "the record holds what HTML would take for markup"

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    read = json.loads(found[1], parse_constant=refuse)
    row = next(row for row in read["cases"][0]["rows"] if row["name"] == "triton")
    assert row["reason"] == HOSTILE
    assert row["relative_errors"] == {"loss": None, "features": None}
    assert read["cases"][1:] == record["cases"][1:], "numbers that are finite stay what they are"


@pytest.mark.quick
@pytest.mark.parametrize(
    ("facts", "line", "entry"),
    [
        ({"flags": "avx2 amx_tile"}, "avx2, amx_tile; with AMX", "yes"),
        ({"flags": "avx2"}, "avx2; without AMX", "no"),
        ({}, "not known; AMX not known", "not known"),
    ],
)
def test_what_is_not_known_is_not_called_absent(
    record: dict[str, Any], facts: dict[str, str], line: str, entry: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vmf_bench.machine._cpu_facts", lambda: facts)
    known = {**record, "machine": machine()}
    assert f"  {line}\n" in heading(known)
    assert f"<dt>AMX</dt><dd>{entry}</dd>" in page(known)


@pytest.mark.quick
def test_every_row_is_shown_and_lost_ones_are_not_hidden(record: dict[str, Any], parsed: Elements) -> None:
    rows = [row for case in record["cases"] for row in case["rows"]]
    for name in ("streaming", "published", "triton"):
        wanted = sum(row["name"] == name for row in rows)
        assert parsed.texts.count(name) >= wanted, f"{name} is shown {parsed.texts.count(name)} times of {wanted}"
    for row in rows:
        if "speedup" in row:
            assert f"{row['speedup']:.2f}" in parsed.texts


@pytest.mark.quick
def test_there_is_a_chart_of_time_and_of_memory_over_rows_and_prototypes_and_a_roofline(
    record: dict[str, Any], parsed: Elements
) -> None:
    assert parsed.seen.count("svg") == 5
    captions = " ".join(parsed.texts)
    for caption in ("time against student rows", "time against prototypes K", "extra memory against", "roofline"):
        assert caption in captions, f"no {caption}"


def test_sizes_that_were_not_measured_have_no_chart(record: dict[str, Any]) -> None:
    html = page({**record, "cases": record["cases"][:1], "left_out": []})
    assert html.count("<svg") == 1, "the roofline alone"
    assert "Not measured" not in html


@needs_browser
def test_a_browser_runs_the_page(record: dict[str, Any], tmp_path: Path) -> None:
    """Its script runs to the end; a broken script leaves no mark, which is the negative control."""
    html = page(record)
    broken = html.replace('"use strict";', '"use strict"; throw new Error("broken");')
    assert broken != html
    assert 'data-cases="3"' in rendered(html, tmp_path / "whole")
    assert "data-cases" not in re.sub(
        r"<script>.*</script>", "", rendered(broken, tmp_path / "broken"), flags=re.DOTALL
    )


def rendered(html: str, folder: Path) -> str:
    """The document after its script has run, without a network."""
    folder.mkdir()
    (folder / "page.html").write_text(html, encoding="utf-8")
    document, _ = dumped(folder / "page.html")
    return re.sub(r"<script.*?</script>", "", document, flags=re.DOTALL)


def test_what_others_raise_is_shortened() -> None:
    def raises() -> None:
        raise RuntimeError("line\n" * 1000)

    _, outcome = attempt(raises)
    assert outcome["status"] == "failed"
    assert len(outcome["reason"]) < 400
    assert "\n" not in outcome["reason"]
