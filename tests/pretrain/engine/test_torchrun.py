"""Runs under torchrun's agent: a rank that dies, a restart, another number of ranks; and a signal to torchrun itself.

The agent starts ranks from a server that has imported everything, which a rank of torchrun's takes many seconds for; the one
that gets the signal is itself started from there, and does what ``torchrun`` does once it has read its command.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from tests.pretrain.tiny import a_run, few_digits, few_digits_config, yaml_of
from vmf_pretrain.cli import main
from vmf_pretrain.config.file import read_config
from vmf_pretrain.storage.checkpoint import load_checkpoint
from vmf_pretrain.storage.metrics import read_metrics
from vmf_pretrain.storage.run_folder import RunFolder
from vmf_pretrain.storage.weights import load_weights

DYING = "tests.pretrain.engine.dying_method:Dying"
STEPS = 10  # of the digits' configuration, with checkpoints after 5 and 10
WAIT = 300  # seconds, on a busy machine


def one_rank(arguments: list[str], drawn: bool) -> None:
    """The command on one rank, on few digits; drawing takes longer than the run."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        few_digits(patch)
        if not drawn:
            patch.setattr("vmf_pretrain.engine.run.draw_plots", lambda *arguments: None)
        code = main(arguments)
    if code:
        sys.exit(code)


def launch(folder: Path, out: str, *, restarts: int = 0, dies: bool = True, parallel: str = "ddp") -> None:
    """A run of two ranks of which one is killed in step 7; raises ChildFailedError if it does not end well."""
    if not dies:
        (folder / f"{out}.died").touch()
    config = replace(
        few_digits_config(train={"parallel": parallel}), method=DYING, options={"died": str(folder / f"{out}.died")}
    )
    arguments = [
        "fit",
        "--config",
        str(yaml_of(config, folder / f"{out}.yaml")),
        "--out",
        str(folder / out),
        "--allow-code",
    ]
    elastic_launch(two_ranks(restarts), one_rank)(arguments, parallel == "fsdp")


def two_ranks(restarts: int = 0, start_method: str = "forkserver") -> LaunchConfig:
    """What torchrun --standalone --nproc-per-node=2 makes of its options."""
    return LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id=uuid.uuid4().hex,
        max_restarts=restarts,
        start_method=start_method,
    )


def final_tensors(folder: Path) -> dict[str, Any]:
    found = load_checkpoint(RunFolder(folder).checkpoints)
    assert found.step == STEPS
    return {f"{group}.{name}": value for group, named in found.tensors.items() for name, value in named.items()}


def losses_of(folder: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(RunFolder(folder)) if "loss" in record]


@pytest.fixture(scope="module", autouse=True)
def undisturbed() -> Iterator[None]:
    """The agent takes over signal handlers and the environment of this process."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    environment = dict(os.environ)
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    os.environ.clear()
    os.environ.update(environment)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of two ranks that nothing stopped, and one that lost a rank; how long the other one lived on."""
    folder = tmp_path_factory.mktemp("runs")
    launch(folder, "whole", dies=False)
    began = time.monotonic()
    with pytest.raises(ChildFailedError):
        launch(folder, "cut")
    (folder / "seconds").write_text(str(time.monotonic() - began))
    return folder


def test_restart_after_a_killed_rank_goes_on_to_the_same_bits(runs: Path) -> None:
    launch(runs, "restarted", restarts=1)
    assert (runs / "restarted.died").exists(), "no rank was killed: this shows nothing"
    ours, theirs = final_tensors(runs / "restarted"), final_tensors(runs / "whole")
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not ours[name].equal(theirs[name])] == []
    assert losses_of(runs / "restarted") == losses_of(runs / "whole")


def test_without_a_restart_the_others_end_within_a_minute(runs: Path) -> None:
    seconds = float((runs / "seconds").read_text())
    assert seconds < 60, f"the run and its end took {seconds:.0f} s"
    assert load_checkpoint(RunFolder(runs / "cut").checkpoints).step == 5


def test_run_of_two_ranks_goes_on_with_one(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmf_pretrain.engine.run.draw_plots", lambda *arguments: None)
    few_digits(monkeypatch)
    run, printed = a_run(read_config(runs / "cut" / "config.yaml"), runs / "cut", resume=True, allow_code=True)
    assert run.train() == 0
    assert "Going on from step 5 of 10." in printed.getvalue()
    assert losses_of(runs / "cut") == pytest.approx(losses_of(runs / "whole"), rel=1e-6)


def test_sharded_run_goes_on_from_its_shards_to_its_plots(runs: Path) -> None:
    launch(runs, "sharded", restarts=1, parallel="fsdp")
    assert (runs / "sharded.died").exists(), "no rank was killed: this shows nothing"
    assert losses_of(runs / "sharded") == pytest.approx(losses_of(runs / "whole"), rel=1e-5)
    assert (runs / "sharded" / "summary.json").exists()
    assert (runs / "sharded" / "plots" / "attention.png").stat().st_size
    weights, expected = (load_weights(runs / out / "weights" / "last.safetensors")[0] for out in ("sharded", "whole"))
    assert {name: value.shape for name, value in weights.items()} == {
        name: value.shape for name, value in expected.items()
    }


def torchrun(arguments: list[str], printed: Path) -> None:
    """A process that is torchrun, and what it and its ranks print; they are forks of it, for it has imported everything."""
    for number in (1, 2):
        os.dup2(os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    elastic_launch(two_ranks(start_method="fork"), one_rank)(arguments, False)


def test_ctrl_c_at_torchrun_leaves_a_checkpoint_of_all_ranks(tmp_path: Path) -> None:
    config = yaml_of(few_digits_config(train={"epochs": 4000, "checkpoint_every": 4000}), tmp_path / "run.yaml")
    folder, printed = RunFolder(tmp_path / "run"), tmp_path / "printed"
    arguments = ["fit", "--config", str(config), "--out", str(folder.path)]
    process = multiprocessing.get_context("forkserver").Process(target=torchrun, args=(arguments, printed))
    process.start()
    try:
        while not [record for record in read_metrics(folder) if record.get("step", 0) >= 2]:
            assert process.is_alive(), printed.read_text()[-3000:]
            time.sleep(0.05)
        os.kill(int(str(process.pid)), signal.SIGINT)
        process.join(WAIT)
        assert not process.is_alive(), f"torchrun lives on after {WAIT} s"
    finally:
        process.kill()
    said = printed.read_text()
    stopped = re.search(r"Stopped by SIG(INT|TERM) at step (\d+); a checkpoint is written", said)
    assert stopped, said[-3000:]
    assert load_checkpoint(folder.checkpoints).step == int(stopped[2])
    assert said.count("Stopped by") == 1, said[-3000:]
