"""Linear probes of frozen features, as DINO and DINOv2 have them; what is chosen is chosen on images that are not reported.

Legend: N training images, M test images, n blocks, F features.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.config.tasks.linear import LinearTask
from vmf_pretrain.data.images import Images
from vmf_pretrain.data.network_input import NetworkInput
from vmf_pretrain.evaluation.accuracy import accuracies
from vmf_pretrain.evaluation.extract import Wanted
from vmf_pretrain.evaluation.given import Given
from vmf_pretrain.evaluation.heads import Schedule, trained
from vmf_pretrain.evaluation.logistic import costs, regressions
from vmf_pretrain.evaluation.outputs import MEAN_PATCH, Kinds, Part
from vmf_pretrain.evaluation.pictures import plot_curves
from vmf_pretrain.evaluation.result import Result
from vmf_pretrain.evaluation.scores import Known, Predicted, predicted
from vmf_pretrain.evaluation.splits import held_out_per_class
from vmf_pretrain.evaluation.stored import Features
from vmf_pretrain.evaluation.task import Subject, Task
from vmf_pretrain.evaluation.views import CentreSquare, RandomSquare

SEED = 0  # of the images held out for the choice
TOPS = (1, 5)

Kind = tuple[int, bool]  # the last n blocks, and whether the mean patch is appended
Curves = dict[str, list[tuple[float, float]]]  # accuracy on the images held out for the choice, by setting


@dataclass(frozen=True, eq=False)
class Probed:
    """What a kind of probe found.

    Attributes:
        name: of the probe.
        answers: for the test images.
        chosen: the setting with the best accuracy on the images held out for the choice.
        curves: those accuracies, percent.
        note: how it was chosen, for people.
    """

    name: str
    answers: Predicted
    chosen: dict[str, Any]
    curves: Curves
    note: str


class Linear(Task[LinearTask]):
    """Top-1 and top-5 accuracy of the best of many heads, and of logistic regression.

    Source: facebookresearch/dino and facebookresearch/dinov2, their linear evaluations. Those report the best head on the
    images it was chosen on; here it is chosen on a share of the training images, and fitted again to all of them.
    """

    name = "linear"

    def images(self, given: Given, settings: LinearTask) -> dict[str, Images]:
        """Both splits for each probe, and the training images once more for each random view."""
        splits = given.labelled
        views = {_view(number): splits.train for number in range(settings.views)}
        found: dict[str, Images] = {}
        for probe in settings.probes:
            found |= {f"{probe} train": splits.train, f"{probe} test": splits.test}
        return {**found, **(views if "heads" in settings.probes else {})}

    def wants(self, settings: LinearTask, fed: NetworkInput) -> dict[str, Wanted]:
        """What heads read of each view; the class feature for the regression."""
        wanted: dict[str, Wanted] = {}
        if "heads" in settings.probes:
            parts: frozenset[Part] = frozenset({"mean_patch"}) if True in settings.mean_patch else frozenset()
            kinds = Kinds(max(settings.blocks), parts)
            square = Wanted(CentreSquare(fed.size, round(fed.size * settings.resize)), kinds)
            wanted |= {"heads train": square, "heads test": square}
            views = range(settings.views)
            wanted |= {_view(number): Wanted(RandomSquare(fed.size, number), kinds) for number in views}
        if "logistic" in settings.probes:
            plain = Wanted(CentreSquare(fed.size, round(fed.size * settings.logistic_resize)))
            wanted |= {"logistic train": plain, "logistic test": plain}
        return wanted

    def run(self, subject: Subject, settings: LinearTask) -> Result:
        """Accuracies on the test split of each probe."""
        probes = {"heads": _heads, "logistic": _logistic}
        found = [probes[name](subject, settings) for name in settings.probes]
        figures = [figure for one in found for figure in accuracies(one.name, [one.answers], TOPS)]
        test = subject.features[f"{settings.probes[0]} test"]
        return Result(
            figures,
            _rows(test, found, subject.given.labelled.classes),
            pictures={one.name: functools.partial(_plot, one) for one in found},
            notes=[one.note for one in found],
            facts={one.name: {"chosen": one.chosen, "held_out_accuracy": one.curves} for one in found},
        )


def _heads(subject: Subject, settings: LinearTask) -> Probed:
    device, train = subject.evaluated.device, subject.features["heads train"]
    kinds: list[Kind] = [(n, mean) for n in settings.blocks for mean in settings.mean_patch]
    names = [_view(number) for number in range(settings.views)] or ["heads train"]
    shown = [_inputs(subject.features[name], kinds, device) for name in names]
    central = shown[0] if not settings.views else _inputs(train, kinds, device)
    known, kept, out = _choice(train.labels, settings.held_out, device)
    schedule = Schedule(settings.rates, settings.iterations, settings.batch_size)
    found = trained(shown, known.labels, len(known), schedule, places=kept)
    curves: Curves = {}
    best, kind, rate = -1.0, kinds[0], 0
    for one in kinds:
        rows = central[one][out]
        for number, value in enumerate(settings.rates):
            right = _percent(functools.partial(found[one].scores, rate=number), rows, known.labels[out])
            curves.setdefault(_name(one), []).append((value, right))
            if right > best:
                best, kind, rate = right, one, number
    once = Schedule([settings.rates[rate]], settings.iterations, settings.batch_size)
    head = trained([{kind: view[kind]} for view in shown], known.labels, len(known), once)[kind]
    test = subject.features["heads test"]
    rows = _inputs(test, [kind], device)[kind]
    answers = predicted(functools.partial(head.scores, rate=0), rows, test.labels.to(device), known)
    chosen = {"blocks": kind[0], "mean_patch": kind[1], "rate": settings.rates[rate]}
    views = f"{settings.views} random views of each image" if settings.views else "the central square of each image"
    note = (
        f"Heads: {_name(kind)}, rate {settings.rates[rate]:g}, the best of {len(kinds) * len(settings.rates)} on {len(out)} "
        f"training images ({best:.2f} %), then trained on all {len(train)}, on {views}."
    )
    return Probed("heads", answers, chosen, curves, note)


def _logistic(subject: Subject, settings: LinearTask) -> Probed:
    device, train, test = (
        subject.evaluated.device,
        subject.features["logistic train"],
        subject.features["logistic test"],
    )
    rows, given = train.last().to(device), costs(settings.costs)
    known, kept, out = _choice(train.labels, settings.held_out, device)
    curve: list[tuple[float, float]] = []
    unsettled = 0
    for one in regressions(rows[kept], known.labels[kept], len(known), given):
        curve.append((one.cost, _percent(one.scores, rows[out], known.labels[out])))
        unsettled += not one.settled
    cost, best = max(curve, key=lambda pair: pair[1])  # of equal ones the smallest C
    # from the start of the path to the chosen C, as it settles faster there than from zero
    *_, fitted = regressions(rows, known.labels, len(known), [value for value in given if value <= cost])
    answers = predicted(fitted.scores, test.last().to(device), test.labels.to(device), known)
    note = (
        f"Logistic regression: C {cost:.3g}, the best of {len(given)} on {len(out)} training images ({best:.2f} %), then "
        f"fitted to all {len(train)}; {unsettled} of {len(given)} fits stopped at their last iteration."
    )
    return Probed("logistic", answers, {"C": cost}, {"C": curve}, note)


def _choice(labels: Tensor, share: float, device: torch.device) -> tuple[Known, Tensor, Tensor]:
    """The classes, and places of the training images that are fitted and on which is chosen."""
    known = Known.of(labels)
    kept, out = held_out_per_class(labels, share, SEED)
    if not len(out):
        raise PretrainError("every class has one training image; expected two of some class, to choose on one of them.")
    return Known(known.classes.to(device), known.labels.to(device)), kept.to(device), out.to(device)


def _inputs(features: Features, kinds: Sequence[Kind], device: torch.device) -> dict[Kind, Tensor]:
    """[N, n F], or [N, (n + 1) F] with the mean patch, float32 by kind, on the device.

    All are parts of one matrix, first block to last block to mean patch, so that more kinds take no more memory.
    """
    most, with_means = max(n for n, _ in kinds), any(with_mean for _, with_mean in kinds)
    rows, start = torch.empty(0), 0
    means = features.chunks(MEAN_PATCH) if with_means else itertools.repeat(None)
    for blocks, mean in zip(features.chunks(), means, strict=False):  # as many of both; repeat has no end
        some = blocks[:, -most:].flatten(1)
        some = some if mean is None else torch.cat([some, mean], dim=1)
        if not start:
            rows = torch.empty(len(features), some.shape[1], device=device)
        rows[start : start + len(some)] = some
        start += len(some)
    dim = rows.shape[1] // (most + with_means)
    return {(n, mean): rows[:, (most - n) * dim : (most + mean) * dim] for n, mean in kinds}


def _percent(scores: Callable[[Tensor], Tensor], rows: Tensor, labels: Tensor) -> float:
    return 100 * float((scores(rows).argmax(dim=1) == labels).double().mean())


def _rows(test: Features, found: Sequence[Probed], classes: Sequence[str]) -> list[dict[str, Any]]:
    """One row of each test image: its class, and for each probe what was predicted and the rank, from 1, of its own class."""
    rows: list[dict[str, Any]] = [
        {"image": name, "class": classes[label]} for name, label in zip(test.names(), test.labels.tolist(), strict=True)
    ]
    for one in found:
        answers = one.answers.label.tolist(), one.answers.rank.tolist(), one.answers.known.tolist()
        for row, label, rank, known in zip(rows, *answers, strict=True):
            row |= {f"predicted, {one.name}": classes[label], f"rank, {one.name}": rank + 1 if known else ""}
    return rows


def _plot(probed: Probed, path: Path) -> None:
    across = "C" if probed.name == "logistic" else "learning rate at 256 images a batch"
    plot_curves(probed.curves, across, "accuracy on the images held out for the choice, %", path)


def _view(number: int) -> str:
    return f"view {number}"


def _name(kind: Kind) -> str:
    blocks = "last block" if kind[0] == 1 else f"last {kind[0]} blocks"
    return f"{blocks} and mean patch" if kind[1] else blocks
