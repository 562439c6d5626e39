"""Runs that are stopped in the middle, and what is compared of them."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from tests.pretrain.tiny import (
    a_run,
    config_in,
    copied,
)
from vmf_pretrain.data.batch import Batch
from vmf_pretrain.engine.run import Run
from vmf_pretrain.engine.votes import Taken
from vmf_pretrain.storage.metrics import read_metrics

TIMED = ("seconds", "images_per_second", "data_wait", "memory_gib")
WAITED = "data wait"  # the warning that depends on how busy the machine is


def before_step(run: Run, step: int, act: Callable[[], object]) -> Run:
    """Let ``act`` happen while the run does step number ``step``."""
    training: Any = run.loop
    original = training.step

    def step_and_act(number: int, batch: Batch, **options: Any) -> list[Taken]:
        if number == step:
            act()
        taken: list[Taken] = original(number, batch, **options)
        return taken

    training.step = step_and_act
    return run


def stopped_at(run: Run, step: int) -> int:
    """Train until Ctrl-C comes during a step; the exit code."""
    return before_step(run, step, lambda: signal.raise_signal(signal.SIGINT)).train()


def resumed(out: Path) -> Run:
    return a_run(config_in(out), out, resume=True)[0]


def unlocked(run: Run) -> Run:
    """A run that is not trained through ``train``."""
    run.close()
    return run


def state_of(run: Run) -> dict[str, Tensor]:
    groups = run.loop.tensors()
    return copied({f"{group}.{name}": value for group, named in groups.items() for name, value in named.items()})


def untimed(run: Run) -> list[dict[str, Any]]:
    records = [record for record in read_metrics(run.folder) if record.get("warning") != WAITED]
    return [{key: value for key, value in record.items() if key not in TIMED} for record in records]


def summary_of(run: Run) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run.folder.summary.read_text())
    return {**found, "warnings": [said for said in found["warnings"] if said["warning"] != WAITED]}
