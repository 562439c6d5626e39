"""Runs of the methods with masked patches: they train, go on bit for bit, and ranks and parts change nothing."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.on_ranks import start_ranks
from tests.pretrain.tiny import (
    FEW,
    a_run,
    batch_of,
    config_in,
    copied,
    differing,
    digits_config,
    few_digits,
    some_digits,
)
from vmf_pretrain.config.run import Config
from vmf_pretrain.data.batches import ViewBatches
from vmf_pretrain.engine.loop import Loop
from vmf_pretrain.engine.run import Run
from vmf_pretrain.methods.table import method_class
from vmf_pretrain.networks import ranks

OWN: dict[str, Any] = {"patches": "own_head", "patch_prototypes": 20, "patch_bottleneck_dim": 8}
SINKHORN: dict[str, Any] = {"centering": "sinkhorn_knopp", "koleo_weight": 0.1}
SUBSET = {"drop_path": 0.3, "drop_path_rates": "uniform", "drop_path_of": "subset", "registers": 2, "depth": 2}
SETTINGS: dict[str, dict[str, Any]] = {
    "ibot": {"method": "ibot", "head": {"patches": "own_prototypes", "patch_prototypes": 20}},
    "ibot-vmf": {"method": "ibot-vmf"},
    "dinov2": {"method": "dinov2", "backbone": SUBSET, "head": OWN, "loss": SINKHORN},
    "dinov2-vmf": {"method": "dinov2-vmf"},
}
NUMBERS = ("loss", "patch_loss", "koleo", "gradient_norm", "patch_mutual_information", "masked_patch_accuracy")
STEPS = 2
WITHIN = 1e-7  # of each number: 1e-8 on AMD's AVX2, 1.2e-8 seen on Intel's AVX-512
NORM_WITHIN = 2e-7  # 7e-8 seen there, one step of float32


def config_of(name: str, **train: Any) -> Config:
    chosen = SETTINGS[name]
    return digits_config(
        method=chosen["method"],
        data={"batch_size": 32},
        backbone={"patch_size": 4, **chosen.get("backbone", {})},
        head=chosen.get("head", {}),
        loss=chosen.get("loss", {}),
        optim={"warmup_epochs": 1, "learning_rate": 1e-3},
        train={"epochs": 4, "precision": "fp64", **train},
    )


def state_of(run: Run) -> dict[str, torch.Tensor]:
    groups = run.loop.tensors()
    return copied({f"{group}.{name}": value for group, named in groups.items() for name, value in named.items()})


@pytest.mark.parametrize("name", list(SETTINGS))
def test_stopped_run_goes_on_bit_for_bit(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmf_pretrain.engine.run.draw_plots", lambda *arguments: None)
    few_digits(monkeypatch)
    config = digits_config(
        method=SETTINGS[name]["method"],
        backbone={"patch_size": 4, **SETTINGS[name].get("backbone", {})},
        head=SETTINGS[name].get("head", {}),
        loss=SETTINGS[name].get("loss", {}),
        data={"batch_size": FEW // 2},
        train={"epochs": 1},
        optim={"warmup_epochs": 0},
    )
    whole, _ = a_run(config, tmp_path / "whole")
    assert whole.train() == 0
    stopped, _ = a_run(config, tmp_path / "stopped")
    loop: Any = stopped.loop
    step = loop.step

    def stopping(*arguments: Any, **options: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return step(*arguments, **options)

    loop.step = stopping
    assert stopped.train() == 128 + signal.SIGINT
    again, _ = a_run(config_in(tmp_path / "stopped"), tmp_path / "stopped", resume=True)
    assert again.step == 1
    assert again.train() == 0
    assert differing(state_of(whole), state_of(again)) == []
    assert whole.figures["mutual_information"] == again.figures["mutual_information"]


def numbers(*names: str, **train: Any) -> dict[str, list[dict[str, float]]]:
    """Of the first steps of methods, on as many ranks as there are."""
    found = {}
    for name in names:
        config = config_of(name, **train)
        method = method_class(config)
        batches = ViewBatches(some_digits(64), config, method.plan(config), ranks.rank(), ranks.count())
        loop = Loop(config, method, batches.steps_per_epoch, torch.device("cpu"))
        taken = [loop.step(step, batch_of(batches, step))[0].numbers for step in range(STEPS)]
        found[name] = [{key: value[key] for key in NUMBERS} for value in taken]
    return found


def run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = {
        "2 ranks": numbers("ibot", "dinov2"),
        "2 ranks, fsdp": numbers("dinov2", parallel="fsdp"),
        "2 ranks, in parts": numbers("dinov2", accumulate=4),
    }
    if rank == 0:
        Path(folder, "numbers.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_every_way_of_dividing_the_batch_gives_the_same_numbers(tmp_path: Path) -> None:
    start_ranks(run_rank, (str(tmp_path),), 2)
    ways = {"4 parts": numbers("ibot", accumulate=4), "recomputed": numbers("dinov2", activation_checkpointing=True)}
    ways |= json.loads((tmp_path / "numbers.json").read_text())
    whole = numbers("ibot", "dinov2")
    for way, by_method in ways.items():
        for name, steps in by_method.items():
            for step, (got, expected) in enumerate(zip(steps, whole[name], strict=True)):
                for key in NUMBERS:
                    error = abs(got[key] - expected[key]) / max(1.0, abs(expected[key]))
                    allowed = NORM_WITHIN if key == "gradient_norm" else WITHIN
                    assert error <= allowed, f"{way}, {name}, step {step}: {key} is {got[key]} not {expected[key]}"
