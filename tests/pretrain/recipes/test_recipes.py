"""Recipes: numbers are the sources', what is ours is named, and each one trains."""

from __future__ import annotations

import functools
import math
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.pretrain.tiny import changed, copied, differing, one_sentence, save_photos
from vmf_pretrain.config.data import BUNDLED
from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.config.file import read_config
from vmf_pretrain.config.method import METHODS, VMF
from vmf_pretrain.config.resume import flat
from vmf_pretrain.config.run import Config
from vmf_pretrain.data.batch import Batch
from vmf_pretrain.data.batches import ViewBatches
from vmf_pretrain.data.load import load_images
from vmf_pretrain.engine.loop import Loop
from vmf_pretrain.methods.table import method_class
from vmf_pretrain.networks.backbone import build_backbone
from vmf_pretrain.recipes.table import bundled_recipe, recipe_layer, recipe_names, recipe_of, recipe_text
from vmf_pretrain.start import Wish, settings

pytestmark = pytest.mark.quick

PUBLISHED: dict[str, dict[str, Any]] = yaml.safe_load((Path(__file__).parent / "published.yaml").read_text())
NAMES = recipe_names()
config_named = functools.cache(lambda name: recipe_of(name).config)
UNSAID = {"data.kind"}  # follows from the images


def table_of(name: str) -> dict[str, Any]:
    """The sources' settings of a recipe by dotted name."""
    row = PUBLISHED[name]
    values = {**(table_of(row["like"]) if "like" in row else {}), **row["values"]}
    return {key: value for key, value in values.items() if key not in row.get("unknown", [])}


@pytest.mark.parametrize("name", PUBLISHED)
def test_numbers_are_the_sources(name: str) -> None:
    config = config_named(name)
    found, wanted = flat(asdict(config)), table_of(name)
    as_written = {key: list(value) if isinstance(value, tuple) else value for key, value in found.items()}
    wrong = {key: (as_written[key], value) for key, value in wanted.items() if as_written[key] != value}
    assert not wrong, f"ours and the source's: {wrong}"
    assert config.optim.peak(config.data.batch_size) == pytest.approx(PUBLISHED[name]["peak_learning_rate"], rel=1e-12)


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_setting_is_in_the_table_of_sources_or_named_as_ours(name: str) -> None:
    comments = recipe_text(name).split("recipe:\n")[0]
    ours = {
        found
        for part in re.split(r"# (?=Source|Ours|What|\w+, )", comments)
        if part.startswith("Ours")
        for found in re.findall(r"[a-z_]+\.[a-z_.]*[a-z_]", part)
    }
    unnamed = flat(recipe_layer(name)).keys() - table_of(name).keys() - ours - UNSAID
    assert not unnamed, f"whose are {sorted(unnamed)}?"


@pytest.mark.parametrize("name", [name for name, row in PUBLISHED.items() if "network" in row])
def test_network_has_the_published_shape(name: str) -> None:
    with torch.device("meta"):
        backbone = build_backbone(config_named(name))
    shape = [backbone.embed_dim, len(backbone.blocks), backbone.blocks[0].get_submodule("attn").num_heads]
    assert shape == PUBLISHED[name]["network"]


def toy(config: Config, folder: Path) -> Config:
    """The recipe with networks, heads and views as small as they can be."""
    patch = config.backbone.patch_size
    sections: dict[str, Any] = {
        "views": {"global_size": 4 * patch, "local_size": 2 * patch, "local_count": min(config.views.local_count, 1)},
        "backbone": {"width": 16, "depth": 2, "heads": 2},
        "head": {"prototypes": 16, "hidden_dim": 16, "bottleneck_dim": 8},
        "decoder": {"width": 16, "depth": 1, "heads": 4},
        "predictor": {"width": 8, "depth": 1},
        "blocks": {"min_keep": 0},
        "train": {"device": "cpu", "precision": "fp32", "accumulate": 1},
    }
    if config.data.kind in BUNDLED:
        views = {"local_count": min(config.views.local_count, 1)}
        return changed(config, **{**sections, "views": views, "data": {"batch_size": 4}})
    return changed(config, **sections, data={"folder": str(folder), "batch_size": 4, "held_out": 0.2, "workers": 0})


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    save_photos(folder, 8, side=32)
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_two_steps_train_a_toy_of_the_recipe(name: str, photos: Path) -> None:
    config = toy(config_named(name), photos)
    method = method_class(config)
    batches = ViewBatches(load_images(config)[0], config, method.plan(config))
    loop = Loop(config, method, batches.steps_per_epoch, torch.device("cpu"))
    before = copied(loop.method.state_dict())
    for step in range(2):
        batch = batches[step]
        assert isinstance(batch, Batch), batch
        (taken,) = loop.step(step, batch)
        assert math.isfinite(taken.numbers["total"])
        assert not taken.counts.not_finite
    assert len(differing(copied(loop.method.state_dict()), before)) > len(before) / 3, "hardly a weight has moved"


@pytest.mark.parametrize("name", ["cifar_dinov2", "digits", "dino_vits16"])
def test_printed_recipe_needs_no_other_and_says_every_setting(name: str, tmp_path: Path) -> None:
    (tmp_path / "printed.yaml").write_text(recipe_text(name))
    given = {} if name == "digits" else {"data.folder": "FOLDER"}
    assert read_config(tmp_path / "printed.yaml", **given) == config_named(name)
    said = flat(yaml.safe_load(recipe_text(name))).keys()
    assert said >= flat(asdict(config_named(name))).keys()


def test_file_of_a_person_extends_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("extends: cifar_dino\noptim: {learning_rate: 0.5}\ndata: {folder: /photos}\n")
    config = settings(Wish(config=tmp_path / "mine.yaml"), say=print)
    assert config.optim.peak(7) == 0.5, "the recipe's rate for a batch was not replaced"
    assert config.backbone == config_named("cifar_dino").backbone


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("extends: dino_vits61\n", "dino_vits61 is no recipe; did you mean dino_vits16"),
        ("extends: [dino_vits16]\n", "line 1: extends is ['dino_vits16']; expected the name of a recipe."),
    ],
)
def test_recipe_that_cannot_be_extended_is_refused(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(PretrainError) as caught:
        settings(Wish(config=tmp_path / "mine.yaml"), say=print)
    assert said in str(caught.value)
    assert one_sentence(str(caught.value))


def test_run_keeps_every_setting_itself(tmp_path: Path) -> None:
    """A recipe may change; the config.yaml of a run must not follow it."""
    (tmp_path / "config.yaml").write_text("extends: digits\n")
    with pytest.raises(PretrainError, match="has to say every setting itself"):
        read_config(tmp_path / "config.yaml")


def test_a_method_on_bundled_images_takes_the_recipe_of_its_own_if_there_is_one() -> None:
    chosen = {(images, method): bundled_recipe(images, method) for images in BUNDLED for method in (None, *METHODS)}
    assert set(chosen.values()) <= set(NAMES)
    for (images, method), name in chosen.items():
        config = config_named(name)
        assert config.data.kind == images
        if method is not None:  # what a person gets who names the method alone
            assert config.method.removesuffix(VMF) in (method.removesuffix(VMF), "dino"), (method, name)
    assert chosen["digits", "ibot-vmf"] == "digits_ibot"
    assert chosen["digits", None] == chosen["digits", "dino"] == "digits"
