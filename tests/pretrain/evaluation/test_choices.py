"""What is chosen is chosen on images that nothing was fitted to: of noise, those are right as often as by chance."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.pretrain.evaluation.tasks_at_work import CPU
from tests.pretrain.tiny import some_digits
from vmf_pretrain.config.tasks.linear import LinearTask
from vmf_pretrain.config.tasks.transfer import TransferTask
from vmf_pretrain.evaluation.stored import Features, features_in, write_chunk
from vmf_pretrain.evaluation.tasks.linear import _heads, _logistic
from vmf_pretrain.evaluation.tasks.transfer import Transfer

pytestmark = pytest.mark.quick

IMAGES, CLASSES, DIM = 120, 4, 150  # more features than images, so that a fit to labels of noise succeeds
CHANCE = 100 / CLASSES


def noise(folder: Path, seed: int) -> Features:
    """Features on disk that say nothing of the labels, of which there are equally many of each."""
    numbers = torch.Generator().manual_seed(seed)
    images = replace(some_digits(IMAGES), labels=torch.randperm(IMAGES, generator=numbers) % CLASSES)
    folder.mkdir()
    write_chunk(folder, 0, torch.arange(IMAGES), {"class": list(torch.randn(IMAGES, 1, DIM, generator=numbers))}, {})
    return features_in(folder, images)


def heads(subject: Any) -> list[tuple[float, float]]:
    settings = LinearTask(blocks=(1,), mean_patch=(False,), rates=(10.0,), iterations=60, held_out=0.5)
    return [pair for curve in _heads(subject, settings).curves.values() for pair in curve]


def logistic(subject: Any) -> list[tuple[float, float]]:
    return _logistic(subject, LinearTask(costs=3, held_out=0.5)).curves["C"]


def transfer(subject: Any) -> list[tuple[float, float]]:
    found: list[tuple[float, float]] = Transfer()._of_one(subject, TransferTask(costs=3)).facts["validation"]
    return found


CURVES = {"heads": heads, "logistic": logistic, "transfer": transfer}


@pytest.mark.parametrize("name", CURVES)
def test_of_noise_the_chosen_is_right_by_chance(name: str, tmp_path: Path) -> None:
    splits = {split: noise(tmp_path / split, seed) for seed, split in enumerate(("train", "val", "test"))}
    named = {f"{probe} {split}": splits[split] for probe in ("heads", "logistic") for split in ("train", "test")}
    subject = SimpleNamespace(evaluated=SimpleNamespace(device=CPU), features={**splits, **named})
    curve = CURVES[name](subject)
    assert max(value for _, value in curve) < CHANCE + 20, f"{curve}: fitted to the images that it is chosen on"
    assert min(value for _, value in curve) > CHANCE - 20
