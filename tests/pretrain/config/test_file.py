"""Configuration files: read strictly, written so that the file alone repeats the run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.pretrain.tiny import RECIPES, changed, digits_config, one_sentence, photos_config
from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.config.file import read_config, write_config
from vmf_pretrain.config.views import DigitViewConfig, PhotoViewConfig

pytestmark = pytest.mark.quick

DIGITS = {"data": {"kind": "digits"}, "views": {"global_size": 16, "local_size": 8}, "backbone": {"patch_size": 4}}
UNFIT: list[tuple[str, str, list[str]]] = [
    ("empty", "", ["holds NoneType", "expected a mapping"]),
    ("list", "- a\n- b\n", ["holds list", "expected a mapping"]),
    ("syntax", "data: {kind: digits\nseed: [", ["is not YAML"]),
    ("python object", "seed: !!python/object/apply:os.getcwd []\n", ["is not YAML", "python/object"]),
    ("misspelt key", "optim: {learning_rat: 1}\n", ["optim.learning_rat is not", "did you mean optim.learning_rate?"]),
    ("misspelt section", "optin: {}\n", ["optin is not", "did you mean optim?"]),
    ("misspelt inner key", "views: {photos: {flop: 1}}\n", ["views.photos.flop", "views.photos.flip?"]),
    ("unknown key", "zebra: 1\n", ["zebra is not an option", "expected one of method, seed, data"]),
    ("number as key", "1: 2\n", ["1 is not an option"]),
    ("value for a section", "data: 3\n", ["data is 3", "expected a section"]),
    ("nothing for a section", "data:\n", ["data is None", "expected a section"]),
    ("word for a number", "train: {epochs: many}\n", ["epochs", "many", "int"]),
    ("fraction for a count", "train: {epochs: 2.5}\n", ["epochs", "2.5"]),
    ("unknown choice", "method: simclr\n", ["method", "simclr", "dino-vmf"]),
    ("number for a pair", "views: {photos: {local_area: 0.3}}\n", ["local_area", "0.3"]),
    ("three for a pair", "views: {photos: {local_area: [0.1, 0.2, 0.3]}}\n", ["local_area"]),
    ("out of range", "data: {kind: digits}\nloss: {student_temp: -1}\n", ["loss.student_temp is -1"]),
]


@pytest.mark.parametrize(("text", "parts"), [row[1:] for row in UNFIT], ids=[row[0] for row in UNFIT])
def test_unfit_file_is_refused_in_one_sentence_that_names_the_fault(
    text: str, parts: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(PretrainError) as caught:
        read_config(path)
    message = str(caught.value)
    missing = [part for part in parts if part not in message]
    assert one_sentence(message), repr(message)
    assert not missing, f"{message!r} does not say {missing}"


@pytest.mark.parametrize(("name", "part"), [("absent.yaml", "No such file"), (".", "Is a directory")])
def test_file_that_cannot_be_read_is_named(name: str, part: str, tmp_path: Path) -> None:
    with pytest.raises(PretrainError, match=part) as caught:
        read_config(tmp_path / name)
    assert str(tmp_path) in str(caught.value)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes(b"\xff\xfe\x00seed")
    with pytest.raises(PretrainError, match="is not YAML") as caught:
        read_config(tmp_path / "config.yaml")
    assert one_sentence(str(caught.value)), str(caught.value)


def test_tag_in_a_file_runs_nothing(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(f"seed: !!python/object/apply:os.mkdir [{tmp_path / 'made'}]\n")
    with pytest.raises(PretrainError):
        read_config(tmp_path / "config.yaml")
    assert not (tmp_path / "made").exists(), "reading a configuration ran its tag"


def test_written_configuration_reads_back_the_same(tmp_path: Path) -> None:
    config = changed(
        photos_config(tmp_path, seed=7, method="dino", head={"norm_prototypes": False}, loss={"koleo_weight": 1e-7}),
        views={"digits": DigitViewConfig(global_zoom=(0.5, 2.5)), "photos": PhotoViewConfig(blur=(0.25, 0.5, 0.75))},
    )
    write_config(config, tmp_path / "config.yaml")
    assert read_config(tmp_path / "config.yaml") == config


def test_written_configuration_holds_every_field(tmp_path: Path) -> None:
    write_config(digits_config(), tmp_path / "config.yaml")
    written = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert written["views"]["photos"]["blur"] == [1.0, 0.1, 0.5], "a default was left out"
    assert written["backbone"]["width"] == 16


def test_overrides_win_unless_none(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**DIGITS, "seed": 5}))
    read = read_config(tmp_path / "config.yaml", seed=None, method="dino")
    assert (read.seed, read.method) == (5, "dino")


def test_override_out_of_range_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(DIGITS))
    with pytest.raises(PretrainError, match="seed is -1"):
        read_config(tmp_path / "config.yaml", seed=-1)


@pytest.mark.parametrize("text", ["1e-3", "0.001", "1.0e-3"])
def test_small_numbers_may_be_written_in_any_way(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(DIGITS) + f"optim: {{learning_rate: {text}}}\n")
    assert read_config(tmp_path / "config.yaml").optim.learning_rate == 0.001


@pytest.mark.parametrize("name", ["digits.yaml", "imagefolder_vits16.yaml"])
def test_recipe_is_a_valid_configuration(name: str) -> None:
    config: Any = read_config(RECIPES / name)
    assert config.loss.teacher_temp < config.loss.student_temp, "such a teacher would collapse to uniform"
    assert replace(config, seed=3) != config
