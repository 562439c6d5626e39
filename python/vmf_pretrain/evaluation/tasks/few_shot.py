"""Classification with few labelled images, as MSN and iBOT have it, and in episodes of few classes.

Legend: N training images, M test images, F features.
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.config.tasks.few_shot import FewShotTask
from vmf_pretrain.data.network_input import NetworkInput
from vmf_pretrain.evaluation.accuracy import accuracies
from vmf_pretrain.evaluation.bootstrap import mean_interval
from vmf_pretrain.evaluation.episodes import Shape, eligible, episode_accuracies
from vmf_pretrain.evaluation.extract import Wanted
from vmf_pretrain.evaluation.given import Given
from vmf_pretrain.evaluation.logistic import regressions
from vmf_pretrain.evaluation.name_lists import listed_places, read_names
from vmf_pretrain.evaluation.outputs import UNNORMED, Kinds
from vmf_pretrain.evaluation.result import Figure, Result
from vmf_pretrain.evaluation.scores import Known, Predicted, predicted
from vmf_pretrain.evaluation.splits import drawn_per_class
from vmf_pretrain.evaluation.stored import Features
from vmf_pretrain.evaluation.task import Subject, Task
from vmf_pretrain.evaluation.views import CentreSquare


class FewShot(Task[FewShotTask]):
    """Top-1 accuracy with few labelled images: the mean over draws, and over episodes.

    Labelled images are drawn, or named by lists, as facebookresearch/msn (1, 2, 5 a class) and google-research/simclr (1 % and
    10 %) publish them. Lists of one file name are draws of one figure.

    Source: facebookresearch/msn and bytedance/ibot, their evaluations with few labels. Episodes as in
    linusericsson/ssl-transfer.
    """

    name = "few_shot"

    def depends(self, given: Given, settings: FewShotTask) -> dict[str, Any]:
        """The lists of images."""
        return {
            "lists": [hashlib.sha256("\n".join(read_names(Path(path))).encode()).hexdigest() for path in settings.lists]
        }

    def wants(self, settings: FewShotTask, fed: NetworkInput) -> dict[str, Wanted]:
        """The feature that the classifier reads, and the class feature for episodes."""
        before = settings.classifier == "msn" and bool(settings.per_class or settings.shares or settings.lists)
        kinds = Kinds(1, frozenset({"unnormed"})) if before else Kinds()
        shorter = round(fed.size * settings.resize)
        view = CentreSquare(fed.size, shorter, "bilinear" if settings.classifier == "msn" else "bicubic")
        return {"train": Wanted(view, kinds), "test": Wanted(view, kinds)}

    def run(self, subject: Subject, settings: FewShotTask) -> Result:
        """Accuracies with each count and each share, then over episodes."""
        train, test = subject.features["train"], subject.features["test"]
        chosen = _chosen(train, settings)
        found = _draws(train, test, chosen, settings, subject.evaluated.device)
        figures = [figure for name, draws in found.items() for figure in accuracies(name, draws, (1,))]
        notes = [f"Nothing is chosen; {settings.draws} draws of labelled images, lambda {settings.penalty:g}."]
        notes += [
            f"{name}: {', '.join(str(len(places)) for places in chosen[name])} images."
            for name in _by_name(settings.lists)
        ]
        if settings.episodes:
            episodes, note = _episodes(test, settings)
            figures += episodes
            notes.append(note)
        if not figures:
            raise PretrainError(notes[-1])
        classes = subject.given.labelled.classes
        rows: list[dict[str, Any]] = [
            {"image": name, "class": classes[label]}
            for name, label in zip(test.names(), test.labels.tolist(), strict=True)
        ]
        for name, draws in found.items():
            shares = torch.stack([draw.correct() for draw in draws]).mean(dim=0).tolist()
            rows = [{**row, f"correct, {name}": share} for row, share in zip(rows, shares, strict=True)]
        return Result(figures, rows, notes=notes, facts={"train_images": len(train), "test_images": len(test)})


def _chosen(train: Features, settings: FewShotTask) -> dict[str, list[Tensor]]:
    """Places of the labelled images of each draw, by name."""
    counts: dict[str, Callable[[int], int]] = {
        f"{count} a class": lambda size, count=count: count  # type: ignore[misc]
        for count in settings.per_class
    }
    counts |= {
        f"{100 * share:g} % of each class": lambda size, share=share: max(1, int(share * size))  # type: ignore[misc]
        for share in settings.shares
    }
    drawn = {
        name: [drawn_per_class(train.labels, count, draw) for draw in range(settings.draws)]
        for name, count in counts.items()
    }
    names = train.names()
    return drawn | {
        name: [listed_places(path, names, train.bad) for path in paths]
        for name, paths in _by_name(settings.lists).items()
    }


def _by_name(lists: Sequence[str]) -> dict[str, list[Path]]:
    """The lists of each file name, in whatever folders, as figures call them."""
    found: dict[str, list[Path]] = {}
    for path in map(Path, lists):
        found.setdefault(f"list {path.name}", []).append(path)
    return found


def _draws(
    train: Features,
    test: Features,
    named: dict[str, list[Tensor]],
    settings: FewShotTask,
    device: torch.device,
) -> dict[str, list[Predicted]]:
    """What was found in each draw, by name."""
    if not named:
        return {}
    read, tested = (_read(features, settings).to(device) for features in (train, test))
    labels = test.labels.to(device)
    found: dict[str, list[Predicted]] = {}
    for name, draws in named.items():
        found[name] = []
        for chosen in draws:
            known = Known.of(train.labels[chosen])
            known = Known(known.classes.to(device), known.labels.to(device))
            (fitted,) = regressions(
                read[chosen.to(device)], known.labels, len(known), [1 / settings.penalty], intercept=False
            )
            found[name].append(predicted(fitted.scores, tested, labels, known))
    return found


def _read(features: Features, settings: FewShotTask) -> Tensor:
    """[N, F] as the classifier reads them."""
    if settings.classifier == "ibot":
        return functional.normalize(features.last(), dim=1)
    rows = features.whole(UNNORMED)
    return functional.normalize(rows - rows.mean(dim=1, keepdim=True), dim=1)


def _episodes(test: Features, settings: FewShotTask) -> tuple[list[Figure], str]:
    """The mean accuracy over episodes, with its interval, if there can be any, and a sentence on them."""
    shape = Shape(settings.ways, settings.shots, settings.queries)
    needed, classes = shape.shots + shape.queries, len(eligible(test.labels, shape))
    if classes < shape.ways:
        return [], (
            f"No episodes: {classes} classes have the {needed} test images that one of {shape.ways} classes needs of each."
        )
    right = 100 * episode_accuracies(test.last(), test.labels, shape, settings.episodes).numpy()
    low, high = mean_interval(right)
    figure = Figure(f"{shape.ways} ways, {shape.shots} shots", float(right.mean()), low, high)
    return [figure], (
        f"{settings.episodes} episodes of {shape.queries} queries a class, from {classes} classes of the test images; the "
        "interval is over episodes."
    )
