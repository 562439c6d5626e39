"""Segmentation from frozen features of patches.

Legend: N images, C classes, h x w patches, F features.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.config.tasks.dense import DenseTask
from vmf_pretrain.data.images import Images
from vmf_pretrain.data.label_image import read_label_file
from vmf_pretrain.data.network_input import NetworkInput
from vmf_pretrain.evaluation.bootstrap import interval
from vmf_pretrain.evaluation.dense.classify import Classifier, linear_patches, nearest_patches
from vmf_pretrain.evaluation.dense.confusion import Counts, areas_of, confusion, scores_of
from vmf_pretrain.evaluation.dense.patches import patch_labels, pixel_labels
from vmf_pretrain.evaluation.extract import Wanted
from vmf_pretrain.evaluation.files import digest_of
from vmf_pretrain.evaluation.given import Given
from vmf_pretrain.evaluation.outputs import PATCHES, Kinds
from vmf_pretrain.evaluation.result import Figure, Result
from vmf_pretrain.evaluation.stored import rows_at
from vmf_pretrain.evaluation.task import Subject, Task
from vmf_pretrain.evaluation.whole_views import Squashed

SPLITS = ("train", "val")
SEED = 0  # of the training patches that are drawn


class Dense(Task[DenseTask]):
    """Mean intersection over union of k-NN and of a logistic regression on patches.

    The folder holds ``train/images``, ``train/masks``, ``val/images`` and ``val/masks``; a mask is a PNG of the image's name,
    whose numbers are classes, at most 256. Memory beside that of one image: ``max_patches`` features, 64 MiB of enlarged
    scores (those of one class where that is more), and 48 C bytes of counts for each image of ``val``.
    """

    name = "dense"

    def images(self, given: Given, settings: DenseTask) -> dict[str, Images]:
        """The images of both splits."""
        return {split: given.below(given.folder / split / "images") for split in SPLITS}

    def depends(self, given: Given, settings: DenseTask) -> dict[str, Any]:
        """The masks."""
        return {split: digest_of(sorted((given.folder / split / "masks").rglob("*.png"))) for split in SPLITS}

    def wants(self, settings: DenseTask, fed: NetworkInput) -> dict[str, Wanted]:
        """The patches of whole images."""
        wanted = Wanted(Squashed(settings.size or fed.size), Kinds(parts=frozenset({PATCHES})))
        return dict.fromkeys(SPLITS, wanted)

    def run(self, subject: Subject, settings: DenseTask) -> Result:
        """Scores of both classifiers on the images of ``val``; nothing is chosen on them."""
        classes = 1 + max(_largest(subject, split, settings.ignored) for split in SPLITS)
        patches, labels = _training_patches(subject, classes, settings)
        nearest = nearest_patches(
            patches, labels, classes, neighbours=settings.neighbours, temperature=settings.temperature
        )
        linear = linear_patches(
            patches, labels, classes, inverse_penalty=settings.inverse_penalty, iterations=settings.iterations
        )
        found = {
            name: _counted(subject, classify, classes, settings.ignored)
            for name, classify in ((f"k {settings.neighbours}", nearest), ("linear", linear))
        }
        areas = {name: one.areas for name, one in found.items()}
        return Result(
            [figure for name, some in areas.items() for figure in _figures(name, some)],
            _rows(subject.features["val"].names(), areas),
            notes=["Classes that are in no mask of val and were not predicted do not count. Nothing is chosen."],
            facts={
                "classes": classes,
                "training_patches": len(patches),
                "confusion": {name: one.confusion.tolist() for name, one in found.items()},
            },
        )


def _mask(folder: Path, name: str) -> NDArray[np.uint8]:
    return read_label_file(folder / PurePath(name).with_suffix(".png"))


def _masks(subject: Subject, split: str) -> Iterator[NDArray[np.uint8]]:
    """The masks of the readable images, in their order."""
    return (_mask(subject.given.folder / split / "masks", name) for name in subject.features[split].names())


def _largest(subject: Subject, split: str, ignored: int | None) -> int:
    """The largest class of the masks of a split."""
    found = {number for mask in _masks(subject, split) for number in np.unique(mask).tolist()}
    return max(found - {ignored}, default=0)


def _training_patches(subject: Subject, classes: int, settings: DenseTask) -> tuple[Tensor, Tensor]:
    """[P, F] features and [P] classes of training patches, at most ``max_patches``, those that are ignored left out.

    The features are read twice, as only the drawn ones may fill the memory.
    """
    features = subject.features["train"]
    labels = torch.cat(
        [
            patch_labels(mask, (patches.shape[0], patches.shape[1]), classes, settings.ignored).flatten()
            for patches, mask in zip(features.patches(), _masks(subject, "train"), strict=True)
        ]
    )
    known = (labels >= 0).nonzero()[:, 0]
    if not len(known):
        raise PretrainError("all pixels of the training masks are ignored; expected some of a class.")
    drawn = torch.randperm(len(known), generator=torch.Generator().manual_seed(SEED))[: settings.max_patches]
    chosen = known[drawn.sort().values]
    rows = rows_at((patches.flatten(0, 1) for patches in features.patches()), chosen)
    return torch.cat([some.float() for some in rows]), labels[chosen]


@dataclass(frozen=True, eq=False)
class Counted:
    """What was counted of the M images of ``val``: 24 C bytes an image, and 8 C^2 for all, C being at most 256.

    Attributes:
        areas: [M, 3, C] of each image.
        confusion: [C, C] of all images together.
    """

    areas: Counts
    confusion: Counts


def _counted(subject: Subject, classify: Classifier, classes: int, ignored: int | None) -> Counted:
    total, areas = np.zeros((classes, classes), np.int64), []
    for patches, mask in zip(subject.features["val"].patches(), _masks(subject, "val"), strict=True):
        scores = classify(patches.flatten(0, 1)).unflatten(0, patches.shape[:2])
        predicted = pixel_labels(scores, (mask.shape[0], mask.shape[1]))
        counts = confusion(mask, predicted, classes, ignored)
        total += counts
        areas.append(areas_of(counts))
    return Counted(np.stack(areas), total)


def _figures(name: str, areas: Counts) -> list[Figure]:
    scores = scores_of(areas.sum(axis=0))
    if np.isnan(scores.accuracy):
        raise PretrainError("all pixels of the masks of val are ignored; expected some of a class.")
    flat = areas.reshape(len(areas), -1).astype(np.float64)  # sums of whole numbers below 2^53 are exact

    def mean_union(places: NDArray[np.int64]) -> float:
        drawn = np.bincount(places, minlength=len(areas)) @ flat  # no copy of the areas for each draw
        return 100 * scores_of(drawn.reshape(areas.shape[1:])).mean

    low, high = interval(mean_union, len(areas))
    return [
        Figure(f"mIoU, {name}", 100 * scores.mean, low, high),
        Figure(f"pixel accuracy, {name}", 100 * scores.accuracy),
    ]


def _rows(names: list[str], areas: dict[str, Counts]) -> list[dict[str, Any]]:
    return [
        {"image": image, **{f"mIoU, {name}": scores_of(found[place]).mean for name, found in areas.items()}}
        for place, image in enumerate(names)
    ]
