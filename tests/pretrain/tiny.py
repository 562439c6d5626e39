"""Runs small enough for a test: a ViT of one block on a few digits, or on generated photographs."""

from __future__ import annotations

import functools
import io
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor, nn

from vmf_pretrain.config.file import config_text, read_config
from vmf_pretrain.config.run import Config
from vmf_pretrain.data.batch import Batch
from vmf_pretrain.data.batches import ViewBatches
from vmf_pretrain.data.bundled import DIGIT_CLASSES, DigitImages, digits
from vmf_pretrain.data.images import Images
from vmf_pretrain.data.load import BUNDLED, load_images
from vmf_pretrain.data.photos import Photos
from vmf_pretrain.data.plan import Plan
from vmf_pretrain.engine.loop import Loop
from vmf_pretrain.engine.run import Run
from vmf_pretrain.methods.dino import DINO
from vmf_pretrain.methods.method import Place
from vmf_pretrain.methods.table import method_class
from vmf_pretrain.networks.headed import Headed

RECIPES = Path(__file__).parents[2] / "python" / "vmf_pretrain" / "recipes"
PHOTO_SIDE = 48  # pixels
CONSOLE_WIDTH = 120
FEW, FEW_HELD_OUT = 90, 40  # digits; five steps of 16 in an epoch
SUMMARY_KEYS = {
    "knn",
    "knn_untrained",
    "knn_pixels",
    "linear",
    "linear_untrained",
    "linear_pixels",
    "mutual_information",
    "rankme",
    "prototypes_used",
    "unique_prototypes",
    "largest_duplicate_share",
    "seconds",
    "method",
    "seed",
}


def changed(config: Config, **sections: Any) -> Config:
    """``config`` with whole fields, or with some fields of a section (a mapping), replaced."""
    values = {
        name: replace(getattr(config, name), **value) if isinstance(value, Mapping) else value
        for name, value in sections.items()
    }
    return replace(config, **values)


def digits_config(**sections: Any) -> Config:
    """The digits recipe, much smaller: 5 steps of 256 images in each of 2 epochs."""
    small = changed(
        _digits_recipe(),
        views={"local_count": 1},
        backbone={"patch_size": 8, "width": 16, "depth": 1, "heads": 1},
        head={"prototypes": 32, "hidden_dim": 32, "bottleneck_dim": 16},
        loss={"warmup_teacher_temp_epochs": 1},
        optim={"warmup_epochs": 1},
        train={"epochs": 2, "device": "cpu", "log_every": 1, "checkpoint_every": 1},
        evaluate={"every": 1, "max_images": 100},
    )
    return changed(small, **sections)


@functools.cache  # parsing it takes longer than a step
def _digits_recipe() -> Config:
    return read_config(RECIPES / "digits.yaml")


class Pixels(nn.Module):
    """A backbone that gives the image back, and counts the images of each pass."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.batches: list[int] = []

    def forward(self, images: Tensor) -> Tensor:
        self.batches.append(len(images))
        return images.flatten(1) * self.weight


def few_digits_config(**sections: Any) -> Config:
    """The same steps of 16 images, where ``few_digits`` says what the digits are."""
    return changed(digits_config(data={"batch_size": 16}), **sections)


def few_digits(patch: pytest.MonkeyPatch) -> None:
    """Let runs of this process find a tenth of the digits: drawing views of 256, and reading all, takes most of a small run."""
    few = some_digits(FEW), some_digits(FEW + FEW_HELD_OUT).subset(torch.arange(FEW, FEW + FEW_HELD_OUT))
    patch.setitem(BUNDLED, "digits", (lambda: few, DIGIT_CLASSES))


def animals_config(**sections: Any) -> Config:
    """The same on silhouettes: 30 steps in an epoch."""
    small = changed(
        digits_config(),
        data={"kind": "animals"},
        views={"global_size": 40, "local_size": 20},
        backbone={"patch_size": 10},
        train={"epochs": 1},
    )
    return changed(small, **sections)


def photos_config(folder: Path, **sections: Any) -> Config:
    """The same on an image folder."""
    small = changed(
        digits_config(),
        data={"kind": "folder", "folder": str(folder), "batch_size": 8, "held_out": 0.25},
        views={"global_size": 32, "local_size": 16},
        train={"epochs": 1},
        evaluate={"neighbours": 3},
    )
    return changed(small, **sections)


def some_digits(count: int) -> DigitImages:
    """The first training digits."""
    return _training_digits().subset(torch.arange(count))


@functools.cache  # drawing them takes longer than a step
def _training_digits() -> DigitImages:
    return digits()[0]


def save_photos(folder: Path, count: int, side: int = PHOTO_SIDE) -> list[Path]:
    """``count`` PNGs of noise around a colour that differs from one to the next."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers = np.random.default_rng(count)
    paths = [folder / f"photo_{place:02d}.png" for place in range(count)]
    for path in paths:
        noise = numbers.integers(-40, 40, (side, side, 3)) + numbers.integers(40, 215, 3)
        Image.fromarray(noise.clip(0, 255).astype(np.uint8)).save(path)
    return paths


