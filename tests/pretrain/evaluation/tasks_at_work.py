"""A small run, the folders that evaluations look at, and tasks that say what they were given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from tests.pretrain.tiny import digits_config, photos_config, save_photos
from vmf_pretrain.config.file import config_text, python_layer
from vmf_pretrain.config.run import Config
from vmf_pretrain.config.tasks.evaluation import EvaluationConfig
from vmf_pretrain.config.typed import made
from vmf_pretrain.data.network_input import NetworkInput, network_input
from vmf_pretrain.evaluation.evaluated import load_evaluated
from vmf_pretrain.evaluation.extract import Wanted
from vmf_pretrain.evaluation.given import Given
from vmf_pretrain.evaluation.outputs import Kinds
from vmf_pretrain.evaluation.result import Figure, Result
from vmf_pretrain.evaluation.suite import Hooks, Suite
from vmf_pretrain.evaluation.task import Subject, Task
from vmf_pretrain.evaluation.views import CentreSquare
from vmf_pretrain.methods.method import Place
from vmf_pretrain.methods.table import method_class
from vmf_pretrain.storage.run_folder import RunFolder
from vmf_pretrain.storage.weights import Weights, save_weights

CPU = torch.device("cpu")


def run_of(config: Config, out: Path, seed: int = 0) -> Path:
    """The folder of a run that has saved its weights, which differ by ``seed``."""
    folder = RunFolder.create(out)
    folder.write_config(config_text(config))
    torch.manual_seed(seed)
    method = method_class(config)(config, Place(0, 1, config.train.epochs))
    facts = {"network": config.method, "step": 3, "knn": None, "config": asdict(config)}
    for name in ("last", "best"):
        path = folder.weights / f"{name}.safetensors"
        save_weights(Weights(path, method.exported.state_dict(), network_input(config), facts))
    return out


def digits_run(out: Path) -> Path:
    """A run on digits."""
    return run_of(digits_config(data={"batch_size": 32}), out)


def photos_run(folder: Path, out: Path) -> Path:
    """A run on photographs, whose network has two blocks."""
    return run_of(photos_config(folder, backbone={"depth": 2}), out)


def with_splits(folder: Path) -> Path:
    """``train`` and ``val`` of two classes, and a class that is in ``val`` alone; one image of ``train`` is damaged."""
    for part, each in (("train", 9), ("val", 3)):
        for name in ("cats", "dogs"):
            save_photos(folder / part / name, each)
    save_photos(folder / "val" / "emus", 2)
    (folder / "train" / "dogs" / "damaged.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    with Image.open(folder / "val" / "emus" / "photo_00.png") as image:
        image.resize((97, 60)).save(folder / "val" / "emus" / "photo_00.png")
    return folder


@dataclass(frozen=True)
class Nothing:
    """Settings of the tasks here."""


@dataclass(frozen=True)
class TinyConfig(EvaluationConfig):
    """An evaluation with sections for the tasks here."""

    count: Nothing = field(default_factory=Nothing)
    patches: Nothing = field(default_factory=Nothing)


class Count(Task[Nothing]):
    """Counts the images whose features it gets, and how often it was run."""

    name = "count"
    kinds = Kinds()
    runs = 0

    def wants(self, settings: Nothing, fed: NetworkInput) -> dict[str, Wanted]:
        wanted = Wanted(CentreSquare(fed.size, fed.size), self.kinds)
        return {"train": wanted, "test": wanted}

    def run(self, subject: Subject, settings: Nothing) -> Result:
        type(self).runs += 1
        train = subject.features["train"]
        return Result([Figure("images", len(train), unit="")], [{"image": name} for name in train.names()])


class Patches(Count):
    """The same, of a task that wants patches too."""

    name = "patches"
    kinds = Kinds(2, frozenset({"patches", "mean_patch"}))


@dataclass(frozen=True)
class Whole:
    """All of an image, cut to whole patches."""

    patch: int = 8

    def __call__(self, image: Tensor) -> Tensor:
        height, width = (side // self.patch * self.patch for side in image.shape[1:])
        return image[:, :height, :width]


def suite_on(
    run: Path, data: Path | None, out: Path, sections: Mapping[str, object] | None = None, **features: object
) -> tuple[Suite, list[str], list[str]]:
    """A suite, what it says, and which tasks it found a result of, with "before" where they had finished before."""
    values = {
        "features": {"batch_size": 4, "threads": 2, **features},
        "data.folder": data and str(data),
        **(sections or {}),
    }
    config: TinyConfig = made(TinyConfig, python_layer(values, TinyConfig))
    evaluated = load_evaluated(str(run), device=CPU)
    said: list[str] = []
    found: list[str] = []
    hooks = Hooks(
        said.append,
        lambda count: None,
        lambda count: None,
        lambda name, result, where, before: found.append(f"{name} before" if before else name),
    )
    return Suite(evaluated, Given(config.data, evaluated.config, evaluated.fed.size), config, out, hooks), said, found
