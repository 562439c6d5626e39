"""A short run of each method ends as it did before the trainer had methods, and as with the published loss."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.pretrain.tiny import a_run, batch_of, digits_config, loop_on
from vmf_bench.machine import machine
from vmf_pretrain.engine.loop import Loop
from vmf_pretrain.engine.run import Run
from vmf_pretrain.methods.published import PublishedLoss
from vmf_pretrain.storage.metrics import read_metrics

RECORD: dict[str, Any] = json.loads((Path(__file__).parent / "before_the_fold.json").read_text())


def hash_of(run: Run) -> str:
    """Of student, teacher and centre."""
    digest = hashlib.sha256()
    groups = run.loop.tensors()
    for group in ("loss", "student", "teacher"):
        for name in sorted(groups[group]):
            digest.update(f"{group}.{name}".encode())
            digest.update(groups[group][name].detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("method", list(RECORD["methods"]))
def test_final_weights_are_those_of_the_commit_before(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vmf_pretrain.engine.run.draw_plots", lambda *arguments: None)
    expected, threads = RECORD["methods"][method], torch.get_num_threads()
    torch.set_num_threads(RECORD["machine"]["threads"])
    try:
        config = digits_config(method=method, backbone={"drop_path": 0.2, "depth": 2})
        run, _ = a_run(config, tmp_path / "run")
        assert run.train() == 0
        here = {name: value for name, value in machine().items() if name in RECORD["machine"]}
    finally:
        torch.set_num_threads(threads)
    losses = [record["loss"] for record in read_metrics(run.folder) if "loss" in record]
    if here == RECORD["machine"]:
        assert losses == expected["losses"]
        assert hash_of(run) == expected["sha256"]
    else:  # another machine rounds otherwise
        assert losses == pytest.approx(expected["losses"], rel=1e-3)


def fp64_run(method: str, implementation: str, steps: int) -> tuple[list[float], Loop]:
    config = digits_config(
        method=method,
        data={"batch_size": 32},
        loss={"implementation": implementation, "center_start": "zero" if method == "dino" else "first_batch"},
        train={"epochs": 25, "precision": "fp64"},
        optim={"freeze_last_layer_epochs": 0, "warmup_epochs": 2},
    )
    loop, batches = loop_on(config, 64)
    return [loop.step(step, batch_of(batches, step))[0].numbers["loss"] for step in range(steps)], loop


@pytest.mark.parametrize("method", ["dino", "dino-vmf"])
def test_published_loss_gives_the_same_curve(method: str) -> None:
    ours, _ = fp64_run(method, "ours", 50)
    theirs, loop = fp64_run(method, "published", 50)
    assert isinstance(loop.method.loss, PublishedLoss)
    worst = max(abs(one - other) for one, other in zip(ours, theirs, strict=True))
    assert worst < 1e-8, f"off by {worst:.1e}"
    assert abs(ours[0] - ours[-1]) > 0.1, "nothing was learned: this shows nothing"
