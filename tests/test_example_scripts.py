"""Each script of examples/ runs, at toy size, and prints what it is for."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
RUNS = {
    "swap_the_loss.py": (["--steps", "2", "--prototypes", "256"], r"largest relative difference .* (\d\S+)$"),
    "measure_my_shape.py": (
        ["--students", "6", "--teachers", "4", "--prototypes", "64", "--dim", "16", "--rounds", "1"],
        r"^vmf_kernels: [\d.]+ ms .*, loss (\d\S+)$",
    ),
    "pretrain_and_judge.py": (["--epochs", "1", "--tasks", "knn", "--out", "run"], r"^knn: .*? (\d[\d.]*) %"),
}


def test_every_example_is_run() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(RUNS)


@pytest.mark.parametrize("name", RUNS)
def test_example_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, expected = RUNS[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    printed = capsys.readouterr().out
    found = re.search(expected, printed, flags=re.MULTILINE)
    assert found is not None, printed
    assert float(found[1]) >= 0.0


def test_the_example_notices_a_loss_that_differs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Negative control: the usual loss with another temperature."""
    example = runpy.run_path(str(EXAMPLES / "swap_the_loss.py"))
    main = example["main"]
    usual = main.__globals__["UsualLoss"]
    monkeypatch.setitem(main.__globals__, "UsualLoss", lambda prototypes, teacher_temp: usual(prototypes, 0.07))
    monkeypatch.setattr(sys, "argv", ["swap_the_loss.py", "--steps", "2", "--prototypes", "64"])
    with pytest.raises(SystemExit, match="the two losses differ"):
        main()
