"""Images of several classes each: the published lists of VOC, one regression a class, and their mean 11-point AP.

Legend: N images of a split, M test images, C classes, F features, P values of the cost.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.evaluation.class_metrics import ap11
from vmf_pretrain.evaluation.logistic import regressions

LISTS = Path("ImageSets", "Main")  # below the folder of a VOC data set
PHOTOGRAPHS = "JPEGImages"
ABSENT, DIFFICULT, PRESENT = -1, 0, 1  # what a list says of an image

Labels = NDArray[np.int8]


@dataclass(frozen=True, eq=False)
class Listed:
    """What the lists of a split say.

    Attributes:
        classes: C names, sorted.
        images: N names without ending, in the order of the first class's list.
        labels: [N, C] int8 of ABSENT, DIFFICULT, PRESENT. A difficult image neither trains nor counts in its class.
    """

    classes: Sequence[str]
    images: Sequence[str]
    labels: Labels


def has_lists(folder: Path) -> bool:
    """Whether a folder is laid out as VOC: lists below ``ImageSets/Main``."""
    return (folder / LISTS).is_dir()


def lists_of(folder: Path, split: str) -> list[Path]:
    """The list of each class, ``ImageSets/Main/CLASS_SPLIT.txt``, sorted."""
    return sorted((folder / LISTS).glob(f"*_{split}.txt"))


def read_lists(folder: Path, split: str) -> Listed:
    """The lists of a split: in each, a line for an image, its name and -1, 0 or 1.

    Raises:
        PretrainError: there are none, one cannot be read or says something else, or their images differ.
    Source: Everingham et al., "The PASCAL visual object classes challenge 2007", development kit.
    """
    paths = lists_of(folder, split)
    if not paths:
        raise PretrainError(f"{folder / LISTS} has no list of a class for {split}; expected CLASS_{split}.txt.")
    found = [_read(path) for path in paths]
    images = list(found[0])
    for path, one in zip(paths, found, strict=True):
        if list(one) != images:
            raise PretrainError(f"{path} lists other images than {paths[0]}; expected the same ones in the same order.")
    classes = [path.name.removesuffix(f"_{split}.txt") for path in paths]
    return Listed(classes, images, np.array([list(one.values()) for one in found], np.int8).T)


def _read(path: Path) -> dict[str, int]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PretrainError(f"{path} cannot be read ({error}).") from None
    found: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        words = line.split()
        if len(words) != 2 or words[1] not in ("-1", "0", "1") or words[0] in found:
            raise PretrainError(
                f"{path}, line {number}, is {line!r}; expected the name of another image and -1, 0 or 1."
            )
        found[words[0]] = int(words[1])
    return found


def margins(rows: Tensor, labels: Labels, classes: Sequence[str], costs: Sequence[float], others: Tensor) -> Tensor:
    """[P, M, C] float64 how far each of ``others`` is on the side of each class, by a regression of it against the rest.

    Each is the regression of two classes of ``regressions``, as Ericsson et al. fit it; difficult images are left out of it.

    Args:
        rows: [N, F], on the device that computes.
        labels: [N, C].
        classes: C names, for errors.
        costs: P values of C, ascending.
        others: [M, F], on the same device.

    Raises:
        PretrainError: a class has no image, or there is no image without it.
    """
    found = torch.empty(len(costs), len(others), len(classes), dtype=torch.float64)
    for place, name in enumerate(classes):
        kept = torch.from_numpy(labels[:, place] != DIFFICULT)
        present = torch.from_numpy(labels[:, place] == PRESENT)[kept].long().to(rows.device)
        if not 0 < int(present.sum()) < len(present):
            raise PretrainError(f"the training images are all or none of class {name}; expected some of both.")
        for number, fitted in enumerate(regressions(rows[kept.to(rows.device)], present, 2, costs)):
            absent, there = fitted.scores(others).T
            found[number, :, place] = (there - absent).cpu()
    return found


def class_precisions(scores: NDArray[np.float64], labels: Labels) -> NDArray[np.float64]:
    """[C] 11-point AP of each class over the images that are not difficult in it; NaN without one that is present.

    As the challenge computes it. The script of Ericsson et al. takes precision 1 at recall 0, which is the same wherever
    the image with the largest score is of the class, and at most 1/11 more elsewhere.

    Args:
        scores: [M, C].
        labels: [M, C].
    """
    found = np.full(labels.shape[1], np.nan)
    for place in range(labels.shape[1]):
        counts, present = labels[:, place] != DIFFICULT, labels[:, place] == PRESENT
        if present.any():
            found[place] = ap11(scores[counts, place], present[counts])
    return found
