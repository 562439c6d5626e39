"""Detection of copies, as DINO evaluates Copydays.

Legend: N images of the database, F features.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.config.tasks.copies import CopiesTask
from vmf_pretrain.data.images import Images
from vmf_pretrain.data.network_input import NetworkInput
from vmf_pretrain.data.photos import Photos
from vmf_pretrain.evaluation.bootstrap import mean_interval
from vmf_pretrain.evaluation.copies.alter import crop, jpeg
from vmf_pretrain.evaluation.copies.score import copy_precisions, originals_of
from vmf_pretrain.evaluation.extract import Wanted
from vmf_pretrain.evaluation.given import Given
from vmf_pretrain.evaluation.outputs import PATCHES, Kinds
from vmf_pretrain.evaluation.pooling import class_and_patches
from vmf_pretrain.evaluation.result import Figure, Result
from vmf_pretrain.evaluation.stored import Features
from vmf_pretrain.evaluation.task import Subject, Task
from vmf_pretrain.evaluation.whitening import whitening_of
from vmf_pretrain.evaluation.whole_views import Squashed

ORIGINAL, STRONG = "original", "strong"
MADE = ", made here"  # end of the title of a block that is in no folder
IMAGES, DISTRACTORS, OTHERS = "images", "distractors", "whitening"
KINDS = Kinds(parts=frozenset({PATCHES}))


@dataclass(frozen=True)
class Altered:
    """A copy of the photograph, squashed to a square.

    Attributes:
        name: of its block.
        size: side of the square, pixels.
    """

    name: str
    size: int

    def __call__(self, image: Tensor) -> Tensor:
        """[3, size, size] uint8."""
        kind, _, amount = self.name.partition("/")
        copy = jpeg(image, int(amount)) if kind == "jpegqual" else crop(image, int(amount))
        return Squashed(self.size)(copy)


class Copies(Task[CopiesTask]):
    """mAP of each block of copies, among originals and distractors.

    Source: Douze et al., "Evaluation of GIST descriptors for web-scale image search", CIVR 2009; facebookresearch/dino.
    """

    name = "copies"

    def images(self, given: Given, settings: CopiesTask) -> dict[str, Images]:
        """All images of the folder; the originals for each way to alter them; distractors, and images to whiten on."""
        photos = given.below(given.folder)
        inside = _places(photos, ORIGINAL)
        originals = photos.subset(torch.tensor(inside)) if inside else photos
        others = {DISTRACTORS: settings.distractors, OTHERS: settings.whitening}
        return {
            IMAGES: photos,
            **dict.fromkeys(settings.made, originals),
            **{name: given.below(Path(path), f"copies.{name}") for name, path in others.items() if path is not None},
        }

    def wants(self, settings: CopiesTask, fed: NetworkInput) -> dict[str, Wanted]:
        """Class feature and patches, of the images as they are and of altered ones."""
        as_they_are = Wanted(Squashed(settings.size), KINDS)
        given = {IMAGES: True, DISTRACTORS: settings.distractors, OTHERS: settings.whitening}
        made = {name: Wanted(Altered(name, settings.size), KINDS) for name in settings.made}
        return {name: as_they_are for name, there in given.items() if there} | made

    def run(self, subject: Subject, settings: CopiesTask) -> Result:
        """Scores of each block, the hardest of Copydays first."""
        found = {name: _features(features) for name, features in subject.features.items()}
        if OTHERS in found:
            whitening = whitening_of(found[OTHERS])
            found = {name: whitening.apply(rows) for name, rows in found.items()}
        names = {name: features.names() for name, features in subject.features.items()}
        blocks = _blocks(names[IMAGES])
        originals = blocks.pop(ORIGINAL, list(range(len(names[IMAGES]))) if not blocks else [])
        database = torch.cat([found[IMAGES][originals], *([found[DISTRACTORS]] if DISTRACTORS in found else [])])
        queries = {name: (found[IMAGES][places], [names[IMAGES][p] for p in places]) for name, places in blocks.items()}
        queries |= {f"{name}{MADE}": (found[name], names[name]) for name in settings.made}
        figures, rows = [], []
        for block, (features, called) in queries.items():
            positives = _positives(block, called, [names[IMAGES][place] for place in originals])
            precisions = copy_precisions(features, database, positives)
            figures += _figures(block, precisions)
            rows += [
                {"block": block, "query": name, "average precision": value}
                for name, value in zip(called, precisions.tolist(), strict=True)
            ]
        if not figures:
            raise PretrainError(f"{subject.given.folder} has no copies with an original, and copies.made is empty.")
        notes = _notes(settings, len(originals), len(database) - len(originals))
        return Result(figures, rows, notes=notes, facts={"originals": len(originals), "database": len(database)})


def _places(photos: Photos, folder: str) -> list[int]:
    return [place for place in range(len(photos)) if PurePath(photos.name(place)).parts[0] == folder]


def _blocks(names: Sequence[str]) -> dict[str, list[int]]:
    """Places of the images of each block of Copydays, of a folder with ``original/``; none of any other folder."""
    if not any(PurePath(name).parts[0] == ORIGINAL for name in names):
        return {}
    blocks: dict[str, list[int]] = {}
    for place, name in enumerate(names):
        blocks.setdefault("/".join(PurePath(name).parts[:-1]), []).append(place)
    return blocks


def _positives(block: str, queries: Sequence[str], originals: Sequence[str]) -> list[list[int]]:
    """Places of each query's original: of the same name, whatever folder and ending; of a copy made here, of the same path."""
    stems = [PurePath(name).stem for name in originals]
    if block == STRONG:
        return originals_of(queries, stems)
    keys = originals if block.endswith(MADE) else stems
    places = {key: place for place, key in enumerate(keys)}
    wanted = queries if block.endswith(MADE) else [PurePath(name).stem for name in queries]
    return [[places[key]] if key in places else [] for key in wanted]


def _features(features: Features) -> Tensor:
    """[N, 2 F] class features beside the generalised means of patches."""
    rows = zip(features.last(), features.patches(), strict=True)
    return torch.cat([class_and_patches(row[None], patches.flatten(0, 1)[None]) for row, patches in rows])


def _figures(block: str, precisions: NDArray[np.float64]) -> list[Figure]:
    known = 100 * precisions[~np.isnan(precisions)]
    return [Figure(f"mAP, {block}", float(known.mean()), *mean_interval(known))] if len(known) else []


def _notes(settings: CopiesTask, originals: int, distractors: int) -> list[str]:
    whitened = "whitened" if settings.whitening is not None else "not whitened"
    return [
        f"Average precision by the trapezoid rule among the first 20 of {originals} originals and {distractors} "
        f"distractors; class token and GeM of the patches, {whitened}; images squashed to {settings.size} pixels."
    ]
