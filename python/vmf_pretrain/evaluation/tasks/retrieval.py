"""Image retrieval, as the revisited Oxford and Paris benchmarks score it.

Legend: N images of the database, Q queries, F features.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor

from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.config.tasks.retrieval import RetrievalTask
from vmf_pretrain.data.images import Images
from vmf_pretrain.data.network_input import NetworkInput
from vmf_pretrain.data.photos import Photos
from vmf_pretrain.evaluation.bootstrap import mean_interval
from vmf_pretrain.evaluation.extract import Wanted
from vmf_pretrain.evaluation.files import digest_of
from vmf_pretrain.evaluation.given import Given
from vmf_pretrain.evaluation.outputs import PATCHES, Kinds
from vmf_pretrain.evaluation.pooling import generalised_mean, mean_of_sizes
from vmf_pretrain.evaluation.result import Figure, Result
from vmf_pretrain.evaluation.retrieval.ground_truth import (
    GroundTruth,
    Query,
    ground_truth_of_classes,
    read_ground_truth,
)
from vmf_pretrain.evaluation.retrieval.score import CUT_OFFS, LevelScores, retrieval_scores
from vmf_pretrain.evaluation.stored import Features
from vmf_pretrain.evaluation.task import Subject, Task
from vmf_pretrain.evaluation.whitening import Whitening, whitening_of
from vmf_pretrain.evaluation.whole_views import Thumbnail

GEM_POWER = 3.0
OTHERS = "whitening"


class Retrieval(Task[RetrievalTask]):
    """mAP and mP@k at the levels easy, medium and hard.

    The folder holds ``gnd*.json`` or the published ``gnd_*.pkl``, and the images. Without either, each image is a query for the
    others of its class.

    Source: Radenovic et al., "Revisiting Oxford and Paris", CVPR 2018; features and sizes as facebookresearch/dino.
    """

    name = "retrieval"
    version = 2

    def images(self, given: Given, settings: RetrievalTask) -> dict[str, Images]:
        """Database and queries once for each scale, because each scale is a view of its own; and images to whiten on."""
        photos = given.below(given.folder)
        truth = truth_of(given.folder, photos)
        database = _found(photos, truth.images)
        queries = _found(photos, [query.image for query in truth.queries])
        if not len(database) or not len(queries):
            counts = f"{len(database)} images and {len(queries)} queries"
            raise PretrainError(f"the ground truth of {given.folder} has {counts}; expected at least one of each.")
        sets: dict[str, Images] = {"database": database, "queries": queries}
        if settings.whitening is not None:
            sets[OTHERS] = given.below(Path(settings.whitening), "retrieval.whitening")
        return {_key(name, scale): images for name, images in sets.items() for scale in settings.scales}

    def depends(self, given: Given, settings: RetrievalTask) -> dict[str, Any]:
        """The ground truth."""
        return {"ground_truth": digest_of(_truth_files(given.folder)[:1])}

    def wants(self, settings: RetrievalTask, fed: NetworkInput) -> dict[str, Wanted]:
        """The class feature, or the patches, at each scale."""
        kinds = Kinds(parts=frozenset({PATCHES})) if settings.pooling == "gem" else Kinds()
        names = ["database", "queries", *([OTHERS] if settings.whitening is not None else [])]
        return {
            _key(name, scale): Wanted(Thumbnail(settings.size, scale, settings.patch), kinds)
            for name in names
            for scale in settings.scales
        }

    def run(self, subject: Subject, settings: RetrievalTask) -> Result:
        """Scores of each level that has a query with positives."""
        truth = truth_of(subject.given.folder, subject.given.below(subject.given.folder))
        features = {name: _features(subject, name, settings) for name in ("database", "queries")}
        if settings.whitening is not None:
            others = _features(subject, OTHERS, settings)
            whitening = whitening_of(others[others.any(dim=1)])  # unreadable images would draw the mean to zero
            features = {name: whitened(whitening, rows) for name, rows in features.items()}
        levels = retrieval_scores(features["queries"], features["database"], _readable(subject, truth, settings))
        figures = [figure for level in levels for figure in _figures(level)]
        if not figures:
            raise PretrainError(f"no query of {subject.given.folder} has a readable image that answers it.")
        return Result(
            figures,
            [row for level in levels for row in _rows(level, truth)],
            notes=_notes(settings),
            facts={"images": len(truth.images), "queries": len(truth.queries)},
        )


def truth_of(folder: Path, photos: Photos) -> GroundTruth:
    """The ground truth in the folder, or that of its classes.

    Raises:
        PretrainError: there is neither, or the file holds none.
    """
    files = _truth_files(folder)
    if files:
        return read_ground_truth(files[0])
    if photos.labels is None:
        raise PretrainError(
            f"{folder} has no gnd*.json, no gnd_*.pkl and no classes; expected one of them, or sub-folders."
        )
    return ground_truth_of_classes([photos.name(place) for place in range(len(photos))], photos.labels.tolist())


def _truth_files(folder: Path) -> list[Path]:
    return [*sorted(folder.glob("gnd*.json")), *sorted(folder.glob("gnd_*.pkl"))]


def _found(photos: Photos, names: Sequence[str]) -> Photos:
    """The images of a ground truth, which names them without ending or folder, or as they are."""
    paths = [photos.name(place) for place in range(len(photos))]
    stems = [PurePath(path).stem for path in paths]
    places = {stem: place for place, stem in enumerate(stems)} | {path: place for place, path in enumerate(paths)}
    several = {stem for stem, count in Counter(stems).items() if count > 1} - set(paths)
    missing = [name for name in names if name not in places or name in several]
    if missing:
        raise PretrainError(
            f"{len(missing)} images of the ground truth are missing, or several files have their name; "
            f"the first is {missing[0]}."
        )
    return photos.subset(torch.tensor([places[name] for name in names], dtype=torch.int64))


def _key(name: str, scale: float) -> str:
    return f"{name} at {scale:g}"


def _features(subject: Subject, name: str, settings: RetrievalTask) -> Tensor:
    """[N, F] of all images; of an unreadable one zeros, which are like nothing."""
    sizes = [subject.features[_key(name, scale)] for scale in settings.scales]
    found = [_pooled(features, settings) for features in sizes]
    rows = torch.zeros(len(sizes[0].images), found[0].shape[1])
    rows[sizes[0].rows] = mean_of_sizes(found)
    return rows


def whitened(whitening: Whitening, rows: Tensor) -> Tensor:
    """[N, D] of rows [N, F]; one of zeros, of an unreadable image, stays like nothing."""
    return whitening.apply(rows) * rows.any(dim=1, keepdim=True)


def _pooled(features: Features, settings: RetrievalTask) -> Tensor:
    if settings.pooling == "class":
        return features.last()
    return torch.cat([generalised_mean(patches.flatten(0, 1)[None], GEM_POWER) for patches in features.patches()])


def _readable(subject: Subject, truth: GroundTruth, settings: RetrievalTask) -> GroundTruth:
    """The same queries, of which those whose image cannot be read have no positives and so no score."""
    readable = set(subject.features[_key("queries", settings.scales[0])].rows.tolist())
    queries = [
        query if place in readable else Query(query.image, query.box, (), (), ())
        for place, query in enumerate(truth.queries)
    ]
    return GroundTruth(truth.images, tuple(queries))


def _figures(level: LevelScores) -> list[Figure]:
    answered = level.average_precision == level.average_precision
    if not answered.any():
        return []
    low, high = mean_interval(100 * level.average_precision[answered])
    means = level.means()
    return [
        Figure(f"mAP, {level.level}", means["map"], low, high),
        *(Figure(f"mP@{k}, {level.level}", means[f"mp@{k}"]) for k in CUT_OFFS),
    ]


def _rows(level: LevelScores, truth: GroundTruth) -> list[dict[str, Any]]:
    columns = zip(truth.queries, level.average_precision.tolist(), level.precision.tolist(), strict=True)
    return [
        {"query": query.image, "level": level.level, "average precision": average}
        | {f"precision@{k}": value for k, value in zip(CUT_OFFS, precision, strict=True)}
        for query, average, precision in columns
    ]


def _notes(settings: RetrievalTask) -> list[str]:
    scales = ", ".join(f"{scale:g}" for scale in settings.scales)
    return [
        f"Average precision by the trapezoid rule; images at most {settings.size} pixels, scales {scales}; "
        "queries are not cropped to their box; queries without positives do not count."
    ]
