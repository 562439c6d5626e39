"""The benchmark of prototypes over ranks, through torchrun at toy size, and its committed report."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.many_prototypes import Sizes, arguments_of, features_of, prototypes_of

ROOT = Path(__file__).parents[2]
REPORT = ROOT / "bench" / "results" / "cpu" / "many_prototypes.json"
BUDGET = 1e-5  # relative, in norm: fp32 sums in another order
PROTOTYPES, ROWS, DIM = 301, 24, 16
KEYS = {
    "prototypes",
    "dim",
    "student_rows",
    "teacher_rows",
    "dtype",
    "ranks",
    "seconds",
    "peak_rss_mib",
    "peak_rss_mib_sum",
    "logits_gib",
    "loss",
    "machine",
    "alone",
}


def report_over(ranks: int, file: Path) -> dict[str, Any]:
    """What the bench says over so many ranks of torchrun; it writes ``file``."""
    sizes = ["--prototypes", str(PROTOTYPES), "--rows", str(ROWS), "--dim", str(DIM)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [*torchrun, "-m", "bench.many_prototypes", *sizes, "--check", "--json", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads(file.read_text()), "printed is not what was written"
    result: dict[str, Any] = json.loads(file.read_text())
    return result


def assert_equal_to_one_rank(report: dict[str, Any]) -> None:
    """Loss and gradients over ranks are those of the same step on one rank."""
    alone = report["alone"]
    assert abs(report["loss"] - alone["loss"]) <= BUDGET * abs(alone["loss"])
    assert alone["loss_relative_difference"] <= BUDGET
    assert alone["gradients"].keys() == {"features", "weight", "magnitude"}
    for name, gradient in alone["gradients"].items():
        assert gradient["norm"] > 0
        error = gradient["relative_difference"]
        assert error <= BUDGET, f"{name}: relative error {error:.1e}, budget {BUDGET:.0e}"
        assert gradient["largest_difference"] <= 1e-3 * gradient["largest"], f"one element of {name} is off"


def test_torchrun_on_several_ranks_equals_one_rank(tmp_path: Path) -> None:
    ranks = 2  # more of them: tests/backends/test_prototype_ranks.py
    report = report_over(ranks, tmp_path / "report.json")
    assert report.keys() == KEYS
    assert (report["ranks"], len(report["peak_rss_mib"])) == (ranks, ranks)
    assert report["peak_rss_mib_sum"] == sum(report["peak_rss_mib"])
    assert_equal_to_one_rank(report)


def test_another_block_of_prototypes_would_show() -> None:
    """Negative control: blocks differ, and each is the same whichever rank draws it."""
    sizes = Sizes(PROTOTYPES, ROWS, DIM, 2)
    assert [sizes.block(rank) for rank in range(2)] == [151, 150]
    (both, _), (first, _), (second, _) = (prototypes_of(sizes, blocks) for blocks in (range(2), [0], [1]))
    assert torch.equal(both.weight, torch.cat([first.weight, second.weight]))
    assert not torch.equal(first.weight[:150], second.weight)
    assert all(torch.equal(*pair) for pair in zip(features_of(sizes), features_of(sizes), strict=True))


def test_the_committed_report_is_of_logits_that_do_not_fit() -> None:
    report = json.loads(REPORT.read_text())
    assert report.keys() == KEYS
    assert (report["prototypes"], report["ranks"]) == (1_048_576, 4)
    sizes = Sizes(report["prototypes"], report["student_rows"], report["dim"], report["ranks"])
    assert report["logits_gib"] == round(sizes.logits_bytes / 2**30, 3)
    assert report["logits_gib"] > report["machine"]["memory_gib"], "the logits would fit the machine"
    assert report["peak_rss_mib_sum"] / 1024 < report["logits_gib"] / 4
    assert_equal_to_one_rank(report)


def test_rows_that_are_no_views_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        arguments_of(["--rows", "7"])
    assert "--rows is 7; expected a positive multiple of 2" in capsys.readouterr().err
