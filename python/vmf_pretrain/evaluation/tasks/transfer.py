"""Transfer to other images by logistic regression; fine-tuning is another protocol, whose figures stand in no table with these.

Legend: N training images, M test images.
"""

import functools
from collections.abc import Callable
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.config.tasks.transfer import TransferTask
from vmf_pretrain.data.images import Images, split
from vmf_pretrain.data.network_input import NetworkInput
from vmf_pretrain.evaluation.bootstrap import interval
from vmf_pretrain.evaluation.class_metrics import METRICS
from vmf_pretrain.evaluation.extract import Wanted
from vmf_pretrain.evaluation.files import digest_of
from vmf_pretrain.evaluation.given import Given
from vmf_pretrain.evaluation.logistic import Logistic, inverse_costs, regressions
from vmf_pretrain.evaluation.multi_label import (
    PHOTOGRAPHS,
    Labels,
    Listed,
    class_precisions,
    has_lists,
    lists_of,
    margins,
    read_lists,
)
from vmf_pretrain.evaluation.pictures import plot_curves
from vmf_pretrain.evaluation.result import Figure, Result
from vmf_pretrain.evaluation.scores import Known
from vmf_pretrain.evaluation.stored import Features
from vmf_pretrain.evaluation.task import Subject, Task
from vmf_pretrain.evaluation.views import CentreSquare

TITLES = {"accuracy": "accuracy", "mean_per_class": "mean accuracy of the classes", "ap11": "mean 11-point AP"}
SPLITS = ("train", "val", "test")


class Transfer(Task[TransferTask]):
    """Logistic regression with the C that is best on a validation split, fitted again to training and validation images.

    A folder as VOC2007 has images of several classes, and a regression for each class against the rest.

    Source: Ericsson et al., "How well do self-supervised models transfer?", CVPR 2021; linusericsson/ssl-transfer.
    """

    name = "transfer"
    version = 2  # the grid is of 1 / C

    def images(self, given: Given, settings: TransferTask) -> dict[str, Images]:
        """Train, validation and test: of the folder where it has all three, else a share of the training images."""
        if _lists(given):
            return _listed_images(given, settings)
        if given.settings.folder is not None and all((given.folder / name).is_dir() for name in SPLITS):
            found, classes = given.folders(SPLITS)
            if not classes:
                raise PretrainError(
                    f"{given.folder} has no classes; expected a sub-folder for each class, in each split."
                )
            return dict(zip(SPLITS, found, strict=True))
        splits = given.labelled
        count = max(1, round(settings.held_out * len(splits.train)))
        if count == len(splits.train):
            raise PretrainError(f"{splits.where} has 1 training image; expected at least 2, to choose C on one.")
        train, validation = split(splits.train, count)
        return {"train": train, "val": validation, "test": splits.test}

    def depends(self, given: Given, settings: TransferTask) -> dict[str, Any]:
        """The lists of classes, where there are some."""
        if not _lists(given):
            return {}
        return {"lists": {name: digest_of(lists_of(given.folder, name)) for name in SPLITS}}

    def wants(self, settings: TransferTask, fed: NetworkInput) -> dict[str, Wanted]:
        """The class feature of each split."""
        wanted = Wanted(CentreSquare(fed.size, round(fed.size * settings.resize)))
        return dict.fromkeys(SPLITS, wanted)

    def run(self, subject: Subject, settings: TransferTask) -> Result:
        """The metric on the test images."""
        return _of_many(subject, settings) if _lists(subject.given) else self._of_one(subject, settings)

    def _of_one(self, subject: Subject, settings: TransferTask) -> Result:
        """Of images of one class each."""
        device, metric = subject.evaluated.device, METRICS[settings.metric]
        train, validation, test = (subject.features[name] for name in SPLITS)
        rows, held_out = train.last().to(device), validation.last().to(device)
        known, given = Known.of(train.labels), inverse_costs(settings.costs)
        curve: list[tuple[float, float]] = []
        for one in regressions(rows, known.labels.to(device), len(known), given):
            curve.append((one.cost, 100 * metric(_scores(one, held_out), _places(validation, known))))
        cost, best = max(reversed(curve), key=lambda pair: pair[1])  # of equal ones the largest C, as published
        everyone = Known.of(torch.cat([train.labels, validation.labels]))
        path = [value for value in given if value <= cost]  # settles faster than from zero
        *_, fitted = regressions(torch.cat([rows, held_out]), everyone.labels.to(device), len(everyone), path)
        scores, places = _scores(fitted, test.last().to(device)), _places(test, everyone)
        low, high = interval(lambda drawn: 100 * metric(scores[drawn], places[drawn]), len(test))
        figure = Figure(TITLES[settings.metric], 100 * metric(scores, places), low, high)
        note = (
            f"Logistic regression: C {cost:.3g}, the best of {len(given)} on {len(validation)} validation images "
            f"({best:.2f} %), then fitted to those and {len(train)} training images. Not comparable with fine-tuning."
        )
        facts = {"C": cost, "validation": curve, "classes": len(everyone), "test_images": len(test)}
        return Result([figure], _rows(test, scores, everyone), _pictures(curve, settings), [note], facts)


def _lists(given: Given) -> bool:
    return given.settings.folder is not None and has_lists(given.folder)


