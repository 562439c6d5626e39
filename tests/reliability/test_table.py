"""The table of faults: each of the list has a row, each row has tests, and each test of this folder has a row."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.quick

TESTS = Path(__file__).parents[1]
TABLE = (TESTS.parent / "docs" / "faults.md").read_text(encoding="utf-8")
ROWS = [line.split(" | ") for line in TABLE.splitlines() if line.startswith("| ") and not line.startswith("| fault")]
TEST = re.compile(r"`([\w/]+\.py)::(\w+)`")
NAMED = set(TEST.findall(TABLE))


def test_every_fault_has_a_row_that_says_all_of_it() -> None:
    numbers = re.findall(r"^\| F(\d+) ", TABLE, flags=re.MULTILINE)
    assert [int(number) for number in numbers] == list(range(1, 29))
    for row in ROWS:
        assert len(row) == 5, f"{row[0]} has {len(row)} columns"
        assert TEST.search(row[4]), f"{row[0]} has no test"


def test_every_test_that_is_named_exists() -> None:
    absent = [f"{path}::{name}" for path, name in NAMED if f"def {name}(" not in (TESTS / path).read_text()]
    assert len(NAMED) > 60
    assert not absent, f"no such test: {absent}"


def test_every_test_of_this_folder_has_a_row() -> None:
    found = {
        (f"reliability/{path.name}", name)
        for path in Path(__file__).parent.glob("test_*.py")
        if path.name != Path(__file__).name
        for name in re.findall(r"^def (test_\w+)\(", path.read_text(), flags=re.MULTILINE)
    }
    assert len(found) > 20
    assert not found - NAMED, f"without a row: {sorted(found - NAMED)}"
