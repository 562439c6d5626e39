"""Weights that a run cannot start from are refused in one sentence that says what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch

from tests.pretrain.engine.outside_method import Turns
from tests.pretrain.engine.starts import HEAD, TOY, config_of, dino, saved, started
from tests.pretrain.networks.published import WIDTH, backbone, drawn, head
from tests.pretrain.tiny import changed, digits_config, one_sentence
from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.engine.beginning import beginning
from vmf_pretrain.methods.method import Place

pytestmark = pytest.mark.quick


def a_whole_module(path: Path) -> Path:
    torch.save(torch.nn.Linear(2, 2), path)
    return path


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "another patch size": (
        {"backbone": {"patch_size": 8}},
        {"positions": "resized"},
        "24 x 1 x 4 x 4 there but 24 x 1 x 8 x 8 here",
    ),
    "more blocks": ({"backbone": {"depth": 3}}, {}, "blocks.2.norm1.weight.* missing there"),
    "fewer blocks": ({"backbone": {"depth": 1}}, {}, "blocks.1.norm1.weight.* left over there"),
    "another grid": (
        {"backbone": {"patch_size": 8}},
        {},
        "positions are of 4 x 4 patches but the backbone's of 2 x 2; set start_from",
    ),
    "no class token": ({"method": "ijepa"}, {}, "cls_token left over there"),
    "another head": ({"head": {**HEAD, "prototypes": 5}}, {"parts": "all"}, "its head does not fit: .*last_layer"),
    "no such network": ({}, {"network": "target"}, "network is target but it holds student, teacher"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_weights_that_do_not_fit_are_refused_in_one_sentence(case: str, tmp_path: Path) -> None:
    sections, start, part = REFUSED[case]
    config = config_of(sections.get("method", "dino"), saved(tmp_path / "dino.pth", dino()), start_from=start)
    config = changed(config, **{**sections, "backbone": {**TOY, **sections.get("backbone", {})}})
    with pytest.raises(PretrainError, match=part) as caught:
        started(config)
    assert one_sentence(str(caught.value)), caught.value


def test_positions_of_another_form_are_refused_by_their_shape(tmp_path: Path) -> None:
    w = {**drawn(backbone()), "pos_embed": torch.ones(1, 4, 4, WIDTH)}
    path = saved(tmp_path / "rows.pth", {"model": w})
    with pytest.raises(PretrainError, match="pos_embed is 1 x 4 x 4 x 24 there but 1 x 17 x 24 here"):
        started(config_of("dino", path, start_from={"positions": "resized"}))


def test_what_is_no_file_of_weights_is_refused_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    two = {name: drawn(backbone()) for name in ("one", "other")}
    shard = saved(tmp_path / "rank_0.pth", {"model": {"flat_param": torch.ones(2)}})
    text = tmp_path / "text.pth"
    text.write_text("weights")
    cases: dict[str, Path | str] = {
        "pickled torch.nn.modules.linear.Linear.*save its state_dict": a_whole_module(tmp_path / "module.pth"),
        "cannot be read.*whole file that torch.save wrote": text,
        "cannot be read: No such file": tmp_path / "absent.pth",
        "a folder without a run of ours": tmp_path,
        "no patch_embed.proj.weight, but mlp": saved(tmp_path / "head.pth", drawn(head())),
        "one rank's part of model.flat_param.*FULL_STATE_DICT": shard,
        "holds one, other; say which with start_from.network": saved(tmp_path / "two.pth", two),
        "fetch model.safetensors of timm/vit_tiny.* and give its path": "timm:vit_tiny_patch16_224.augreg_in21k",
        "no model whose weights timm publishes": "timm:vit_tiny_patch17",
    }
    for part, weights in cases.items():
        with pytest.raises(PretrainError, match=part) as caught:
            started(config_of("dino", weights))
        assert one_sentence(str(caught.value)), caught.value


def test_a_method_that_does_not_say_what_takes_weights_is_named(tmp_path: Path) -> None:
    config = config_of("dino", saved(tmp_path / "dino.pth", dino()))
    begin = beginning(config, print)
    assert begin is not None
    with pytest.raises(PretrainError, match="Turns does not say what takes them"):
        begin(Turns(config, Place(0, 5, 2)))


def test_options_without_weights_are_refused() -> None:
    with pytest.raises(PretrainError, match=r"start_from\.parts is given without start_from\.weights"):
        digits_config(start_from={"parts": "all"})
