"""How good the teacher's frozen features are, during a run and at its end."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from vmf_kernels import DINOHead, LogitCenter, ProbabilityCenter
from vmf_pretrain.config.run import Config
from vmf_pretrain.data.images import SPLIT_SEED, Images
from vmf_pretrain.data.network_input import network_input
from vmf_pretrain.data.randomness import JUDGED_ORDER, generator_for
from vmf_pretrain.engine.loop import Training
from vmf_pretrain.evaluation.features import extract_features
from vmf_pretrain.evaluation.knn import knn_accuracy
from vmf_pretrain.evaluation.linear import linear_accuracy
from vmf_pretrain.evaluation.prototypes import HeadReport, batch_information, report_head
from vmf_pretrain.evaluation.rank import rankme

BASELINES = ("knn_untrained", "linear_untrained", "knn_pixels", "linear_pixels")
BATCH = 256  # images a forward pass
PIXEL_SIDE = 32  # side of the images whose pixels k-NN compares: full photographs would fill the memory
PROBED_SIDE = 16  # the same for the linear probe: at 32 it takes a minute for 800 photographs, and is no better


@dataclass(frozen=True, eq=False)
class Report:
    """The evaluation at the end of a run.

    Attributes:
        figures: the numbers of the summary that depend on the teacher.
        head: how the head assigns the training images.
        information: mutual information, nats, of evaluated images in batches as large as in training, and twice as large.
    """

    figures: dict[str, Any]
    head: HeadReport
    information: tuple[list[float], list[float]]


@dataclass(frozen=True)
class Judge:
    """Evaluates features on these images; there are held-out images only if there are labels."""

    train: Images
    held_out: Images | None
    config: Config

    def knn(self, backbone: nn.Module) -> float | None:
        """k-NN accuracy of frozen features on held-out images, percent; None without labels."""
        if not self._labelled:
            return None
        return self._compare(self._features(backbone, self.train), self._features(backbone, self._kept()))

    def baselines(self, untrained: nn.Module) -> dict[str, float | None]:
        """k-NN and linear accuracy, percent, of an untrained backbone's features and of raw pixels; None without labels.

        Images are averaged to at most PIXEL_SIDE pixels a side for k-NN, and to at most PROBED_SIDE for the probe.
        """
        if not self._labelled:
            return dict.fromkeys(BASELINES)
        features = [self._features(untrained, images) for images in (self.train, self._kept())]
        pixels = [self._small_pixels(images) for images in (self.train, self._kept())]
        probed = [_averaged(batch, PROBED_SIDE) for batch in pixels]
        return {
            "knn_untrained": self._compare(*features),
            "linear_untrained": self._linear(*features),
            "knn_pixels": self._compare(*(batch.flatten(1) for batch in pixels)),
            "linear_pixels": self._linear(*(batch.flatten(1) for batch in probed)),
        }

    def inputs(self, images: Images) -> Iterator[Tensor]:
        """Network inputs of the evaluated images: batches [B, C, size, size]."""
        return map(network_input(self.config).of, self._pixels(images))

    def report(self, training: Training) -> Report:
        """Evaluate the teacher with its head."""
        teacher = training.teacher
        features = self._features(teacher.backbone, self.train)
        tau = training.teacher_temperature(self.config.train.epochs)
        center = training.loss.centering
        assert isinstance(center, LogitCenter | ProbabilityCenter), "the trainer's losses have a running centre"
        assigned: dict[str, Any] = {"temperature": tau, "bias": center.bias(tau)}
        threshold = self.config.evaluate.duplicate_threshold
        head = report_head(teacher.head, features, **assigned, threshold=threshold)
        kept = self._features(teacher.backbone, self._kept()) if self._labelled else None
        figures = {
            "knn": None if kept is None else self._compare(features, kept),
            "linear": None if kept is None else self._linear(features, kept),
            "mutual_information": head.mutual_information,
            "teacher_entropy": head.teacher_entropy,
            "rankme": rankme(features),
            "usage_entropy": head.usage_entropy,
            "prototypes_used": head.prototypes_used,
            "unique_prototypes": head.unique_prototypes,
            "largest_duplicate_share": head.largest_duplicate_share,
        }
        return Report(figures, head, self._information(teacher.head, features, assigned))

    def _information(
        self, head: DINOHead, features: Tensor, assigned: dict[str, Any]
    ) -> tuple[list[float], list[float]]:
        """Mutual information of batches as large as in training, and twice as large (at most all images); fixed order."""
        shuffled = features[torch.randperm(len(features), generator=generator_for(SPLIT_SEED, JUDGED_ORDER))]
        size = self.config.data.batch_size
        once = batch_information(head, shuffled, **assigned, rows=size)
        return once, batch_information(head, shuffled, **assigned, rows=min(2 * size, len(shuffled)))

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
        return extract_features(backbone, self.inputs(images))

    def _small_pixels(self, images: Images) -> Tensor:
        return torch.cat([_averaged(batch, PIXEL_SIDE) for batch in self._pixels(images)])

    def _pixels(self, images: Images) -> Iterator[Tensor]:
        chosen = self._chosen(images)
        for start in range(0, len(chosen), BATCH):
            yield images.evaluation_pixels(chosen[start : start + BATCH])

    def _chosen(self, images: Images) -> list[int]:
        """Indices of the evaluated images, evenly spread over all, because files are sorted by class."""
        count = min(len(images), self.config.evaluate.max_images)
        return [place * len(images) // count for place in range(count)]

    def _labels(self, images: Images) -> Tensor:
        assert images.labels is not None
        return images.labels[self._chosen(images)]


def _averaged(pixels: Tensor, side: int) -> Tensor:
    """[N, C, s, s] averaged to at most ``side`` a side."""
    return adaptive_avg_pool2d(pixels, min(pixels.shape[-1], side))
