"""The end of a run: the verdict, the table, and the file."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from vmf_pretrain.report.summary import comparison, print_summary, summary_text

pytestmark = pytest.mark.quick

PROTOTYPES = 256
FIGURES: dict[str, Any] = {
    "knn": 81.234,
    "knn_untrained": 52.6,
    "knn_pixels": 63.4,
    "linear": 77.7,
    "linear_untrained": 44.4,
    "linear_pixels": 15.6,
    "mutual_information": 1.234,
    "mutual_information_logged": 1.111,
    "mutual_information_judged": [1.052, 1.151],
    "mutual_information_tolerance": 0.123,
    "mutual_information_agrees": True,
    "teacher_entropy": 1.5,
    "rankme": 23.45,
    "usage_entropy": 4.321,
    "prototypes_used": 201,
    "unique_prototypes": 254,
    "largest_duplicate_share": 0.0123,
    "verdict": {
        "kind": "one-hot collapse",
        "words": "One-hot collapse: all images go to the same prototype.",
        "evidence": ["teacher_entropy 0.0001 nats"],
        "advice": ["raise loss.teacher_temp"],
    },
    "bad_images": 0,
    "seconds": 187.4,
    "method": "dino-vmf",
    "seed": 11,
}


def printed(figures: dict[str, Any], width: int = 120) -> str:
    output = io.StringIO()
    console = Console(file=output, width=width)
    print_summary(console, figures, PROTOTYPES, Path("runs/demo"), "vmf-pretrain demo --method dino")
    return output.getvalue()


def test_verdict_is_said_with_its_evidence_and_what_to_try() -> None:
    text = printed(FIGURES)
    expected = ["One-hot collapse: all images", "  teacher_entropy 0.0001 nats", "  Try: raise loss.teacher_temp."]
    missing = [line for line in expected if line not in text]
    assert not missing, f"{missing} not in:\n{text}"


def test_images_that_could_not_be_read_are_said_and_only_those() -> None:
    assert "cannot be read" not in printed(FIGURES)
    assert "9 readings met an image that cannot be read" in printed({**FIGURES, "bad_images": 9})


def test_table_holds_every_figure() -> None:
    text = printed(FIGURES)
    expected = [
        "81.2",
        "77.7",
        "52.6",
        "44.4",
        "63.4",
        "15.6",
        "1.23 nats",
        "23.4",
        "201 of 256",
        "4.32 nats",
        "ln K = 5.55",
    ]
    expected += [
        "254 of 256",
        "1.2 %",
        "dino-vmf, seed 11, 187 s",
        "runs/demo",
        "Next: vmf-pretrain demo --method dino",
    ]
    missing = [part for part in expected if part not in text]
    assert not missing, f"{missing} not in:\n{text}"


@pytest.mark.parametrize(
    ("agrees", "said"),
    [
        (True, ["Log and summary agree", "1.11 nats in the last training batches", "1.05 to 1.15 in batches as large"]),
        (False, ["LOG AND SUMMARY DISAGREE", "1.11 nats", "1.05 to 1.15", "differ by 0.12 at most", "distrust"]),
        (None, ["were not compared"]),
    ],
)
def test_comparison_says_whether_log_and_summary_agree(agrees: bool | None, said: list[str]) -> None:
    figures = {**FIGURES, "mutual_information_agrees": agrees}
    missing = [part for part in said if part not in comparison(figures)]
    assert not missing, f"{missing} not in: {comparison(figures)}"
    assert comparison(figures) in printed(figures)


@pytest.mark.parametrize("width", [40, 80])
def test_next_command_is_never_broken_over_lines(width: int) -> None:
    assert "Next: vmf-pretrain demo --method dino\n" in printed(FIGURES, width)


def test_run_without_labels_says_so_instead_of_a_number() -> None:
    text = printed({**FIGURES, **{name: None for name in FIGURES if name.startswith(("knn", "linear"))}})
    assert text.count("no labels") == 6, text
    assert "None" not in text


def test_file_holds_the_figures_and_null_for_what_is_not_a_number() -> None:
    text = summary_text({**FIGURES, "rankme": math.nan, "linear": math.inf, "knn": None})
    assert json.loads(text) == {**FIGURES, "rankme": None, "linear": None, "knn": None}
