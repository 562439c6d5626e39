"""Configurations: every value is checked when it is made, every field is described."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import pytest

from tests.pretrain.tiny import changed, digits_config, one_sentence
from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.config.file import config_of
from vmf_pretrain.config.optim import OptimConfig
from vmf_pretrain.config.run import Config

OUT_OF_RANGE: list[tuple[str, dict[str, Any], str]] = [
    ("data", {"batch_size": 0}, "data.batch_size is 0 but must be greater than 0"),
    ("data", {"workers": -1}, "data.workers is -1 but must be 0 or greater"),
    ("data", {"held_out": 1.0}, "data.held_out is 1.0 but must lie strictly between 0 and 1"),
    ("data", {"kind": "folder"}, "data.folder is missing"),
    ("views", {"global_size": 0}, "views.global_size is 0"),
    ("views", {"global_size": 20}, "views.global_size is 20 but must be a multiple of backbone.patch_size, 8"),
    ("views", {"local_size": 12}, "views.local_size is 12 but must be a multiple of backbone.patch_size, 8"),
    ("views", {"local_count": -1}, "views.local_count is -1"),
    ("backbone", {"patch_size": 0}, "backbone.patch_size is 0"),
    ("backbone", {"drop_path": 1.0}, "backbone.drop_path is 1.0"),
    ("head", {"prototypes": 1}, "head.prototypes is 1 but at least 2 are needed"),
    ("head", {"hidden_dim": 0}, "head.hidden_dim is 0"),
    ("head", {"layers": 0}, "head.layers is 0"),
    ("head", {"norm_prototypes": True}, "head.norm_prototypes is true but dino-vmf learns the norms"),
    ("loss", {"student_temp": 0.0}, "loss.student_temp is 0.0 but must be greater than 0"),
    ("loss", {"teacher_temp": -0.1}, "loss.teacher_temp is -0.1"),
    ("loss", {"teacher_temp": float("nan")}, "loss.teacher_temp is nan"),
    ("loss", {"warmup_teacher_temp": 0.0}, "loss.warmup_teacher_temp is 0.0"),
    ("loss", {"warmup_teacher_temp_epochs": 3}, "loss.warmup_teacher_temp_epochs is 3 but the run has 2 epochs"),
    ("loss", {"center_momentum": 1.0}, "loss.center_momentum is 1.0"),
    ("loss", {"koleo_weight": -1.0}, "loss.koleo_weight is -1.0"),
    ("optim", {"learning_rate": 0.0}, "optim.learning_rate is 0.0"),
    ("optim", {"base_learning_rate": 0.1}, "optim.learning_rate and optim.base_learning_rate are both given"),
    ("optim", {"batch_rule": "linear_256"}, "optim.learning_rate and optim.batch_rule are both given"),
    ("optim", {"learning_rate": None, "base_learning_rate": -1.0}, "optim.base_learning_rate is -1.0"),
    ("optim", {"layer_decay": 1.5}, "optim.layer_decay is 1.5 but must lie between 0 and 1"),
    ("optim", {"patch_embed_rate": 0.0}, "optim.patch_embed_rate is 0.0"),
    ("optim", {"clip": -1.0}, "optim.clip is -1.0"),
    ("optim", {"teacher_momentum": 1.5}, "optim.teacher_momentum is 1.5 but must lie between 0 and 1"),
    ("train", {"epochs": 0}, "train.epochs is 0"),
    ("train", {"keep_checkpoints": 0}, "train.keep_checkpoints is 0"),
    ("evaluate", {"neighbours": 0}, "evaluate.neighbours is 0"),
]
VIEWS_OUT_OF_RANGE: list[tuple[str, dict[str, Any], str]] = [
    ("digits", {"global_zoom": (1.5, 1.0)}, r"views.digits.global_zoom is [1.5, 1.0]"),
    ("digits", {"noise": -0.1}, "views.digits.noise is -0.1"),
    ("animals", {"flip": 2.0}, "views.animals.flip is 2.0"),
    ("photos", {"global_area": (0.5, 1.5)}, "views.photos.global_area reaches 1.5"),
    ("photos", {"flip": 2.0}, "views.photos.flip is 2.0"),
    ("photos", {"hue": 0.6}, "views.photos.hue is 0.6"),
    ("photos", {"blur": (0.1, 0.2, 1.3)}, "views.photos.blur is 1.3"),
]


def classes_of_configuration(kind: type = Config) -> Iterator[type]:
    yield kind
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(field.type) and isinstance(field.type, type):
            yield from classes_of_configuration(field.type)


@pytest.mark.parametrize(("section", "values", "message"), OUT_OF_RANGE, ids=[row[2] for row in OUT_OF_RANGE])
def test_value_out_of_range_is_refused_in_one_sentence(section: str, values: dict[str, Any], message: str) -> None:
    with pytest.raises(PretrainError, match=re.escape(message)) as caught:
        changed(digits_config(), **{section: values})
    assert one_sentence(str(caught.value)), str(caught.value)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("section", "values", "message"), VIEWS_OUT_OF_RANGE, ids=[row[2] for row in VIEWS_OUT_OF_RANGE]
)
def test_view_out_of_range_is_refused_in_one_sentence(section: str, values: dict[str, Any], message: str) -> None:
    views = digits_config().views
    with pytest.raises(PretrainError, match=re.escape(message)) as caught:
        dataclasses.replace(views, **{section: dataclasses.replace(getattr(views, section), **values)})
    assert one_sentence(str(caught.value)), str(caught.value)


@pytest.mark.quick
@pytest.mark.parametrize("seed", [-1, 2**31])
def test_seed_out_of_range_is_refused(seed: int) -> None:
    with pytest.raises(PretrainError, match=f"seed is {seed} but must lie between 0 and 2147483647"):
        digits_config(seed=seed)


@pytest.mark.quick
def test_local_size_does_not_matter_without_local_views() -> None:
    for size in (12, 96):
        assert digits_config(views={"local_size": size, "local_count": 0}).view_count == 2


@pytest.mark.quick
@pytest.mark.parametrize(
    ("method", "chosen", "frozen"),
    [("dino-vmf", None, False), ("dino-vmf", False, False), ("dino", None, True), ("dino", False, False)],
)
def test_prototype_norms_are_frozen_for_dino_unless_told_otherwise(
    method: str, chosen: bool | None, frozen: bool
) -> None:
    config = digits_config(method=method, head={"norm_prototypes": chosen})
    assert config.norm_prototypes is frozen


@pytest.mark.quick
@pytest.mark.parametrize("kind", list(classes_of_configuration()), ids=lambda kind: kind.__name__)
def test_every_field_is_described(kind: type) -> None:
    described = re.findall(r"^ +(\w+):", str(kind.__doc__).split("Attributes:")[1], flags=re.MULTILINE)
    fields = [field.name for field in dataclasses.fields(kind)]
    assert described == fields, f"described {described}, fields {fields}"


@pytest.mark.quick
@pytest.mark.parametrize("kind", list(classes_of_configuration()), ids=lambda kind: kind.__name__)
def test_no_field_can_be_set_afterwards(kind: type) -> None:
    assert kind.__dataclass_params__.frozen, f"{kind.__name__} is not frozen"  # type: ignore[attr-defined]


RATES: list[tuple[dict[str, Any], int, float]] = [
    ({}, 64, 0.000125),  # the default follows the batch: DINO's rule
    ({}, 1024, 0.002),
    ({"base_learning_rate": 1.5e-4, "batch_rule": "linear_256"}, 4096, 0.0024),  # MAE
    ({"base_learning_rate": 0.004, "batch_rule": "sqrt_1024"}, 2048, 0.004 * 2**0.5),  # DINOv2
    ({"learning_rate": 0.001}, 2048, 0.001),  # I-JEPA
]


@pytest.mark.quick
@pytest.mark.parametrize(("given", "batch", "peak"), RATES)
def test_peak_learning_rate_follows_the_batch_by_the_rule_of_its_source(
    given: dict[str, Any], batch: int, peak: float
) -> None:
    assert OptimConfig(**given).peak(batch) == pytest.approx(peak, rel=1e-15)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("layers", "peak"),
    [
        (({"base_learning_rate": 0.1, "batch_rule": "sqrt_1024"}, {"learning_rate": 0.5}), 0.5),
        (({"learning_rate": 0.5}, {"base_learning_rate": 0.1}), 0.1),
        (({"base_learning_rate": 0.1}, {"batch_rule": "sqrt_1024"}), 0.05),
        (({"learning_rate": 0.5}, {"clip": 0.0}), 0.5),
        (
            ({"learning_rate": 0.5, "base_learning_rate": None}, {"base_learning_rate": 0.2}, {"learning_rate": 0.3}),
            0.3,
        ),
    ],
)
def test_later_layer_wins_also_with_the_other_way_to_say_the_rate(
    layers: tuple[dict[str, Any], ...], peak: float
) -> None:
    config = config_of({"data": {"folder": "/", "batch_size": 256}}, *({"optim": layer} for layer in layers))
    assert config.optim.peak(256) == peak
