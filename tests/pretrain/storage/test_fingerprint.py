"""What may change when a run goes on: what is refused, what is said, and what neither."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest
import torch

import vmf_kernels
from tests.pretrain.tiny import one_sentence
from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.storage.fingerprint import Fingerprint, code_version, config_changes, require_resumable

pytestmark = pytest.mark.quick

NOW = Fingerprint.of(
    images={"count": 100, "sha256": "ab"},
    held_out=None,
    batch=64,
    views={"global_views": 2, "sizes": (224, 96)},
    seed=1,
    method="dino",
    optimizer="AdamW",
    network={"head.weight": torch.zeros(3, 4), "head.bias": torch.zeros(3)},
)

CHANGES: list[tuple[str, dict[str, Any], str | None, str]] = [
    # what differs, the fields, the kind that allows it, what is said
    ("images", {"images": {"count": 99, "sha256": "ab"}}, "data", "images: count was 100 and is 99"),
    ("content", {"images": {"count": 100, "sha256": "cd"}}, "data", "images: sha256 was 'ab' and is 'cd'"),
    ("held out", {"held_out": {"count": 5}}, "data", "held_out was None and is .*5"),
    ("batch", {"batch": 32}, "batch", "batch was 64 and is 32"),
    ("views", {"views": {"global_views": 1, "sizes": [224, 96]}}, "views", "views: global_views was 2 and is 1"),
    ("seed", {"seed": 2}, "seed", "seed was 1 and is 2"),
    ("method", {"method": "mae"}, None, "method was 'dino' and is 'mae'"),
    ("optimizer", {"optimizer": "SGD"}, None, "optimizer was 'AdamW' and is 'SGD'"),
    (
        "network",
        {"network": {"head.weight": [5, 4]}},
        None,
        r"head.weight was \[3, 4\] and is \[5, 4\], head.bias was \[3\]",
    ),
]


def stored(fingerprint: Fingerprint) -> Any:
    return json.loads(json.dumps(fingerprint.plain()))


def resumed(now: Fingerprint, **arguments: Any) -> list[str]:
    return require_resumable(stored(NOW), now, **{"step": 3, "steps": 8, **arguments})


def test_the_same_run_goes_on_without_a_word() -> None:
    assert resumed(NOW) == []
    assert resumed(NOW, step=8) == [], "at the end"


@pytest.mark.parametrize(("fields", "kind", "said"), [change[1:] for change in CHANGES], ids=[c[0] for c in CHANGES])
def test_a_changed_meaning_of_the_steps_is_refused_unless_allowed(fields: Any, kind: str | None, said: str) -> None:
    now = replace(NOW, **fields)
    with pytest.raises(PretrainError, match=said) as caught:
        resumed(now, allowed={"data", "batch", "views", "seed"} - {kind})
    advice = f"--allow-changed {kind}" if kind else "start a new run with another --out"
    assert advice in str(caught.value), str(caught.value)
    if kind is not None:
        assert one_sentence(str(caught.value)), str(caught.value)
        [sentence] = resumed(now, allowed={kind})
        assert re.search(said, sentence), sentence


def test_other_versions_are_said_and_not_refused() -> None:
    said = resumed(replace(NOW, code="0.0.1", torch="2.99"))
    assert len(said) == 2, said
    assert "code was" in said[0], said
    assert "torch was" in said[1], said


def test_a_field_that_a_later_version_has_added_is_not_compared() -> None:
    assert resumed(replace(NOW, views={**NOW.views, "new": {"flip": 0.5}})) == []


def test_all_differences_are_in_one_error() -> None:
    with pytest.raises(PretrainError, match=r"batch was.*seed was.*--allow-changed batch --allow-changed seed"):
        resumed(replace(NOW, batch=1, seed=9))


def test_step_12_of_8_is_refused() -> None:
    with pytest.raises(PretrainError, match=r"is of step 12, but this run has only 8 steps; raise train.epochs"):
        resumed(NOW, step=12)


def test_a_checkpoint_without_a_fingerprint_goes_on_with_a_sentence() -> None:
    [sentence] = require_resumable(None, NOW, step=3, steps=8)
    assert "does not say which images" in sentence, sentence
    with pytest.raises(PretrainError, match="step 12"):
        require_resumable(None, NOW, step=12, steps=8)


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(
        PretrainError, match="--allow-changed dat is unknown; expected some of data, batch, views, seed"
    ):
        resumed(NOW, allowed={"dat"})


def test_every_changed_field_of_the_configuration_is_said() -> None:
    before = {"seed": 1, "optim": {"learning_rate": 0.1, "clip": 3.0, "gone": 1}, "sizes": [1, 2]}
    now = {"seed": 1, "optim": {"learning_rate": 0.2, "clip": 3.0, "new": None}, "sizes": (1, 3)}
    assert config_changes(before, now) == [
        "optim.learning_rate was 0.1 and is 0.2.",
        "optim.new is None and was not known before.",
        "optim.gone was 1 and is no longer known.",
        "sizes was [1, 2] and is [1, 3].",
    ]
    assert config_changes(None, now) == []
    assert config_changes(json.loads(json.dumps(now)), now) == []


def test_the_code_has_a_version() -> None:
    assert code_version().split(" at ")[0] == vmf_kernels.__version__
