"""The verdict on runs: those that are forced to collapse are named rightly within 200 steps, and one that learns never is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest

from tests.pretrain.tiny import batch_of, changed, digits_config, loop_on
from vmf_pretrain.config.run import Config
from vmf_pretrain.report.bands import SHORT, bands
from vmf_pretrain.report.caution import not_learning
from vmf_pretrain.report.verdict import Verdict, verdict

WITHIN = 200  # steps
LOGGED = 10  # steps from one record to the next
IMAGES = 1280
HEALTHY = 90  # steps, of which the first two epochs are the warm-up of the rate
SMALL = digits_config(data={"batch_size": 64}, views={"local_count": 0}, train={"epochs": 12})
UNCENTRED: Mapping[str, Any] = {"center_momentum": 0.999999, "center_start": "zero"}
JEPA = digits_config(
    method="ijepa",
    data={"batch_size": 32},
    views={"local_count": 0},
    backbone={"patch_size": 2},
    predictor={"width": 16, "depth": 1},
    blocks={"min_keep": 4, "edges": "fixed"},
    loss={"warmup_teacher_temp_epochs": 0},
    optim={"counting": "jepa", "clip": 0.0, "freeze_last_layer_epochs": 0},
    train={"epochs": 12},
)


def trained(config: Config, steps: int, *, until_fault: bool = True) -> tuple[Verdict, list[dict[str, Any]]]:
    """The first fault that is named in a run of digits, or the last verdict; and its records."""
    loop, batches = loop_on(config, IMAGES)
    records: list[dict[str, Any]] = []
    found = verdict(records, config)
    for step in range(min(steps, len(batches))):
        logged = (step + 1) % LOGGED == 0
        (taken,) = loop.step(step, batch_of(batches, step), log=logged)
        if logged:
            epoch = step // batches.steps_per_epoch + 1
            records.append({"step": step + 1, "epoch": epoch, **taken.numbers})
            found = verdict(records, config)
            if found.fault and until_fault:
                break
    return found, records


QUICK = changed(SMALL, optim={"teacher_momentum": 0.9})  # a teacher that follows soon is soon where it goes
PATCHES = changed(
    QUICK,
    method="dinov2",
    data={"batch_size": 32},
    backbone={"patch_size": 4},
    head={"patches": "own_head"},
    masks={"shares": (0.1, 0.3)},
    loss={"koleo_weight": 0.1},
    optim={"teacher_momentum": 0.8},
)
FORCED = {
    "no centring: one-hot": (
        changed(QUICK, loss={**UNCENTRED, "koleo_weight": 0.0}),
        "one-hot collapse",
        ("teacher_entropy", "loss.center_momentum"),
    ),
    "no sharpening: uniform": (
        changed(QUICK, loss={"teacher_temp": 0.1, "warmup_teacher_temp": 0.1, "koleo_weight": 0.0}),
        "uniform collapse",
        ("prototypes_in_use", "loss.teacher_temp"),
    ),
    "no centring, KoLeo: dead head": (
        changed(QUICK, loss={**UNCENTRED, "koleo_weight": 0.05}),
        "dead head",
        ("feature_rank", "loss.center_momentum"),
    ),
    "no centring of the patches alone: patch collapse": (
        changed(PATCHES, loss={"patch_center_momentum": 0.999999, "center_start": "zero"}),
        "patch collapse",
        ("patch_prototypes_in_use", "loss.patch_center_momentum"),
    ),
    "weights decayed away: constant predictor": (
        changed(JEPA, optim={"warmup_epochs": 0, "weight_decay": 100.0, "final_weight_decay": 100.0}),
        "constant predictor",
        ("predicted_variance", "optim.weight_decay"),
    ),
    "rate a thousand times too large: diverging": (
        changed(SMALL, optim={"learning_rate": 3.0, "warmup_epochs": 0, "freeze_last_layer_epochs": 0}),
        "diverging",
        ("loss", "optim.learning_rate"),
    ),
}


@pytest.mark.parametrize(("config", "kind", "said"), FORCED.values(), ids=FORCED)
def test_forced_collapse_is_named_within_200_steps_with_evidence_and_advice(
    config: Config, kind: str, said: tuple[str, str]
) -> None:
    found, records = trained(config, WITHIN)
    assert found.kind == kind, f"{found} after {records[-1]}"
    assert found.step <= WITHIN
    figure, setting = said
    assert any(figure in line for line in found.evidence), found.evidence
    assert any(setting in line for line in found.advice), found.advice


@pytest.mark.parametrize("config", [SMALL, JEPA], ids=["dino-vmf", "ijepa"])
def test_run_that_learns_is_never_called_a_collapse(config: Config) -> None:
    _, records = trained(changed(config, optim={"warmup_epochs": 2}), HEALTHY, until_fault=False)
    found = [verdict(records[: count + 1], config) for count in range(len(records))]
    assert {each.kind for each in found} <= {"too short to say", "still learning", "alive"}, found
    assert not [each for each in found if each.advice]


def run_of(count: int = 40, /, **figures: Any) -> list[dict[str, Any]]:
    """Records of a run whose figures stay: a number, or one for each record."""
    return [
        {"step": LOGGED * (place + 1), "epoch": place + 1}
        | {name: value[place] if isinstance(value, list) else value for name, value in figures.items()}
        for place in range(count)
    ]


ALIVE = {"loss": 3.0, "mutual_information": 1.0, "feature_rank": 5.0, "feature_variance": 0.5, "kl": 1.0}
PATCHES_TOLD = {"patch_teacher_entropy": 0.5, "patch_kl": 1.0, "masked_patch_accuracy": 0.5}
ALIKE = {**ALIVE, **PATCHES_TOLD, "patch_mutual_information": [1.0] * 20 + [0.01] * 20}
TOLD: dict[str, tuple[list[dict[str, Any]], str]] = {
    "nothing": ([], "too short to say"),
    "four records": (run_of(4, **ALIVE), "too short to say"),
    "settled": (run_of(**ALIVE), "alive"),
    "still falling": (run_of(**{**ALIVE, "mutual_information": [1 + n / 40 for n in range(40)]}), "still learning"),
    "not finite": (run_of(**{**ALIVE, "loss": [3.0] * 37 + [None] * 3}), "diverging"),
    "above its start": (run_of(**{**ALIVE, "loss": [3.0] * 20 + [4.0] * 20}), "diverging"),
    "worse than a constant": (run_of(loss=0.5, relative_loss=[0.5] * 20 + [1.2] * 20), "diverging"),
    "one odd batch": (run_of(**{**ALIVE, "mutual_information": [1.0] * 39 + [0.0]}), "alive"),
    "few directions": (run_of(**{**ALIVE, "feature_rank": [5.0] * 30 + [1.1] * 10}), "rank collapse"),
    "same features": (run_of(**{**ALIVE, "feature_variance": [0.5] * 30 + [1e-5] * 10}), "rank collapse"),
    "patches alike": (run_of(**ALIKE, patch_prototypes_in_use=8.0), "patch collapse"),
    "patches flat": (
        run_of(**{**ALIKE, "patch_teacher_entropy": 3.46}, patch_prototypes_in_use=32.0),
        "patch collapse",
    ),
    "both": (run_of(**{**ALIKE, "mutual_information": [1.0] * 20 + [0.0] * 20}), "dead head"),
    "no patch is masked": (
        run_of(**ALIVE, **dict.fromkeys(PATCHES_TOLD, 0.0), patch_mutual_information=0.0, patch_prototypes_in_use=1.0),
        "alive",
    ),
    "same targets": (
        run_of(loss=[0.5] * 20 + [1e-6] * 20, target_variance=[0.1] * 20 + [1e-6] * 20, predicted_variance=1e-7),
        "constant predictor",
    ),
}


@pytest.mark.quick
@pytest.mark.parametrize(("records", "kind"), TOLD.values(), ids=TOLD)
def test_verdict_on_figures_that_are_given(records: list[dict[str, Any]], kind: str) -> None:
    found = verdict(records, changed(SMALL, optim={"warmup_epochs": 1}))
    assert found.kind == kind, found
    assert found.fault == bool(found.advice)
    assert found.plain()["kind"] == kind


@pytest.mark.quick
def test_head_that_tells_nothing_yet_is_no_collapse_in_the_warm_up() -> None:
    dead = run_of(**{**ALIVE, "mutual_information": 0.01, "teacher_entropy": math.log(32), "prototypes_in_use": 32.0})
    long, short = (changed(SMALL, optim={"warmup_epochs": epochs}, train={"epochs": 60}) for epochs in (50, 1))
    assert verdict(dead, long).kind == "still learning"
    assert verdict(dead, short).kind == "dead head", "its features are as at the start"
    patches = run_of(**ALIVE, **PATCHES_TOLD, patch_mutual_information=0.01, patch_prototypes_in_use=1.0)
    late, early = (changed(short, masks={"start_epoch": epoch}) for epoch in (39, 1))
    assert verdict(patches, late).kind == "alive", "their head has just begun"
    assert verdict(patches, early).kind == "patch collapse"


@pytest.mark.quick
@pytest.mark.parametrize(
    ("figures", "kind"),
    [
        ({"kl": 1.0, "mutual_information": 1.0}, "kl does not fall"),
        ({"kl": 1.0, "mutual_information": [1 + n / 40 for n in range(40)]}, None),
        ({"kl": [2.0] * 20 + [1.0] * 20, "mutual_information": 1.0}, None),
        ({"relative_loss": 0.99}, "predicts no better than a constant"),
        ({"relative_loss": 0.5}, None),
    ],
)
def test_run_that_learns_nothing_is_a_caution(figures: dict[str, Any], kind: str | None) -> None:
    found = not_learning(run_of(loss=3.0, **figures), SMALL)
    assert (None if found is None else found.kind) == kind


@pytest.mark.quick
def test_bands_hold_the_values_of_a_collapse_and_not_those_of_a_run_that_learns() -> None:
    dead = {"mutual_information": 0.0, "feature_rank": 1.0, "predicted_variance": 0.0}
    found = {band.figure for band in bands(SMALL) if band.figure in dead and band.holds(dead[band.figure])}
    assert found == dead.keys()
    assert not [band for band in bands(SMALL) if band.figure in ALIVE and band.holds(ALIVE[band.figure])]
    assert SHORT <= WITHIN // 2
