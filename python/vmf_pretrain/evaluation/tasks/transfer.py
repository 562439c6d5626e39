"""Transfer to other images by logistic regression; fine-tuning is another protocol, whose figures stand in no table with these.

Legend: N training images, M test images.
"""

import functools
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
from vmf_pretrain.evaluation.given import Given
from vmf_pretrain.evaluation.logistic import Logistic, inverse_costs, regressions
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

    Source: Ericsson et al., "How well do self-supervised models transfer?", CVPR 2021; linusericsson/ssl-transfer.
    """

    name = "transfer"
    version = 2  # the grid is of 1 / C

    def images(self, given: Given, settings: TransferTask) -> dict[str, Images]:
        """Train, validation and test: of the folder where it has all three, else a share of the training images."""
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

    def wants(self, settings: TransferTask, fed: NetworkInput) -> dict[str, Wanted]:
        """The class feature of each split."""
        wanted = Wanted(CentreSquare(fed.size, round(fed.size * settings.resize)))
        return dict.fromkeys(SPLITS, wanted)

    def run(self, subject: Subject, settings: TransferTask) -> Result:
        """The metric on the test images."""
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
        across, up = "C", f"{TITLES[settings.metric]} on the validation images, %"
        pictures = {"costs": functools.partial(plot_curves, {"logistic regression": curve}, across, up)}
        return Result([figure], _rows(test, scores, everyone), pictures, [note], facts)


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