def _listed_images(given: Given, settings: TransferTask) -> dict[str, Images]:
    """The photographs of each split, in the order of its lists."""
    if settings.metric != "ap11":
        raise PretrainError(f"the images of {given.folder} have several classes each; set transfer.metric to ap11.")
    photos = given.below(given.folder / PHOTOGRAPHS)
    places = {PurePath(photos.name(place)).stem: place for place in range(len(photos))}
    found: dict[str, Images] = {}
    for name in SPLITS:
        listed = read_lists(given.folder, name).images
        missing = [image for image in listed if image not in places]
        if missing:
            raise PretrainError(
                f"{len(missing)} images of {name} are not in {given.folder / PHOTOGRAPHS}; the first is {missing[0]}."
            )
        found[name] = photos.subset(torch.tensor([places[image] for image in listed]))
    return found


def _of_many(subject: Subject, settings: TransferTask) -> Result:
    """The mean 11-point AP of images of several classes each; C is the same for all classes."""
    device, given = subject.evaluated.device, inverse_costs(settings.costs)
    lists = {name: read_lists(subject.given.folder, name) for name in SPLITS}
    classes = lists["train"].classes
    for name, one in lists.items():
        if one.classes != classes:
            raise PretrainError(f"the lists of {name} are of other classes than those of train.")
    rows = {name: subject.features[name].last().to(device) for name in SPLITS}
    labels = {name: lists[name].labels[subject.features[name].rows.numpy()] for name in SPLITS}
    held_out = margins(rows["train"], labels["train"], classes, given, rows["val"]).numpy()
    curve = [(cost, _mean_precision(some, labels["val"])) for cost, some in zip(given, held_out, strict=True)]
    cost, best = max(reversed(curve), key=lambda pair: pair[1])  # of equal ones the largest C, as published
    known = torch.cat([rows["train"], rows["val"]]), np.concatenate([labels["train"], labels["val"]])
    path = [value for value in given if value <= cost]  # settles faster than from zero
    scores = margins(*known, classes, path, rows["test"])[-1].numpy()
    test = labels["test"]
    low, high = interval(lambda drawn: _mean_precision(scores[drawn], test[drawn]), len(test))
    note = (
        f"A logistic regression for each of {len(classes)} classes: C {cost:.3g}, the best of {len(given)} on "
        f"{len(labels['val'])} validation images ({best:.2f} %), then fitted to those and {len(labels['train'])} training "
        "images. Difficult images neither train nor count in their class. Not comparable with fine-tuning."
    )
    precisions = dict(zip(classes, class_precisions(scores, test).tolist(), strict=True))
    known_ones = {name: 100 * value for name, value in precisions.items() if value == value}
    facts = {"C": cost, "validation": curve, "classes": len(classes), "test_images": len(test), "ap11": known_ones}
    figure = Figure(TITLES["ap11"], _mean_precision(scores, test), low, high)
    names = subject.features["test"].names()
    return Result([figure], _listed_rows(names, scores, lists["test"], test), _pictures(curve, settings), [note], facts)


def _mean_precision(scores: NDArray[np.float64], labels: Labels) -> float:
    """Percent, over the classes that have an image.

    Raises:
        PretrainError: none has.
    """
    found = class_precisions(scores, labels)
    if np.isnan(found).all():
        raise PretrainError("no validation or test image is of any class; expected some that are not difficult.")
    return 100 * float(np.nanmean(found))


def _listed_rows(names: list[str], scores: NDArray[np.float64], listed: Listed, labels: Labels) -> list[dict[str, Any]]:
    """One row of each test image: for each class what its list says, and the score."""
    rows: list[dict[str, Any]] = []
    for name, some, said in zip(names, scores.tolist(), labels.tolist(), strict=True):
        row: dict[str, Any] = {"image": name}
        for title, score, label in zip(listed.classes, some, said, strict=True):
            row |= {title: label, f"score, {title}": score}
        rows.append(row)
    return rows


def _pictures(curve: list[tuple[float, float]], settings: TransferTask) -> dict[str, Callable[[Path], None]]:
    up = f"{TITLES[settings.metric]} on the validation images, %"
    return {"costs": functools.partial(plot_curves, {"logistic regression": curve}, "C", up)}


def _scores(fitted: Logistic, rows: Tensor) -> NDArray[np.float64]:
    """[M, C] logits; for the 11-point AP they rank the images of a class by its margin over all others."""
    found: NDArray[np.float64] = fitted.scores(rows).log_softmax(dim=1).cpu().numpy()
    return found


def _places(features: Features, known: Known) -> NDArray[np.int64]:
    """[M] labels as places among the known classes, -1 where there is none."""
    places = torch.searchsorted(known.classes, features.labels).clamp(max=len(known) - 1)
    found: NDArray[np.int64] = torch.where(known.classes[places] == features.labels, places, -1).numpy()
    return found


def _rows(test: Features, scores: NDArray[np.float64], known: Known) -> list[dict[str, Any]]:
    """One row of each test image: its folder's number, and that of the class with the largest score."""
    predicted = known.classes[torch.from_numpy(scores.argmax(axis=1))].tolist()
    columns = zip(test.names(), test.labels.tolist(), predicted, strict=True)
    return [{"image": name, "class": label, "predicted": best} for name, label, best in columns]
