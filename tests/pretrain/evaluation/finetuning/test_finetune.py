"""Fine-tuning: the source's numbers, its schedules and rates of layers; that it learns, and what is chosen where."""

from __future__ import annotations

import csv
import random
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.loss import LabelSmoothingCrossEntropy
from timm.models.vision_transformer import VisionTransformer
from timm.scheduler import CosineLRScheduler

from tests.pretrain.evaluation.tasks_at_work import photos_run, suite_on
from tests.pretrain.tiny import some_digits
from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.config.tasks.finetune import PROTOCOLS, FinetuneTask
from vmf_pretrain.data.network_input import NetworkInput
from vmf_pretrain.evaluation.evaluated import fingerprint_of
from vmf_pretrain.evaluation.finetuning import state, train
from vmf_pretrain.evaluation.finetuning.network import Classifier, classifier_of, rate_groups
from vmf_pretrain.evaluation.finetuning.schedule import rate_of
from vmf_pretrain.evaluation.finetuning.train import _step
from vmf_pretrain.evaluation.finetuning.views import Course, Views, parts_of
from vmf_pretrain.evaluation.result import Result
from vmf_pretrain.evaluation.tasks.finetune import Finetune

pytestmark = pytest.mark.quick

BEIT = (
    "warmup_epochs=20 drop_path=0.1 weight_decay=0.05 first_rate=0 last_rate=1e-6 smoothing=0.1 mixup=0.8 cutmix=1 "
    "erase=0.25 head_scale=0.001 rate=4e-3 batch_size=1024 part=128 repeats=1 augment=rand-m9-mstd0.5-inc1"
)
DEIT = (
    "epochs=1000 warmup_epochs=5 drop_path=0.1 weight_decay=0.05 first_rate=1e-6 last_rate=1e-5 smoothing=0.1 mixup=0.8 "
    "cutmix=1 erase=0.25 head_scale=1 rate=7.5e-6 rate_batch=512 batch_size=768 part=96 repeats=3 layer_decay=1 "
    "augment=rand-m9-mstd0.5-inc1"
)
SOURCE = {  # 8 GPUs of iBOT's run.sh, its evaluation/README.md, and the defaults of the two scripts that they call
    "imagenet_small": f"{BEIT} epochs=200 layer_decay=0.75",
    "imagenet_base": f"{BEIT} epochs=100 layer_decay=0.65",
    "imagenet_large": f"{BEIT} epochs=50 layer_decay=0.75 part=64 drop_path=0.2 warmup_epochs=5",
    "transfer": DEIT,
    "cars": f"{DEIT} rate=7.5e-5",
    "inaturalist": f"{DEIT} epochs=360 erase=0.1",
}
FED = NetworkInput(16, (0.0,), (1.0,))


def small_vit() -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=12, num_heads=2, depth=3, in_chans=1, num_classes=0
    )


@pytest.mark.parametrize("name", SOURCE)
def test_protocol_has_the_numbers_of_its_source(name: str) -> None:
    for word, value in (pair.split("=") for pair in SOURCE[name].split()):
        found = getattr(PROTOCOLS[name], word)
        expected = dict(pair.split("=") for pair in SOURCE[name].split())[word]  # the last one counts
        assert str(found) == expected or found == float(expected), f"{word} is {found}; {value} in the source"
    assert FinetuneTask(protocol=name).chosen() == PROTOCOLS[name]  # type: ignore[arg-type]


def test_rate_of_each_epoch_is_that_of_timm_s_scheduler() -> None:
    protocol, steps = replace(PROTOCOLS["transfer"], epochs=30, rate=1e-3), 4
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3 * 64 / 512)
    scheduler = CosineLRScheduler(optimizer, t_initial=30, lr_min=1e-5, warmup_lr_init=1e-6, warmup_t=5)
    for epoch in range(30):
        for step in range(steps):
            found = rate_of(protocol, 64, epoch * steps + step, steps)
            assert found == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12), f"epoch {epoch}"
        scheduler.step(epoch)


