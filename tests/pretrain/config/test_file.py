"""Configuration files: read strictly, written so that the file alone repeats the run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.pretrain.tiny import changed, digits_config, one_sentence, photos_config
from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.config.file import config_text, python_layer, read_config, text_layer
from vmf_pretrain.config.paths import EVALUATION_PATHS, PATH_FIELDS
from vmf_pretrain.config.resume import MAY_CHANGE
from vmf_pretrain.config.run import Config
from vmf_pretrain.config.tasks.evaluation import EvaluationConfig
from vmf_pretrain.config.typed import hint_of
from vmf_pretrain.config.views import DigitViewConfig, PhotoViewConfig
from vmf_pretrain.config.yaml_text import yaml_values
from vmf_pretrain.recipes.table import recipe_names, recipe_of
from vmf_pretrain.storage.run_folder import RunFolder

pytestmark = pytest.mark.quick

DIGITS = {"data": {"kind": "digits"}, "views": {"global_size": 16, "local_size": 8}, "backbone": {"patch_size": 4}}
FIRST_VERSION = """method: dino
seed: 7
data:
  kind: folder
  folder: /photos
  batch_size: 8
  workers: 2
  held_out: 0.25
views:
  global_size: 32
  local_size: 16
  local_count: 1
  photos:
    global_area:
    - 0.4
    - 1.0
    blur:
    - 1.0
    - 0.1
    - 0.5
backbone:
  name: vit_small_patch16_224
  patch_size: 8
  width: null
loss:
  centering: probability
  koleo_weight: 1.0e-07
train:
  epochs: 20
  device: auto
  precision: bf16-mixed
  log_every: 10
evaluate:
  every: 10
