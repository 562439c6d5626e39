"""Runs whose disk, precision or first step fails."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import NoReturn

import pytest

from tests.pretrain.engine.stopping import before_step
from tests.pretrain.tiny import a_run, few_digits, few_digits_config
from vmf_pretrain.config.errors import PretrainError


@pytest.fixture(autouse=True)
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is there much to read."""
    monkeypatch.setattr("vmf_pretrain.engine.run.draw_plots", lambda *arguments: None)
    few_digits(monkeypatch)


def no_space(*arguments: object, **options: object) -> NoReturn:
    raise PretrainError("Checkpoint step could not be written: No space left on device.")


def test_run_whose_last_state_is_lost_says_so_in_its_exit_code(tmp_path: Path) -> None:
    run, printed = a_run(few_digits_config(), tmp_path / "run")

    def fail() -> None:
        run.keeping.writer.wait()
        run.keeping.writer._save = no_space

    assert before_step(run, 7, fail).train() == 1
    said = " ".join(printed.getvalue().split())
    assert "NOT ON DISK" in said
    assert "the newest checkpoint is of step 5 of 10" in said


def test_disk_that_is_free_again_at_the_end_loses_nothing(tmp_path: Path) -> None:
    run, printed = a_run(few_digits_config(), tmp_path / "run")
    save = run.keeping.writer._save

    def once(*arguments: object) -> NoReturn:
        run.keeping.writer._save = save
        no_space()

    def fail() -> None:
        run.keeping.writer.wait()
        run.keeping.writer._save = once

    assert before_step(run, 7, fail).train() == 0
    assert "No space left" in printed.getvalue()
    assert run.keeping.writer.saved == 10


def test_run_that_cannot_keep_its_first_state_does_not_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("vmf_pretrain.engine.keeping.save_checkpoint", no_space)
        with pytest.raises(PretrainError, match=r"cannot begin.*No space left"):
            a_run(few_digits_config(), tmp_path / "run")
    run, _ = a_run(few_digits_config(train={"epochs": 1}), tmp_path / "run")  # the folder is free
    assert run.train() == 0


def test_precision_of_comparisons_runs_to_its_end(tmp_path: Path) -> None:
    run, _ = a_run(few_digits_config(train={"epochs": 1, "precision": "fp64"}), tmp_path / "run")
    assert run.train() == 0


def test_folder_of_a_run_that_was_killed_before_it_began_is_free(tmp_path: Path) -> None:
    out = tmp_path / "run"
    run, _ = a_run(few_digits_config(train={"epochs": 1}), out)
    run.close()
    for name in ("checkpoints", "config.yaml"):
        path = out / name
        shutil.rmtree(path) if path.is_dir() else os.unlink(path)
    (out / ".config.yaml.tmp").write_text("half")
    assert a_run(few_digits_config(train={"epochs": 1}), out)[0].train() == 0