def test_rate_of_each_step_is_that_of_the_published_formula() -> None:
    protocol, steps = replace(PROTOCOLS["imagenet_base"], epochs=7, warmup_epochs=2), 5
    rest = np.arange(5 * steps)
    falling = 1e-6 + 0.5 * (4e-3 - 1e-6) * (1 + np.cos(np.pi * rest / len(rest)))
    expected = np.concatenate([np.linspace(0, 4e-3, 2 * steps), falling])
    found = [rate_of(protocol, 1024, step, steps) for step in range(7 * steps)]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_rates_fall_from_the_classifier_to_the_patches() -> None:
    """By the numbers of the source: the embedding is layer 0, block i is layer i + 1, and all else is the last layer."""
    network, protocol = small_vit(), replace(PROTOCOLS["imagenet_small"], drop_path=0.3)
    before = fingerprint_of(network, FED)
    classifier = classifier_of(network, 12, 4, protocol)
    assert isinstance(classifier.backbone, VisionTransformer)
    rates = [block.get_submodule("drop_path2").drop_prob for block in classifier.backbone.blocks]
    assert rates == pytest.approx([0, 0.15, 0.3])
    assert float(classifier.head.weight.detach().abs().max()) <= 2 * 0.001, "scaled down, of a normal cut at 2"
    groups = rate_groups(classifier, protocol)
    shares = {id(p): (group["share"], group["weight_decay"]) for group in groups for p in group["params"]}
    for name, parameter in classifier.named_parameters():
        inner = name.removeprefix("backbone.")
        layer = 0 if inner.startswith(("cls_token", "pos_embed", "patch_embed")) else 4
        layer = int(inner.split(".")[1]) + 1 if inner.startswith("blocks") else layer
        plain = parameter.ndim == 1 or inner in ("cls_token", "pos_embed")
        share, decay = shares.pop(id(parameter))
        assert (share, decay) == (pytest.approx(0.75 ** (4 - layer)), 0.0 if plain else 0.05), name
    assert not shares
    assert fingerprint_of(network, FED) == before


def test_a_step_in_parts_is_the_step_of_the_whole_with_timm_s_smooth_loss() -> None:
    torch.manual_seed(3)
    inputs, labels = torch.randn(6, 1, 16, 16), torch.tensor([0, 1, 2, 0, 1, 2])
    found = []
    for parts in ([(inputs, labels)], [(inputs[:4], labels[:4]), (inputs[4:], labels[4:])], None):
        classifier = classifier_of(small_vit(), 12, 3, replace(PROTOCOLS["transfer"], drop_path=0.0))
        optimizer = torch.optim.SGD(classifier.parameters(), lr=1.0)
        if parts is None:
            LabelSmoothingCrossEntropy(0.1)(classifier(inputs), labels).backward()
            optimizer.step()
        else:
            _step(classifier, optimizer, parts, 6, 0.1, torch.float32)
        found.append(torch.cat([p.detach().flatten() for p in classifier.backbone.parameters()]))
    assert not torch.equal(found[0], torch.cat([p.detach().flatten() for p in small_vit().parameters()]))
    for other in found[1:]:
        torch.testing.assert_close(found[0], other, atol=1e-6, rtol=1e-5)


def numpys_state() -> list[int]:
    """Of its global generator."""
    state = np.random.get_state()
    assert isinstance(state, tuple)
    numbers: list[int] = state[1].tolist()
    return numbers


def test_views_are_the_same_in_any_process_and_leave_generators_alone() -> None:
    protocol = replace(PROTOCOLS["transfer"], epochs=2, part=2)
    views, course = Views(some_digits(7), FED, protocol), Course(7, 6, protocol)
    torch.manual_seed(0)
    before = random.getstate(), numpys_state()
    here, there = list(parts_of(views, course, 0)), list(parts_of(views, course, 1))
    assert (random.getstate(), numpys_state()) == before
    assert len(here) == 2 * 3
    assert all(part.shape == (2, 1, 16, 16) for part in here)
    assert all(torch.equal(one, two) for one, two in zip(here, there, strict=True))
    places = [[place for part in batch for _, place in part] for batch in course.batches()]
    assert [len(set(batch)) for batch in places] == [2, 2], "each of the first images three times"
    assert not torch.equal(here[0][0], here[0][1]), "in three views"


