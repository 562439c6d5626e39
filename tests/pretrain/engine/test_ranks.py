"""The global batch is the unit: ranks and parts divide it, and change nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.on_ranks import start_ranks
from tests.pretrain.tiny import batch_of, digits_config, some_digits
from vmf_pretrain.data.batches import ViewBatches
from vmf_pretrain.engine.loop import Loop
from vmf_pretrain.methods.table import method_class
from vmf_pretrain.networks import ranks

STEPS = 4  # of two epochs: with prototypes frozen, and not
IMAGES = 64
SETTINGS: dict[str, dict[str, Any]] = {
    "dino-vmf": {"method": "dino-vmf"},
    "dino, stochastic depth": {"method": "dino", "backbone": {"drop_path": 0.3, "depth": 2}},
}
AMONG_A_RANK = {"loss": {"koleo_group": "rank", "koleo_weight": 1.0}}
SHARED: dict[str, dict[str, Any]] = {
    "data": {"batch_size": 32},
    "train": {"epochs": 4},
    "optim": {"warmup_epochs": 1, "learning_rate": 1e-3},
}
NUMBERS = ("loss", "koleo", "gradient_norm", "mutual_information", "teacher_entropy", "kl")


def losses(setting: dict[str, Any], steps: int = STEPS, **train: Any) -> list[dict[str, float]]:
    """The logged numbers of the first steps, on as many ranks as there are."""
    merged: dict[str, Any] = {name: dict(value) for name, value in SHARED.items()}
    for name, value in setting.items():
        merged[name] = {**merged.get(name, {}), **value} if isinstance(value, dict) else value
    merged["train"].update(train)
    config = digits_config(**merged)
    method = method_class(config)
    batches = ViewBatches(some_digits(IMAGES), config, method.plan(config), ranks.rank(), ranks.count())
    loop = Loop(config, method, batches.steps_per_epoch, torch.device("cpu"))
    taken = [loop.step(step, batch_of(batches, step))[0].numbers for step in range(steps)]
    return [{name: numbers[name] for name in NUMBERS} for numbers in taken]


def all_settings(**train: Any) -> dict[str, list[dict[str, float]]]:
    return {name: losses(setting, **train) for name, setting in SETTINGS.items()}


def run_rank(rank: int, folder: str, count: int) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=count)
    found: dict[str, Any] = {"ddp": {**all_settings(), "among a rank": losses(AMONG_A_RANK, 1)}}
    if count == 2:
        found["fsdp"] = all_settings(parallel="fsdp")
        found["in parts"] = all_settings(accumulate=2)
    if rank == 0:
        Path(folder, "losses.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, list[dict[str, float]]]]:
    """Numbers by way of dividing the batch, then by setting."""
    alone = {**all_settings(), "among a rank": losses(AMONG_A_RANK, 1)}
    found = {"whole": alone, "4 parts": all_settings(accumulate=4)}
    for count in (2, 4):
        folder = tmp_path_factory.mktemp(f"ranks{count}")
        start_ranks(run_rank, (str(folder), count), count)
        for way, numbers in json.loads((folder / "losses.json").read_text()).items():
            found[f"{count} ranks, {way}"] = numbers
    return found


WAYS = ["4 parts", "2 ranks, ddp", "2 ranks, fsdp", "2 ranks, in parts", "4 ranks, ddp"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("setting", list(SETTINGS))
def test_every_way_of_dividing_the_batch_gives_the_same_numbers(setting: str, way: str, found: Any) -> None:
    for step, (got, expected) in enumerate(zip(found[way][setting], found["whole"][setting], strict=True)):
        for name in NUMBERS:
            tolerance = 1e-6 if name == "loss" else 1e-5 if name == "koleo" else 1e-4
            error = abs(got[name] - expected[name]) / max(1.0, abs(expected[name]))
            assert error <= tolerance, f"step {step}: {name} is {got[name]:.8f} instead of {expected[name]:.8f}"


def test_group_of_koleo_is_a_setting(found: Any) -> None:
    name = "among a rank"
    for way in ("2 ranks, ddp", "4 ranks, ddp"):
        apart = abs(found[way][name][0]["koleo"] - found["whole"][name][0]["koleo"])
        assert apart > 1e-3, f"{way}: neighbours among a rank's images are those of the batch (apart by {apart:.1e})"
