"""How good the teacher's frozen features are, during a run and at its end.

Every rank must call the methods: all compute features, each of its share of the images.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.config.run import Config
from vmf_pretrain.data.images import SPLIT_SEED, Images
from vmf_pretrain.data.network_input import network_input
from vmf_pretrain.data.randomness import JUDGED_ORDER, generator_for
from vmf_pretrain.evaluation.by_ranks import rows_by_ranks
from vmf_pretrain.evaluation.features import extract_features
from vmf_pretrain.evaluation.given import Splits
from vmf_pretrain.evaluation.histograms import histogram, singular_values, usage_histogram
from vmf_pretrain.evaluation.knn import knn_accuracy
from vmf_pretrain.evaluation.linear import linear_accuracy
from vmf_pretrain.evaluation.online import Labelled, online_figures
from vmf_pretrain.evaluation.prototypes import HeadReport, batch_information, report_head, usage_and_norms
from vmf_pretrain.evaluation.rank import rankme
from vmf_pretrain.evaluation.shown import spread
from vmf_pretrain.methods.method import Assignment, Method, Place
from vmf_pretrain.networks import ranks

BASELINES = ("knn_untrained", "linear_untrained", "knn_pixels", "linear_pixels")
HEAD_FIGURES = (
    "mutual_information",
    "teacher_entropy",
    "usage_entropy",
    "prototypes_used",
    "unique_prototypes",
    "largest_duplicate_share",
)
HISTOGRAM_IMAGES = 2048  # training images that histograms are of, at most: a second of a GPU
PIXEL_SIDE = 32  # side of the images whose pixels k-NN compares: full photographs would fill the memory
PROBED_SIDE = 16  # the same for the linear probe: at 32 it takes a minute for 800 photographs, and is no better


@dataclass(frozen=True, eq=False)
class Report:
    """The evaluation at the end of a run.

    Attributes:
        figures: the numbers of the summary that depend on the teacher.
        head: how the head assigns the training images; None without prototypes.
        information: mutual information, nats, of evaluated images in batches as large as in training, and twice as large.
    """

    figures: dict[str, Any]
    head: HeadReport | None
    information: tuple[list[float], list[float]]


@dataclass(frozen=True)
class Judge:
    """Evaluates features on these images.

    Attributes:
        train: the training images.
        held_out: others; only if there are labels.
        config: of the run.
        sets: others that are evaluated during training, by name.
        judging: whether this rank looks at the features that all have computed: the first one, and each one that has a part
            of the network.
    """

    train: Images
    held_out: Images | None
    config: Config
    sets: Mapping[str, Splits] = field(default_factory=dict)
    judging: bool = True

    def knn(self, backbone: nn.Module) -> float | None:
        """k-NN accuracy of frozen features on held-out images, percent; None without labels."""
        if not self._labelled:
            return None
        return self._compare(self._features(backbone, self.train), self._features(backbone, self._kept()))

    def online(self, backbone: nn.Module) -> dict[str, float | None]:
        """Percent by name of ``evaluate.online``, and of the other sets by ``name/set``; nothing without labels.

        The first rank classifies, and all get the figures.
        """
        given = {"": (self.train, self._kept())} if self._labelled else {}
        given |= {f"/{name}": (some.train, some.test) for name, some in self.sets.items()}
        found: dict[str, float | None] = {}
        for end, images in given.items():
            train, kept = (Labelled(self._features(backbone, some), self._labels(some)) for some in images)
            classify = functools.partial(online_figures, train, kept, self.config.evaluate)
            found |= {f"{name}{end}": value for name, value in ranks.done_by_first(classify).items()}
        return found

    def baselines(self, untrained: nn.Module) -> dict[str, float | None]:
        """k-NN and linear accuracy, percent, of an untrained backbone's features and of raw pixels; None without labels.

        Images are averaged to at most PIXEL_SIDE pixels a side for k-NN, and to at most PROBED_SIDE for the probe.
        """
        if not self._labelled:
            return dict.fromkeys(BASELINES)
        features = [self._features(untrained, images) for images in (self.train, self._kept())]
        pixels = [self._small_pixels(images) for images in (self.train, self._kept())]
        probed = [_averaged(batch, PROBED_SIDE) for batch in pixels]
        return ranks.done_by_first(
            lambda: {
                "knn_untrained": self._compare(*features),
                "linear_untrained": self._linear(*features),
                "knn_pixels": self._compare(*(batch.flatten(1) for batch in pixels)),
                "linear_pixels": self._linear(*(batch.flatten(1) for batch in probed)),
            }
        )

    def histograms(self, method: Method, place: Place) -> dict[str, Any]:
        """How features of training images spread over directions, and over prototypes, which are left out where there are none.

        Returns:
            ``step`` of the place, ``images`` how many, ``rankme``, ``singular_values``, and ``usage`` and ``kappa`` (norm over
            temperature), as ``histograms.py`` has them; only the step if the features are not finite, or this rank does not
            judge.
        """
        chosen = spread(len(self.train), HISTOGRAM_IMAGES)
        try:
            features = self._features_at(method.evaluated, self.train, chosen)
        except PretrainError:  # such a run ends by its skipped steps or by its next accuracy, not by a picture
            return {"step": place.step}
        if not self.judging:
            return {"step": place.step}
        found: dict[str, Any] = {"step": place.step, "images": len(chosen), "rankme": rankme(features)}
        found["singular_values"] = singular_values(features)
        assignment = method.assignment(place)
        if assignment is None:
            return found
        usage, norms = usage_and_norms(assignment, features)
        if bool(usage.isfinite().all()):  # before its first batch, a method's centre is no number
            found["usage"] = usage_histogram(usage)
        return {**found, "kappa": histogram(norms / assignment.temperature)}

    def inputs(self, images: Images, places: Sequence[int]) -> Tensor:
        """[B, C, size, size] network inputs of the evaluated images at some places."""
        return network_input(self.config).of(images.evaluation_pixels(places))

    def report(self, method: Method, place: Place) -> Report | None:
        """Evaluate a method's network, with its head if it has one; None where this rank does not judge."""
        backbone, assignment = method.evaluated, method.assignment(place)
        features = self._features(backbone, self.train)
        kept = self._features(backbone, self._kept()) if self._labelled else None
        if not self.judging:
            return None
        figures: dict[str, Any] = {
            "knn": None if kept is None else self._compare(features, kept),
            "linear": None if kept is None else self._linear(features, kept),
            "rankme": rankme(features),
        }
        if assignment is None:
            return Report({**figures, **dict.fromkeys(HEAD_FIGURES)}, None, ([], []))
        head = report_head(assignment, features, threshold=self.config.evaluate.duplicate_threshold)
        figures |= {name: getattr(head, name) for name in HEAD_FIGURES}
        return Report(figures, head, self._information(assignment, features))

    def _information(self, assignment: Assignment, features: Tensor) -> tuple[list[float], list[float]]:
        """Mutual information of batches as large as in training, and twice as large (at most all images); fixed order."""
        shuffled = features[torch.randperm(len(features), generator=generator_for(SPLIT_SEED, JUDGED_ORDER))]
        size = self.config.data.batch_size
        once = batch_information(assignment, shuffled, rows=size)
        return once, batch_information(assignment, shuffled, rows=min(2 * size, len(shuffled)))

    def _kept(self) -> Images:
        assert self.held_out is not None
        return self.held_out

    @property
    def _labelled(self) -> bool:
        return self.held_out is not None and self.train.labels is not None and self.held_out.labels is not None

    def _compare(self, train: Tensor, kept: Tensor) -> float:
        labels, kept_labels = self._labels(self.train), self._labels(self._kept())
        k, temperature = self.config.evaluate.neighbours, self.config.evaluate.temperature
        return float(knn_accuracy(train, labels, kept, kept_labels, neighbours=k, temperature=temperature))

    def _linear(self, train: Tensor, kept: Tensor) -> float | None:
        labels = self._labels(self.train)
        if bool((labels == labels[0]).all()):  # with one class there is nothing to distinguish
            return None
        return float(linear_accuracy(train, labels, kept, self._labels(self._kept())))

    def _features(self, backbone: nn.Module, images: Images) -> Tensor:
        return self._features_at(backbone, images, self._chosen(images))

    def _features_at(self, backbone: nn.Module, images: Images, places: Sequence[int]) -> Tensor:
        """[N, F] of the images at N places, on every rank."""
        return rows_by_ranks(
            places, functools.partial(self.inputs, images), functools.partial(extract_features, backbone)
        )

    def _small_pixels(self, images: Images) -> Tensor:
        """[N, ..., C, s, s] of the chosen images, on every rank."""

        def averaged(batches: Iterator[Tensor]) -> Tensor:
            return torch.cat([_averaged(batch, PIXEL_SIDE) for batch in batches])

        return rows_by_ranks(self._chosen(images), images.evaluation_pixels, averaged)

    def _chosen(self, images: Images) -> list[int]:
        """Indices of the evaluated images, evenly spread over all, because files are sorted by class."""
        return spread(len(images), self.config.evaluate.max_images)

    def _labels(self, images: Images) -> Tensor:
        assert images.labels is not None
        return images.labels[self._chosen(images)]


def _averaged(pixels: Tensor, side: int) -> Tensor:
    """[N, ..., C, s, s] averaged to at most ``side`` a side."""
    small = adaptive_avg_pool2d(pixels.flatten(0, -4), min(pixels.shape[-1], side))
    return small.reshape(*pixels.shape[:-2], *small.shape[-2:])