def coloured(folder: Path, each: int, seed: int) -> None:
    """Two classes: more red than blue, and more blue than red."""
    numbers = np.random.default_rng(seed)
    for name, tone in (("blue", (60, 110, 190)), ("red", (190, 110, 60))):
        (folder / name).mkdir(parents=True)
        for place in range(each):
            pixels = np.array(tone) + numbers.integers(-30, 30, 3) + numbers.integers(-30, 30, (32, 32, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / name / f"{place:02}.png")


@pytest.mark.parametrize("augment", ["rand-m9-mstd0.5-inc1", "rand-m9-mstd0.5", "original", "augmix-m5-w4-d2"])
def test_every_operation_takes_every_magnitude(augment: str) -> None:
    """Posterising ends at 0 bits, a black image, which Pillow no longer makes."""
    protocol = replace(PROTOCOLS["transfer"], augment=augment)
    colouring = Views(some_digits(4), FED, protocol).augment[1].transforms[0]
    operations = getattr(colouring, "ops", None) or [one for policy in colouring.policy for one in policy]
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    black = 0
    for operation in operations:
        operation.prob, operation.magnitude_std = 1.0, 0.0
        for magnitude in range(11):
            operation.magnitude = magnitude
            done = operation(image)
            assert (done.mode, done.size) == (image.mode, image.size)
            black += "Posterize" in operation.name and not np.asarray(done).any()
    assert black or "-inc1" not in augment


def test_task_learns_and_chooses_its_rate_on_training_images(tmp_path: Path) -> None:
    data = tmp_path / "photos"
    coloured(data / "train", 16, 0)
    coloured(data / "val", 8, 1)
    (data / "train/red/damaged.png").write_bytes(b"no image")
    few = {"epochs": 4, "warmup_epochs": 1, "batch_size": 8, "part": 4, "layer_decay": 0.9, "rates": [1.0, 1e-2]}
    few |= {"held_out": 0.25, "workers": 0}
    run = photos_run(data / "train", tmp_path / "run")
    suite, said, _ = suite_on(run, data, tmp_path / "out", {"finetune": few})
    result = suite.run([Finetune()])["finetune"]
    assert result.figures[0].value > 90, f"top-1 is {result.figures[0].value}"
    curve = dict(result.facts["held_out_accuracy"])
    assert set(curve) == {1.0, 1e-2}
    assert result.facts["rate"] == 1e-2
    assert curve[1.0] < curve[1e-2]
    assert result.facts["train_images"] == 32, "the damaged one is left out"
    assert "1 of train" in said[-1]
    rows = list(csv.DictReader(next((tmp_path / "out").glob("finetune-*/rows.csv")).read_text().splitlines()))
    right = sum(row["predicted"] == row["class"] for row in rows)
    assert 100 * right / len(rows) == pytest.approx(result.figures[0].value)


class KilledError(Exception):
    """As far as a training came."""


def killed_at(patch: pytest.MonkeyPatch, last: int | None) -> list[float]:
    """What tells the classifier's weights after each step from here on, of which the one behind ``last`` ends all."""
    taken: list[float] = []
    taking = train._step

    def counted(classifier: Classifier, optimizer: torch.optim.Optimizer, *others: Any) -> None:
        if len(taken) == last:
            raise KilledError
        taking(classifier, optimizer, *others)
        taken.append(float(classifier.head.weight.detach().double().abs().sum()))

    patch.setattr(train, "_step", counted)
    return taken


def test_a_killed_task_goes_on_after_the_last_epoch_to_the_same_figures(tmp_path: Path) -> None:
    """Two rates and then the better one, 3 epochs of 3 or 4 steps each: killed in the second rate, and in the last training."""
    data = tmp_path / "photos"
    coloured(data / "train", 8, 0)
    coloured(data / "val", 4, 1)
    few = {"epochs": 3, "warmup_epochs": 1, "batch_size": 4, "part": 4, "drop_path": 0.3, "rates": [1e-3, 3e-3]}
    few |= {"held_out": 0.25, "workers": 0}
    run = photos_run(data / "train", tmp_path / "run")

    def done(out: str, last: int | None) -> tuple[Result | None, list[float]]:
        suite, _, _ = suite_on(run, data, tmp_path / out, {"finetune": few})
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(state, "SECONDS_BETWEEN", 0.0)
            taken = killed_at(patch, last)
            try:
                return suite.run([Finetune()])["finetune"], taken
            except KilledError:
                return None, taken

    whole, steps = done("whole", None)
    assert whole is not None
    assert len(steps) == 9 + 9 + 12
    assert len(set(steps)) == len(steps) - 2, "all differ but the starts of the trainings, whose first rate is 0"
    parts = []
    for last in (9 + 4, 6 + 8 + 3):
        result, taken = done("killed", last)
        assert result is None
        parts.append(taken)
        assert next((tmp_path / "killed").glob("finetune-*/unfinished/training.safetensors")).is_file()
    result, taken = done("killed", None)
    assert result is not None
    assert [*parts[0][: 9 + 3], *parts[1][: 6 + 8], *taken] == steps, "what is on disk is not done again"
    assert [asdict(figure) for figure in result.figures] == [asdict(figure) for figure in whole.figures]
    assert result.facts == whole.facts
    rows, expected = (next((tmp_path / out).glob("finetune-*/rows.csv")).read_text() for out in ("killed", "whole"))
    assert rows == expected
    assert not list((tmp_path / "killed").glob("finetune-*/unfinished"))


def test_settings_that_make_no_sense_are_refused() -> None:
    for wrong in ({"rates": (1e-3, 1e-3)}, {"part": 1}, {"layer_decay": 0.0}, {"drop_path": 1.0}, {"epochs": 0}):
        with pytest.raises(PretrainError, match=f"finetune.{next(iter(wrong))}"):
            FinetuneTask(**wrong)
    with pytest.raises(PretrainError, match="vision transformer of images"):
        classifier_of(torch.nn.Linear(2, 2), 2, 2, PROTOCOLS["transfer"])