def save_ramps(folder: Path, count: int, side: int = PHOTO_SIDE) -> list[Path]:
    """``count`` PNGs that run from one colour to another: as wide a spread within each as over all of them."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers = np.random.default_rng(count)
    paths = [folder / f"ramp_{place:02d}.png" for place in range(count)]
    for path in paths:
        ends = numbers.integers(0, 255, (2, 3))
        noise = numbers.integers(-20, 20, (side, side, 3)) + np.linspace(ends[0], ends[1], side)[:, None]
        Image.fromarray(noise.clip(0, 255).astype(np.uint8)).save(path)
    return paths


def two_classes(folder: Path, each: int = 8) -> Path:
    """A folder of two classes with ``each`` photographs."""
    for name in ("cats", "dogs"):
        save_photos(folder / name, each)
    return folder


def yaml_of(config: Config, path: Path) -> Path:
    """``config`` as a file."""
    path.write_text(config_text(config), encoding="utf-8")
    return path


def folder_images(folder: Path, size: int, held_out: float) -> tuple[Photos, Photos | None]:
    """Training and held-out images of a folder, evaluated at ``size`` pixels."""
    train, kept, _ = load_images(photos_config(folder, data={"held_out": held_out}, views={"global_size": size}))
    assert isinstance(train, Photos)
    assert kept is None or isinstance(kept, Photos)
    return train, kept


def batches_over(images: Images, config: Config, rank: int = 0, ranks: int = 1) -> ViewBatches:
    """Batches with two global views and the local views that the configuration counts."""
    return ViewBatches(images, config, Plan(local_views=config.views.local_count), rank, ranks)


def loop_on(config: Config, count: int, **options: Any) -> tuple[Loop, ViewBatches]:
    """A run's state before its first step, and its batches of ``count`` digits."""
    method = method_class(config)
    batches = ViewBatches(some_digits(count), config, method.plan(config))
    return Loop(config, method, batches.steps_per_epoch, torch.device("cpu"), **options), batches


def dino_of(loop: Loop) -> DINO:
    """The method of a run of DINO's family, which has a student and a teacher."""
    assert isinstance(loop.method, DINO)
    return loop.method


def build_networks(config: Config) -> tuple[Headed, Headed]:
    """Student and teacher of a DINO method."""
    method: Any = method_class(config)(config, Place(0, 5, config.train.epochs))
    return method.student, method.teacher


def batch_of(batches: ViewBatches, step: int) -> Batch:
    """Batch ``step``, which is no error."""
    batch = batches[step]
    assert isinstance(batch, Batch), batch
    return batch


def numbers_of(loop: Loop, step: int, batch: Batch) -> dict[str, float]:
    """Take a step; its numbers."""
    (taken,) = loop.step(step, batch)
    return taken.numbers


CONFIGS: dict[str, Config] = {}  # by their text, which takes longer to parse than a step


def config_in(out: Path) -> Config:
    """The configuration in the folder of a run."""
    path = out / "config.yaml"
    text = path.read_text()
    if text not in CONFIGS:
        CONFIGS[text] = read_config(path)
    return CONFIGS[text]


def a_run(config: Config, out: Path, *, resume: bool = False, **options: Any) -> tuple[Run, io.StringIO]:
    """A run and what it prints."""
    printed = io.StringIO()
    return Run(config, out, resume=resume, console=Console(file=printed, width=CONSOLE_WIDTH), **options), printed


def copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies that later steps do not change."""
    return {name: value.detach().clone() for name, value in tensors.items()}


def differing(some: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> list[str]:
    """Names whose tensors are not the same bit for bit; NaN equals NaN."""
    assert some.keys() == others.keys(), f"{sorted(some)} against {sorted(others)}"
    return [name for name, value in some.items() if not _same(value, others[name])]


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and np.array_equal(one.detach().numpy(), other.detach().numpy(), equal_nan=True)


def one_sentence(text: str) -> bool:
    """Whether an error is one line that ends as a sentence does."""
    return "\n" not in text.strip() and text.strip()[-1] in ".?" and "Traceback" not in text
