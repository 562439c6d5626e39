"""How good the teacher's frozen features are, while a run goes on and at its end."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from vmf_kernels import LogitCenter, ProbabilityCenter
from vmf_pretrain.config import Config
from vmf_pretrain.evaluate import HeadReport, extract_features, knn_accuracy, linear_accuracy, rankme, report_head
from vmf_pretrain.images import Images
from vmf_pretrain.training import Training

BATCH = 256  # images a forward pass
PIXEL_SIDE = 32


@dataclass(frozen=True)
class Judge:
    """The images that features are judged on; held-out ones exist only where there are labels."""

    train: Images
    held_out: Images | None
    config: Config

    def knn(self, backbone: nn.Module) -> float | None:
        """k-NN accuracy of frozen features on held-out images, percent; None without labels."""
        if not self._labelled:
            return None
        return self._compare(self._features(backbone, self.train), self._features(backbone, self._kept()))

    def knn_pixels(self) -> float | None:
        """The same of raw pixels, averaged to at most PIXEL_SIDE a side: photographs would fill the memory."""
        return self._compare(self._pixels(self.train), self._pixels(self._kept())) if self._labelled else None

    def report(self, training: Training) -> tuple[dict[str, Any], HeadReport]:
        """Every figure of the summary that the teacher decides, and what its head does with the training images."""
        teacher = training.teacher
        features = self._features(teacher.backbone, self.train)
        tau = training.teacher_temperature(self.config.train.epochs)
        center = training.loss.centering
        assert isinstance(center, LogitCenter | ProbabilityCenter), "the trainer's losses have a running centre"
        head = report_head(
            teacher.head,
            features,
            tau,
            center.bias(tau),
            vmf=training.uses_vmf,
            threshold=self.config.evaluate.duplicate_threshold,
        )
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
        return figures, head

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
        if bool((labels == labels[0]).all()):  # a probe has nothing to tell apart
            return None
        return float(linear_accuracy(train, labels, kept, self._labels(self._kept())))

    def _features(self, backbone: nn.Module, images: Images) -> Tensor:
        return extract_features(backbone, self._batches(images))

    def _pixels(self, images: Images) -> Tensor:
        small = (adaptive_avg_pool2d(batch, min(batch.shape[-1], PIXEL_SIDE)) for batch in self._batches(images))
        return torch.cat([batch.flatten(1) for batch in small])

    def _batches(self, images: Images) -> Iterator[Tensor]:
        chosen = self._chosen(images)
        for start in range(0, len(chosen), BATCH):
            yield images.evaluation_batch(chosen[start : start + BATCH])

    def _chosen(self, images: Images) -> list[int]:
        """Indices of the images looked at, evenly over all: files are sorted by class."""
        count = min(len(images), self.config.evaluate.max_images)
        return [place * len(images) // count for place in range(count)]

    def _labels(self, images: Images) -> Tensor:
        assert images.labels is not None
        return images.labels[self._chosen(images)]
