"""Steps that are not finite within a run: skipped, listed with their images, and three in a row end it."""

from __future__ import annotations

import os
import signal
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.pretrain.engine.stopping import before_step, state_of
from tests.pretrain.tiny import a_run, differing, few_digits, few_digits_config
from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.config.file import read_config
from vmf_pretrain.engine.run import Run
from vmf_pretrain.storage.lines import read_lines
from vmf_pretrain.storage.metrics import read_metrics


@pytest.fixture(autouse=True)
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is there much to read."""
    monkeypatch.setattr("vmf_pretrain.engine.run.draw_plots", lambda *arguments: None)
    few_digits(monkeypatch)


def break_batches(run: Run, steps: Collection[int]) -> Run:
    """Put a NaN into the views of some steps."""
    loop: Any = run.loop
    original = loop.step

    def step(number: int, batch: Any, **options: Any) -> Any:
        if number in steps:
            batch.views[0][0] = torch.nan
        return original(number, batch, **options)

    loop.step = step
    return run


def test_two_bad_steps_are_skipped_and_listed(tmp_path: Path) -> None:
    run, printed = a_run(few_digits_config(), tmp_path / "run")
    assert break_batches(run, {3, 4, 7}).train() == 0
    lines = read_lines(run.folder.skipped_steps)
    assert [line["step"] for line in lines] == [3, 4, 7]
    assert all(len(set(line["images"])) == 16 for line in lines)
    assert lines[0]["what"] == "loss"
    assert "Step 3 is skipped on all ranks" in printed.getvalue()
    losses = {record["step"]: record["loss"] for record in read_metrics(run.folder) if "loss" in record}
    assert [step for step, loss in losses.items() if loss is None] == [4, 5, 8]
    assert all(bool(value.isfinite().all()) for value in state_of(run).values())


def test_three_in_a_row_end_the_run_and_it_goes_on_from_the_last_checkpoint(tmp_path: Path) -> None:
    whole, _ = a_run(few_digits_config(), tmp_path / "whole")
    assert whole.train() == 0
    run, _ = a_run(few_digits_config(), tmp_path / "run")
    with pytest.raises(PretrainError, match=r"not finite at step 8, the last of 3 such steps in a row.*--resume"):
        break_batches(run, {6, 7, 8}).train()
    again, _ = a_run(read_config(tmp_path / "run" / "config.yaml"), tmp_path / "run", resume=True)
    assert again.step == 5
    assert again.train() == 0
    assert differing(state_of(again), state_of(whole)) == []
    assert read_lines(again.folder.skipped_steps) == []


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="no SIGUSR1 here")
def test_sigusr1_writes_a_checkpoint_and_training_goes_on(tmp_path: Path) -> None:
    run, _ = a_run(few_digits_config(train={"checkpoint_every": 2}), tmp_path / "run")
    kept: list[int] = []

    def look() -> None:
        run.keeping.writer.wait()
        kept.extend(int(path.name.split("_")[1]) for path in run.folder.checkpoints.glob("step_*"))

    before_step(run, 3, lambda: os.kill(os.getpid(), signal.SIGUSR1))
    before_step(run, 5, look)
    assert run.train() == 0
    assert 4 in kept, f"checkpoints of {kept}"
