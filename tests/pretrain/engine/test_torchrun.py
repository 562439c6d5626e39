"""Runs under torchrun: a rank that dies, a restart, and a signal."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.pretrain.tiny import digits_config, yaml_of
from vmf_pretrain.storage.checkpoint import load_checkpoint
from vmf_pretrain.storage.metrics import read_metrics
from vmf_pretrain.storage.run_folder import RunFolder

ROOT = Path(__file__).parents[3]
DYING = "tests.pretrain.engine.dying_method:Dying"
STEPS = 10
WAIT = 300  # seconds, on a busy machine


def environment_of(died: Path) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "DIED": str(died), "OMP_NUM_THREADS": "1", "PYTHONPATH": path}


def command(folder: Path, out: str, *, ranks: int = 2, restarts: int = 0, method: str = DYING) -> subprocess.Popen[str]:
    """A run under torchrun, with checkpoints after 5 and 10 steps."""
    config = yaml_of(digits_config(method=method), folder / f"{out}.yaml")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    ours = ["-m", "vmf_pretrain", "fit", "--config", str(config), "--out", str(folder / out), "--allow-code"]
    environment = environment_of(folder / f"{out}.died")
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([*launcher, f"--max-restarts={restarts}", *ours], env=environment, cwd=folder, **streams)


def final_tensors(folder: Path) -> dict[str, Any]:
    found = load_checkpoint(RunFolder(folder).checkpoints)
    assert found.step == STEPS
    return {f"{group}.{name}": value for group, named in found.tensors.items() for name, value in named.items()}


@pytest.mark.parametrize("ranks", [2, 4])
def test_rank_that_is_killed_ends_the_others_and_a_restart_goes_on_exactly(ranks: int, tmp_path: Path) -> None:
    (tmp_path / "whole.died").touch()
    whole = command(tmp_path, "whole", ranks=ranks)
    restarted = command(tmp_path, "restarted", ranks=ranks, restarts=1)
    said = {process: process.communicate(timeout=WAIT)[0] for process in (whole, restarted)}
    assert whole.returncode == 0, said[whole][-3000:]
    assert restarted.returncode == 0, said[restarted][-3000:]
    assert (tmp_path / "restarted.died").exists(), "no rank was killed: this shows nothing"
    assert "Going on from step 5 of 10." in said[restarted]
    ours, theirs = final_tensors(tmp_path / "restarted"), final_tensors(tmp_path / "whole")
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not ours[name].equal(theirs[name])] == []
    lines = [
        [record.get("loss") for record in read_metrics(RunFolder(tmp_path / out))] for out in ("restarted", "whole")
    ]
    assert lines[0] == lines[1]


def test_without_a_restart_the_others_end_within_a_minute(tmp_path: Path) -> None:
    process = command(tmp_path, "run")
    while not (tmp_path / "run.died").exists():
        assert process.poll() is None, process.communicate()[0][-3000:]
        time.sleep(0.1)
    began = time.monotonic()
    process.communicate(timeout=WAIT)
    assert process.returncode not in (0, None)
    assert time.monotonic() - began < 60, f"it took {time.monotonic() - began:.0f} s"
    assert json.loads((tmp_path / "run" / "checkpoints" / "step_00000005" / "state.json").read_text())["step"] == 5


def test_ctrl_c_at_torchrun_leaves_a_checkpoint_of_all_ranks(tmp_path: Path) -> None:
    (tmp_path / "run.died").touch()
    process = command(tmp_path, "run")
    metrics = RunFolder(tmp_path / "run")
    while not [record for record in read_metrics(metrics) if record.get("step", 0) >= 2]:
        assert process.poll() is None, process.communicate()[0][-3000:]
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=WAIT)[0]
    stopped = re.search(r"Stopped by SIG(INT|TERM) at step (\d+); a checkpoint is written", said)
    finished = "Run folder:" in said  # the signal came after the last step
    assert stopped or finished, said[-3000:]
    if stopped:
        assert load_checkpoint(metrics.checkpoints).step == int(stopped[2])
        assert said.count("Stopped by") == 1, said[-3000:]


def test_run_of_two_ranks_goes_on_with_one(tmp_path: Path) -> None:
    (tmp_path / "whole.died").touch()
    (whole, cut) = (command(tmp_path, out) for out in ("whole", "cut"))
    said = {process: process.communicate(timeout=WAIT)[0] for process in (whole, cut)}
    assert whole.returncode == 0, said[whole][-3000:]
    assert cut.returncode != 0, "no rank was killed: this shows nothing"
    alone = subprocess.run(
        [sys.executable, "-m", "vmf_pretrain", "fit", "--resume", "--out", str(tmp_path / "cut"), "--allow-code"],
        env=environment_of(tmp_path / "cut.died"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert alone.returncode == 0, alone.stderr[-3000:]
    assert "Going on from step 5 of 10." in alone.stdout
    losses = [
        [record["loss"] for record in read_metrics(RunFolder(tmp_path / out)) if "loss" in record]
        for out in ("cut", "whole")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert len(losses[0]) == STEPS
