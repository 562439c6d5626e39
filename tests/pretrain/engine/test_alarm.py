"""Warnings while a run goes on: each once, wherever a person looks; and what ends a run."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from tests.on_ranks import start_ranks
from tests.pretrain.engine.stopping import before_step
from tests.pretrain.report.test_verdict import ALIVE, SMALL, UNCENTRED, run_of
from tests.pretrain.tiny import a_run, changed, few_digits, few_digits_config
from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.engine.alarm import Alarm, CollapseError
from vmf_pretrain.engine.history import trained
from vmf_pretrain.engine.progress import RunProgress, duration
from vmf_pretrain.report.verdict import FAULTS, Verdict
from vmf_pretrain.storage.metrics import read_metrics
from vmf_pretrain.watch_command import Watch

FAST = changed(
    SMALL,
    loss={**UNCENTRED, "koleo_weight": 0.0},
    optim={"teacher_momentum": 0.8, "learning_rate": 0.01, "warmup_epochs": 0, "freeze_last_layer_epochs": 0},
    train={"epochs": 3, "log_every": 2},
    evaluate={"every": 3, "max_images": 20},
)
ALIVE_AND_LEARNING = {**ALIVE, "kl": [2.0] * 5 + [1.0] * 595}
DEAD = {
    **ALIVE_AND_LEARNING,
    "mutual_information": [1.0] * 20 + [0.0] * 20,
    "prototypes_in_use": 1.0,
    "teacher_entropy": 0.0,
}


@pytest.fixture(autouse=True)
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmf_pretrain.engine.run.draw_plots", lambda *arguments: None)


def test_collapse_is_said_once_and_stands_in_every_record_of_the_run(tmp_path: Path) -> None:
    run, printed = a_run(FAST, tmp_path / "run")
    assert run.train() == 0
    warned = [record for record in read_metrics(run.folder) if "warning" in record]
    summary = json.loads(run.folder.summary.read_text())
    assert [record["warning"] for record in warned] == list(dict.fromkeys(record["warning"] for record in warned))
    assert "one-hot collapse" in [record["warning"] for record in warned], printed.getvalue()
    assert summary["warnings"] == warned
    assert summary["verdict"]["kind"] == "one-hot collapse"
    text = printed.getvalue()
    assert text.count("WARNING at step") == len(warned)
    assert "Try: lower loss.center_momentum to 0.9" in text
    assert text.count(summary["verdict"]["words"]) > 1, "in the warning, and at the end"


def test_run_that_is_to_end_with_a_collapse_ends_on_a_vote_says_so_everywhere_and_goes_on(tmp_path: Path) -> None:
    config = changed(FAST, train={"stop_on_collapse": True})
    run, _ = a_run(config, tmp_path / "run")
    with pytest.raises(PretrainError, match=r"ended by train.stop_on_collapse: .*collapse: .* Try: .*--resume") as end:
        trained(run)
    steps = [record["step"] for record in read_metrics(run.folder) if record.get("warning") in FAULTS]
    assert len(steps) == 1
    assert run.step == steps[0] + 1, "one step later, when all ranks know"
    summary = json.loads(run.folder.summary.read_text())
    assert (summary["steps"], summary["ended"]) == (run.step, str(end.value))
    assert summary["verdict"]["kind"] in FAULTS
    assert summary["knn"] is not None, "the network is evaluated as it is"
    page = run.folder.report.read_text()
    assert f"The run failed after step {run.step}: the run is ended by train.stop_on_collapse" in page
    said = io.StringIO()
    Watch(run.folder, Console(file=said, width=400), 0.01).follow()
    assert f"The run has ended at step {steps[0]} of 60: {end.value}" in said.getvalue()
    # it goes on from its last checkpoint, to the same collapse, or past it if it may
    again, _ = a_run(config, tmp_path / "run", resume=True)
    left: list[bool] = []
    before_step(again, again.step, lambda: left.append(again.folder.summary.exists()))
    with pytest.raises(CollapseError):
        again.train()
    assert left == [False], "a summary of another end"
    assert again.step == run.step
    past, _ = a_run(changed(config, train={"stop_on_collapse": False}), tmp_path / "run", resume=True)
    assert past.train() == 0
    summary = json.loads(past.folder.summary.read_text())
    assert (summary["steps"], summary["ended"]) == (60, None)


def collapsing_rank(rank: int, folder: str) -> None:
    """A rank of a run whose first logged step is called a collapse, and what it finds when its run has ended."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    out = Path(folder) / "run"
    dead = Verdict("dead head", "The head is dead.", (), ("another centre",), {}, 1)
    with pytest.MonkeyPatch.context() as patch:
        few_digits(patch)
        patch.setattr("vmf_pretrain.engine.alarm.verdict", lambda *_: dead)
        patch.setattr("vmf_pretrain.engine.run.draw_plots", lambda *_: None)
        config = few_digits_config(train={"stop_on_collapse": True}, optim={"warmup_epochs": 0})
        with pytest.raises(CollapseError, match="The head is dead"):
            trained(a_run(config, out)[0])
    left = [name for name in ("summary.json", "report.html") if (out / name).is_file()]
    (Path(folder) / f"{rank}.json").write_text(json.dumps(left))
    torch.distributed.destroy_process_group()


