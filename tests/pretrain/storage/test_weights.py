"""The weights load, and the plots are readable images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.pretrain.tiny import (
    batch_of,
    build_networks,
    differing,
    digits_config,
    dino_of,
    folder_images,
    loop_on,
    one_sentence,
    photos_config,
    save_photos,
    some_digits,
)
from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.data.network_input import NetworkInput, network_input
from vmf_pretrain.evaluation.prototypes import HeadReport
from vmf_pretrain.report.figures import draw_plots, sample_attention
from vmf_pretrain.storage.metrics import MetricsLog
from vmf_pretrain.storage.run_folder import RunFolder
from vmf_pretrain.storage.weights import Weights, load_weights, save_weights

FED = network_input(digits_config())
REPORT = HeadReport(
    mutual_information=1.0,
    teacher_entropy=0.5,
    usage=torch.full((32,), 1 / 32),
    usage_entropy=1.5,
    prototypes_used=30,
    unique_prototypes=32,
    largest_duplicate_share=1 / 32,
    norms=torch.rand(32) + 0.5,
)


def weights_of(folder: RunFolder, teacher: nn.Module, fed: NetworkInput, facts: dict[str, Any]) -> Weights:
    return Weights(folder.weights / "last.safetensors", teacher.state_dict(), fed, facts)


@pytest.mark.quick
def test_weights_load_strictly_into_a_fresh_network(tmp_path: Path) -> None:
    training, batches = loop_on(digits_config(data={"batch_size": 32}), 64)
    training.step(0, batch_of(batches, 0))
    folder = RunFolder.create(tmp_path / "run")
    save_weights(weights_of(folder, dino_of(training).teacher, FED, {"step": 1}))
    _, fresh = build_networks(digits_config(seed=9))
    tensors, fed = load_weights(folder.weights / "last.safetensors")
    fresh.load_state_dict(tensors, strict=True)
    assert differing(fresh.state_dict(), dino_of(training).teacher.state_dict()) == []
    assert fed == FED
    assert json.loads((folder.weights / "last.json").read_text()) == {"step": 1, "input": FED.facts()}


@pytest.mark.quick
@pytest.mark.parametrize("beside", [None, "not JSON", "[]", '{"step": 1}', '{"input": {"size": 16}}'])
def test_weights_that_do_not_say_what_they_were_trained_on_are_refused(beside: str | None, tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run")
    save_file(build_networks(digits_config())[1].state_dict(), folder.weights / "last.safetensors")
    path = folder.weights / "last.json"
    if beside is not None:
        path.write_text(beside)
    with pytest.raises(PretrainError, match=r"last\.json|input lacks channels, mean, deviation") as caught:
        load_weights(folder.weights / "last.safetensors")
    assert one_sentence(str(caught.value)), str(caught.value)


@pytest.mark.quick
def test_scale_of_photographs_is_beside_their_weights(tmp_path: Path) -> None:
    folder, config = RunFolder.create(tmp_path / "run"), photos_config(tmp_path)
    save_weights(weights_of(folder, build_networks(config)[1], network_input(config), {}))
    said = json.loads((folder.weights / "last.json").read_text())["input"]
    assert said == {"size": 32, "channels": 3, "mean": [0.485, 0.456, 0.406], "deviation": [0.229, 0.224, 0.225]}


@pytest.mark.quick
def test_saving_again_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run")
    for step in (1, 2):
        _, teacher = build_networks(digits_config())
        save_weights(weights_of(folder, teacher, FED, {"step": step}))
    assert sorted(path.name for path in folder.weights.iterdir()) == ["last.json", "last.safetensors"]
    assert json.loads((folder.weights / "last.json").read_text())["step"] == 2
    assert differing(load_file(folder.weights / "last.safetensors"), teacher.state_dict()) == []


@pytest.mark.quick
def test_attention_is_drawn_beside_the_photograph_and_not_what_was_made_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Tensor] = []
    monkeypatch.setattr("vmf_pretrain.report.plots.plot_attention", lambda images, maps, path: drawn.append(images))
    save_photos(tmp_path / "photos", 6)
    images, _ = folder_images(tmp_path / "photos", 32, 0.25)
    config = photos_config(tmp_path / "photos")
    drawn_from = sample_attention(config, build_networks(config)[1].backbone, images)
    draw_plots(RunFolder.create(tmp_path / "run"), config, REPORT, drawn_from, {}, {})
    error = (drawn[0] - images.evaluation_pixels(list(range(6)))).abs().max().item()
    assert error < 1e-6, f"off by {error:.1e}"


@pytest.mark.parametrize("images", [1, 20])
def test_every_plot_is_a_picture(images: int, tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run")
    log = MetricsLog(folder, 0)
    log.write({"step": 0, "knn": 20.0})
    log.write({"step": 1, "loss": 3.0, "teacher_entropy": 1.0, "kl": 2.0})
    log.write({"step": 2, "loss": None, "teacher_entropy": None, "kl": None})
    log.write({"step": 2, "epoch": 1, "knn": 60.0})
    _, teacher = build_networks(digits_config())
    sample = sample_attention(digits_config(), teacher.backbone, some_digits(images))
    draw_plots(folder, digits_config(), REPORT, sample, {"untrained": 20.0}, {})
    for name in ("loss", "knn", "usage", "kappa", "attention"):
        with Image.open(folder.plots / f"{name}.png") as picture:
            shades = len(set(picture.convert("L").tobytes()))
            assert min(picture.size) >= 100, f"{name}.png has {picture.size} pixels"
        assert shades > 1, f"{name}.png is one shade"