"""  # as written by the version that knew two kinds of data
UNFIT: list[tuple[str, str, list[str]]] = [
    ("empty", "", ["holds nothing", "expected a mapping"]),
    ("list", "- a\n- b\n", ["holds a list", "expected a mapping"]),
    ("syntax", "data: {kind: digits\nseed: [", ["is not YAML", "line 2"]),
    ("python object", "seed: !!python/object/apply:os.getcwd []\n", ["is not YAML", "python/object"]),
    ("misspelt key", "optim: {learning_rat: 1}\n", ["optim.learning_rat is not", "did you mean optim.learning_rate?"]),
    ("misspelt section", "optm: {}\n", ["optm is not", "did you mean optim?"]),
    ("misspelt inner key", "views: {photos: {flop: 1}}\n", ["views.photos.flop", "views.photos.flip?"]),
    ("unknown key", "zebra: 1\n", ["zebra is not an option", "expected one of method, seed, data"]),
    ("number as key", "1: 2\n", ["1 is not an option"]),
    ("value for a section", "data: 3\n", ["data is 3", "expected a section"]),
    ("nothing for a section", "data:\n", ["data is null", "expected a section"]),
    ("word for a number", "train: {epochs: many}\n", ['train.epochs is "many"; expected a whole number']),
    ("fraction for a count", "train: {epochs: 2.5}\n", ["train.epochs is 2.5; expected a whole number"]),
    ("unknown choice", "method: simclr\n", ["method is simclr", "dino-vmf"]),
    (
        "number for a pair",
        "views: {photos: {local_area: 0.3}}\n",
        ["views.photos.local_area is 0.3; expected a list of 2"],
    ),
    (
        "three for a pair",
        "views: {photos: {local_area: [0.1, 0.2, 0.3]}}\n",
        ["line 1: views.photos.local_area is [0.1, 0.2, 0.3]; expected a list of 2"],
    ),
    ("out of range", "data: {kind: digits}\nloss: {student_temp: -1}\n", ["loss.student_temp is -1"]),
    ("line of a value", "seed: 0\noptim:\n  clip: 1\n  learning_rate: fast\n", ["line 4: optim.learning_rate is"]),
    ("key twice", "seed: 0\noptim:\n  clip: 1\n  clip: 2\n", ["line 4: optim.clip is given twice, first in line 3"]),
    ("alias", "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n", ["line 1: anchors and aliases (a)"]),
    ("merge key", "data:\n  <<: {kind: digits}\n", ["line 2: merge keys"]),
    ("deep", "seed: " + "[" * 10_000 + "]" * 10_000, ["more than 20 levels"]),
    ("two documents", "seed: 1\n---\nseed: 2\n", ["line 2", "another document"]),
    ("long number", "seed: " + "9" * 10_000, ["10000 characters"]),
    ("zero byte", "seed: \0", ["no YAML holds"]),
    ("infinite", "optim: {clip: .inf}\n", ["optim.clip is inf; expected a finite number"]),
    ("not a number", "optim: {clip: .nan}\n", ["optim.clip is nan; expected a finite number"]),
    ("number too large", "optim: {clip: 1e999}\n", ["optim.clip is inf"]),
    ("null for a number", "optim: {clip: null}\n", ["optim.clip is null; expected a finite number"]),
    ("boolean for a number", "optim: {clip: true}\n", ["optim.clip is true; expected a finite number"]),
    ("boolean for a count", "train: {epochs: true}\n", ["train.epochs is true; expected a whole number"]),
    ("count for a boolean", "head: {batch_norm: 1}\n", ["head.batch_norm is 1; expected true or false"]),
    ("YAML 1.1 boolean", "head: {batch_norm: on}\n", ['head.batch_norm is "on"; expected true or false']),
    ("YAML 1.1 number", "data: {batch_size: 1_000}\n", ['data.batch_size is "1_000"; expected a whole number']),
    ("word in a list", "views: {photos: {blur: [1, 0, x]}}\n", ["views.photos.blur is", "expected a list of 3"]),
    ("text for a list", "views: {photos: {blur: x}}\n", ["views.photos.blur is", "expected a list of 3"]),
    ("number for a word", "backbone: {name: 12}\n", ["backbone.name is 12; expected text"]),
    ("accumulate", "data: {kind: digits, batch_size: 6}\ntrain: {accumulate: 4}\n", ["accumulate is 4", "divide"]),
    ("stray options", "options: {a: 1}\n", ["options are given but dino-vmf reads none"]),
    ("header", "recipe: {title: x}\n", ["recipe has no stands_for, memory, time"]),
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
    with pytest.raises(PretrainError, match="is not UTF-8 text") as caught:
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
    RunFolder(tmp_path).write_config(config_text(config))
    assert read_config(tmp_path / "config.yaml") == config


def test_written_configuration_holds_every_field(tmp_path: Path) -> None:
    RunFolder(tmp_path).write_config(config_text(digits_config()))
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


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "0.001", "1.0e-3", ".001", "0001e-3", "+.1e-2"])
def test_small_numbers_may_be_written_in_any_way(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(DIGITS) + f"optim: {{learning_rate: {text}}}\n")
    assert read_config(tmp_path / "config.yaml").optim.learning_rate == 0.001


@pytest.mark.parametrize("name", recipe_names())
def test_recipe_is_a_valid_configuration(name: str) -> None:
    config: Any = recipe_of(name).config
    assert config.loss.teacher_temp < config.loss.student_temp, "such a teacher would collapse to uniform"
    assert replace(config, seed=3) != config


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("012", 12),
        ("0o17", 15),
        ("0x1F", 31),
        ("-1", -1),
        ("1e2", 100.0),
        ("5.", 5.0),
        ("yes", "yes"),
        ("off", "off"),
        ("1:30", "1:30"),
        ("2026-01-01", "2026-01-01"),
        ("0b1", "0b1"),
        ("'1'", "1"),
        ("~", None),
        ("", None),
        ("TRUE", True),
    ],
)
def test_plain_scalar_is_what_yaml_1_2_says(text: str, value: object) -> None:
    read = yaml_values(f"key: {text}")[0]["key"]
    assert (type(read), read) == (type(value), value)


@pytest.mark.parametrize(
    "word", ["on", "0o17", "1e5", "012", "null", "~", "1_0", "é", ".5", "true", "-", "a: b", "#x", " "]
)
def test_word_that_looks_like_a_number_is_written_so_that_it_reads_back(word: str, tmp_path: Path) -> None:
    config = changed(photos_config(tmp_path), backbone={"name": word}, method="own:Method")
    config = replace(config, options={"text": word, "twice": [[1], [1]]})
    RunFolder(tmp_path).write_config(config_text(config))
    assert read_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    "content", [b"\xef\xbb\xbfseed: 5\ndata: {folder: /\xc3\xa9}", b"seed: 5\r\ndata:\r\n  folder: /\xc3\xa9\r\n"]
)
def test_file_is_utf8_whatever_the_locale(content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("locale.getpreferredencoding", lambda *arguments: "ascii")
    monkeypatch.setattr("locale.getencoding", lambda: "ascii")
    (tmp_path / "config.yaml").write_bytes(content)
    config = read_config(tmp_path / "config.yaml")
    assert (config.seed, config.data.folder) == (5, "/é")


def test_file_too_large_to_be_settings_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes(b"# " + b"x" * (1 << 20))
    with pytest.raises(PretrainError, match="larger than 1 MiB"):
        read_config(tmp_path / "config.yaml")


def test_home_folder_is_filled_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    (tmp_path / "config.yaml").write_text("data: {folder: ~/photos}")
    assert read_config(tmp_path / "config.yaml").data.folder == "/home/someone/photos"
    assert text_layer({"data.folder": "~/a"}) == python_layer({"data.folder": Path("~/a")})
    with pytest.raises(PretrainError, match="home folder is not known"):
        text_layer({"data.folder": "~nobody-of-this-name/a"})


LAYERS: list[tuple[str, str, dict[str, Any]]] = [
    ("optim.learning_rate", "1e-3", {"optim": {"learning_rate": 0.001}}),
    ("optim.clip", "3", {"optim": {"clip": 3.0}}),
    ("views.photos.blur", "[1.0, 0.1, 0]", {"views": {"photos": {"blur": (1.0, 0.1, 0.0)}}}),
    ("backbone.width", "null", {"backbone": {"width": None}}),
    ("data.folder", "null", {"data": {"folder": None}}),
    ("data.folder", "2024", {"data": {"folder": "2024"}}),
    ("head.norm_prototypes", "false", {"head": {"norm_prototypes": False}}),
    ("train.precision", "bf16-mixed", {"train": {"precision": "bf16"}}),
    ("optim", "{clip: 1}", {"optim": {"clip": 1.0}}),
    ("options.own", "[1, {a: b}]", {"options": {"own": [1, {"a": "b"}]}}),
]


@pytest.mark.parametrize(("name", "text", "layer"), LAYERS, ids=[f"{row[0]}={row[1]}" for row in LAYERS])
def test_field_of_the_command_line_is_read_as_its_type(name: str, text: str, layer: dict[str, Any]) -> None:
    assert text_layer({name: text}) == layer


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("optim.learning_rate", "abc", '--optim.learning_rate is "abc"; expected a finite number or null.'),
        (
            "optim.learnig_rate",
            "1",
            "--optim.learnig_rate is not an option of the configuration; did you mean optim.learn",
        ),
        ("optim.clip.x", "1", "optim.clip is no section"),
        ("train.epochs", "2.5", "--train.epochs is 2.5; expected a whole number."),
        ("train.device", "tpu", '--train.device is "tpu"; expected auto or cpu or cuda.'),
        ("views.photos.blur", "[1.0", '--views.photos.blur is "[1.0", which is not YAML'),
        ("head.norm_prototypes", "maybe", "expected true or false or null."),
        ("optim", "3", "--optim is 3; expected a section"),
    ],
)
def test_unfit_field_of_the_command_line_is_named_as_it_was_typed(name: str, text: str, message: str) -> None:
    with pytest.raises(PretrainError) as caught:
        text_layer({name: text})
    assert message in str(caught.value)
    assert one_sentence(str(caught.value)), str(caught.value)


def test_layers_of_python_take_sections_and_dotted_names() -> None:
    layer = python_layer({"optim": {"clip": 1}, "optim.learning_rate": 2, "views.photos.blur": [1, 0, 0]})
    assert layer == {"optim": {"clip": 1.0, "learning_rate": 2.0}, "views": {"photos": {"blur": (1.0, 0.0, 0.0)}}}
    with pytest.raises(PretrainError, match="options is"):
        python_layer({"options.made": object()})


def test_configuration_of_the_first_version_still_loads(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(FIRST_VERSION)
    config = read_config(tmp_path / "config.yaml")
    assert (config.train.precision, config.data.kind, config.loss.koleo_weight) == ("bf16", "folder", 1e-7)
    (tmp_path / "config.yaml").write_text(
        "data: {kind: digits}\nviews: {global_size: 16, local_size: 8}\n"
        "backbone: {patch_size: 4}\ntrain: {precision: 32-true}\n"
    )
    assert read_config(tmp_path / "config.yaml").train.precision == "fp32"


def test_what_may_change_at_resume_exists() -> None:
    for name in MAY_CHANGE:
        hint_of(Config, name.split("."))
    for path in PATH_FIELDS:
        hint_of(Config, path)
    for path in EVALUATION_PATHS:
        hint_of(EvaluationConfig, path)
    with pytest.raises(PretrainError):
        hint_of(Config, ["data", "fodler"])