def test_no_rank_ends_before_the_first_has_written_its_summary_and_page(tmp_path: Path) -> None:
    """torchrun ends all ranks as soon as one has failed."""
    start_ranks(collapsing_rank, (str(tmp_path),), 2)
    left = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert left == [["summary.json", "report.html"]] * 2


def warned_by(records: list[dict[str, Any]], before: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
    written: list[Any] = []
    said: list[str] = []
    alarm = Alarm(changed(SMALL, optim={"warmup_epochs": 1}), written.append, said.append, before)
    for record in records:
        alarm.learn(record)
    return written, said


@pytest.mark.quick
def test_warning_is_not_said_again_by_a_run_that_goes_on() -> None:
    records = run_of(**DEAD)
    written, said = warned_by(records, [])
    assert [record["warning"] for record in written] == ["dead head"]
    assert len(said) == 1
    again, nothing = warned_by(records[-3:], [*records[:-3], *written])
    assert (again, nothing) == ([], [])


@pytest.mark.quick
def test_long_run_is_judged_by_its_start_and_its_last_steps() -> None:
    records = run_of(300, **{**ALIVE_AND_LEARNING, "loss": [3.0] * 290 + [4.0] * 10})
    written, _ = warned_by(records, [])
    assert [record["warning"] for record in written] == ["diverging"]


@pytest.mark.quick
def test_what_is_no_terminal_gets_a_line_and_a_terminal_a_bar() -> None:
    record = {"step": 5, "epoch": 1, **ALIVE, "images_per_second": 812.3, "data_wait": 0.04, "memory_gib": 0.5}
    plain, terminal = io.StringIO(), io.StringIO()
    for console in (Console(file=plain, width=200), Console(file=terminal, width=200, force_terminal=True)):
        with RunProgress(console, 10, 0) as progress:
            progress.learn(record)
            progress.learn({"step": 5, "epoch": 1, "knn": 77.7, "linear": 80.0})
            progress.advance(6)
    lines = plain.getvalue().splitlines()
    assert lines[0].startswith(
        "step 5/10  loss 3.000  KL 1.00  MI 1.00  rank 5.0  images/s 812  data wait 4%  memory 0.50 GiB"
    )
    assert lines[1].startswith("step 5/10  k-NN 77.7 %  linear 80.0 %")
    assert "ETA" in lines[0]
    assert "6/10" in terminal.getvalue()
    assert all(word in terminal.getvalue() for word in ("loss", "k-NN", "812", "ETA"))
    assert "step 5/10" not in terminal.getvalue()
    assert [duration(seconds) for seconds in (8.2, 750, 11_100)] == ["8 s", "12 min 30 s", "3 h 05 min"]
