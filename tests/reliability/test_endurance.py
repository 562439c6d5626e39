"""Thousands of steps take no more memory, files, threads or objects than the first hundreds.

Marked slow; ``VMF_FAULTS=10 pytest tests/reliability/test_endurance.py`` does ten times as many steps.
"""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from tests.measure import return_freed_memory
from tests.pretrain.tiny import a_run
from tests.reliability.runs import FAULTS, small_digits
from vmf_kernels import DINOHead, DINOLoss

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads what Linux says of a process"),
]
LOSSES, STEPS = 10_000 * FAULTS, 2_000 * FAULTS
WARM = 5  # the first one in so many is not counted: caches and arenas fill
SLACK = 4 * 2**20  # bytes by which the allocator's arenas may still grow; a lost kilobyte a step is 8 MiB
OBJECTS = 1200  # of Python: a progress bar keeps its last thousand steps; one lost object a step is more


class Taken(NamedTuple):
    """What this process has of the machine."""

    memory: int
    files: int
    threads: int
    objects: int

    @classmethod
    def now(cls) -> Taken:
        gc.collect()
        return_freed_memory()
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        return cls(resident, len(os.listdir("/proc/self/fd")), threading.active_count(), len(gc.get_objects()))

    def growth(self, later: Taken) -> list[str]:
        """What has grown since, in words."""
        allowed = Taken(SLACK, 0, 0, OBJECTS)
        return [
            f"{name} {before} -> {after}"
            for name, before, after, slack in zip(self._fields, self, later, allowed, strict=True)
            if after > before + slack
        ]


def growth_over(steps: int, step: Callable[[int], object]) -> list[str]:
    before = Taken.now()
    for number in range(steps):
        if number == steps // WARM:
            before = Taken.now()
        step(number)
    return before.growth(Taken.now())


def test_ten_thousand_losses_leave_nothing_behind() -> None:
    student, teacher = (DINOHead(8, 32, hidden_dim=8, bottleneck_dim=4) for _ in range(2))
    criterion = DINOLoss(32, 4, 0.04, 0.07, 30, 100)

    def step(number: int) -> None:
        crops = torch.randn(4 * 2, 8)
        criterion(student(crops), teacher(crops[: 2 * 2]), epoch=0).backward()
        student.zero_grad()

    assert not growth_over(LOSSES, step)


@pytest.mark.parametrize("what", ["memory", "files", "objects"])
def test_what_a_step_leaves_behind_is_noticed(what: str) -> None:
    kept: list[Any] = []
    leaks: dict[str, Callable[[int], object]] = {
        "memory": lambda number: kept.append(torch.ones(4096)),
        "files": lambda number: kept.append(os.open(os.devnull, os.O_RDONLY)) if number % 1000 == 0 else None,
        "objects": lambda number: kept.append({number: kept}),
    }
    found = growth_over(10_000, leaks[what])
    if what == "files":
        for descriptor in kept:
            os.close(descriptor)
    assert any(each.startswith(what) for each in found), found


def test_two_thousand_steps_of_a_run_leave_nothing_behind(tmp_path: Path) -> None:
    epochs = STEPS // 40
    config = small_digits(
        method="dino",
        views={"local_count": 0},
        data={"batch_size": 32, "workers": 0},
        train={"epochs": epochs, "checkpoint_every": epochs // 10, "log_every": 20},
        evaluate={"every": epochs, "max_images": 40},
    )
    run, _ = a_run(config, tmp_path / "run")
    training: Any = run.loop
    step, taken = training.step, dict[int, Taken]()

    def noted(number: int, *arguments: Any, **options: Any) -> Any:
        if number in (STEPS // WARM + 1, STEPS - 1):  # a step after a checkpoint, and the last one
            run.keeping.writer.wait()
            taken[number] = Taken.now()
        return step(number, *arguments, **options)

    training.step = noted
    assert run.train() == 0
    first, last = taken.values()
    assert run.step == STEPS
    assert not first.growth(last)
