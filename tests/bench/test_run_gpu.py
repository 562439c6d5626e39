"""The script and the program of a call on a GPU: their arguments, and where they look for results."""

from __future__ import annotations

import argparse
import os
import subprocess
from pathlib import Path

import pytest
import torch

from bench.gpu import __main__ as program

SCRIPT = Path(__file__).parents[2] / "bench" / "run_gpu.sh"


@pytest.mark.parametrize(
    ("arguments", "variables", "expected"),
    [
        (["first", "a"], {}, "-m bench.gpu first --out {cwd}/a --after {cwd}/a --seconds"),
        (["--dry-run", "second", "a", "b"], {}, "-m bench.gpu second --out {cwd}/a --after {cwd}/b --seconds"),
        (["all"], {"OUT": "c"}, "-m bench.gpu all --out {cwd}/c --after {cwd}/c --seconds"),
    ],
)
def test_the_script_passes_on_where_results_go(
    arguments: list[str], variables: dict[str, str], expected: str, tmp_path: Path
) -> None:
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\necho "$@"\n')
    fake.chmod(0o755)
    without = {name: value for name, value in os.environ.items() if name != "OUT"}
    done = subprocess.run(
        ["bash", str(SCRIPT), *arguments],
        env=without | {"PYTHON": str(fake)} | variables,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert expected.format(cwd=tmp_path) in done.stdout, done
    assert done.stdout.rstrip().endswith("--dry-run") == ("--dry-run" in arguments)


def test_the_script_says_how_it_is_used() -> None:
    done = subprocess.run(["bash", str(SCRIPT), "everything"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "run_gpu.sh first" in done.stderr


def test_a_second_call_goes_on_with_the_first_one_s_results_wherever_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program, "ROOT", tmp_path)
    options = argparse.Namespace(after=None, out=tmp_path / "out")
    assert program.first_results(options, "gpu") is None
    assert "first light first" in capsys.readouterr().out
    committed = tmp_path / "bench" / "results" / "gpu" / "head.json"
    for path in (committed, tmp_path / "out" / "head.json"):  # the latter is asked first
        path.parent.mkdir(parents=True)
        path.write_text("{}")
        assert program.first_results(options, "gpu") == path


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_a_call_names_the_dry_run(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        program.main(["first"])
    assert "--dry-run" in capsys.readouterr().err
