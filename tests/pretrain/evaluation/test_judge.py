"""The judge looks at the right images, at few enough, and only where labels exist."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.pretrain.tiny import (
    Pixels,
    batch_of,
    build_networks,
    digits_config,
    folder_images,
    loop_on,
    photos_config,
    save_photos,
    two_classes,
)
from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.config.run import Config
from vmf_pretrain.data.bundled import DigitImages, digits
from vmf_pretrain.evaluation.judge import Judge
from vmf_pretrain.evaluation.knn import knn_accuracy
from vmf_pretrain.evaluation.linear import linear_accuracy
from vmf_pretrain.evaluation.online import probe_sets

pytestmark = pytest.mark.quick


def judged(config: Config) -> Judge:
    train, held_out = digits()
    return Judge(train, held_out, config)


def test_accuracy_of_a_backbone_that_does_nothing_is_that_of_pixels() -> None:
    judge = judged(digits_config(evaluate={"max_images": 500}))
    found = judge.baselines(Pixels())
    assert found["knn_untrained"] == found["knn_pixels"] == judge.knn(Pixels())
    assert found["linear_untrained"] == found["linear_pixels"]


def test_baselines_are_those_of_all_images_and_the_same_every_time() -> None:
    config = digits_config(evaluate={"max_images": 10_000})
    train, held_out = digits()
    _, untrained = build_networks(config)
    torch.manual_seed(1)
    found = judged(config).baselines(untrained.backbone)
    torch.manual_seed(2)
    again = judged(config).baselines(untrained.backbone)
    pixels = [part for images in (train, held_out) for part in (images.canvases.flatten(1), images.labels)]
    assert found == again
    assert found["linear_pixels"] == linear_accuracy(*pixels)
    assert found["knn_pixels"] == knn_accuracy(*pixels, neighbours=10, temperature=0.07)
    assert 40 < float(str(found["knn_pixels"])) < 85, found


def test_pixels_are_those_of_the_image_and_not_those_that_a_network_is_fed(tmp_path: Path) -> None:
    two_classes(tmp_path)
    train, held_out = folder_images(tmp_path, 32, 0.25)
    assert held_out is not None
    pixels = []
    for images in (train, held_out):
        assert images.labels is not None
        pixels += [images.evaluation_pixels(list(range(len(images)))).flatten(1), images.labels]
    judge = Judge(train, held_out, photos_config(tmp_path))
    assert judge.baselines(Pixels())["knn_pixels"] == knn_accuracy(*pixels, neighbours=3, temperature=0.07)


def test_no_more_images_are_looked_at_than_asked_for() -> None:
    backbone = Pixels()
    judged(digits_config(evaluate={"max_images": 300})).knn(backbone)
    assert backbone.batches == [256, 44, 256, 44]


def test_images_looked_at_lie_evenly_over_all_classes() -> None:
    labels = torch.arange(10).repeat_interleave(40)
    # the angle of the first two pixels tells the class: cosine similarity sees no length
    canvases = torch.zeros(400, 16, 16)
    canvases[:, 0, 0], canvases[:, 0, 1] = torch.cos(labels / 3), torch.sin(labels / 3)
    images = DigitImages(canvases, torch.zeros(400, 2), labels)
    judge = Judge(images, images, digits_config(evaluate={"max_images": 50, "neighbours": 3}))
    accuracy = judge.baselines(Pixels())["knn_pixels"]
    assert accuracy == 100.0, f"{accuracy} %: some class was not among the images looked at"


@pytest.mark.parametrize("labelled", [True, False])
def test_report_has_every_figure_and_accuracies_only_with_labels(labelled: bool) -> None:
    config = digits_config(evaluate={"max_images": 100})
    training, batches = loop_on(config, 300)
    training.step(0, batch_of(batches, 0))  # the centre starts with it
    train, held_out = digits()
    report = Judge(train, held_out if labelled else None, config).report(training.method, training.place(1))
    assert report is not None
    figures, head = report.figures, report.head
    accuracies = [figures["knn"], figures["linear"]]
    assert all((accuracy is not None) == labelled for accuracy in accuracies), accuracies
    assert abs(figures["mutual_information"] - (figures["usage_entropy"] - figures["teacher_entropy"])) < 1e-4
    assert 1 <= figures["prototypes_used"] <= 32
    assert 1 <= figures["rankme"] <= 16
    assert head is not None
    assert head.usage.shape == head.norms.shape == (32,)
    assert abs(head.usage.sum().item() - 1) < 1e-5


def test_folder_without_classes_has_no_accuracy_and_no_image_is_read_for_it(tmp_path: Path) -> None:
    save_photos(tmp_path, 4)
    images, held_out = folder_images(tmp_path, 32, 0.25)
    judge = Judge(images, held_out, photos_config(tmp_path))
    backbone = Pixels()
    accuracies: list[Any] = [judge.knn(backbone), *judge.baselines(backbone).values()]
    assert accuracies == [None] * 5
    assert backbone.batches == [], f"{sum(backbone.batches)} images went through the network for nothing"


def test_every_protocol_is_done_on_every_set(tmp_path: Path) -> None:
    wanted = {
        "online": ("knn", "linear", "few_shot"),
        "best": "linear",
        "sets": (str(two_classes(tmp_path / "pets", 10)),),
    }
    config = photos_config(two_classes(tmp_path / "photos"), evaluate=wanted)
    train, held_out = folder_images(tmp_path / "photos", 32, 0.25)
    judge = Judge(train, held_out, config, probe_sets(config.evaluate, 32))
    backbone = Pixels()
    found = judge.online(backbone)
    assert list(found) == ["knn", "linear", "few_shot", "knn/pets", "linear/pets", "few_shot/pets"]
    assert found["knn"] == judge.knn(backbone)
    assert all(value is not None and 0 <= value <= 100 for value in found.values())
    assert sum(backbone.batches) == 16 + 20 + 16, "features of a set are computed once for all protocols"
    with pytest.raises(PretrainError, match="best is linear; expected one of knn"):
        photos_config(tmp_path, evaluate={"best": "linear"})
    with pytest.raises(PretrainError, match="best is knn/cars; expected one of knn, linear, knn/pets, linear/pets"):
        photos_config(tmp_path, evaluate={**wanted, "online": ("knn", "linear"), "best": "knn/cars"})
