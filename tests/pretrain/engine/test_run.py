"""Whole runs: their files, and that a stopped run continues as if it had not been stopped."""

from __future__ import annotations

import dataclasses
import json
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from tests.pretrain.engine.stopping import before_step, resumed, state_of, stopped_at, summary_of, unlocked, untimed
from tests.pretrain.tiny import (
    SUMMARY_KEYS,
    a_run,
    changed,
    copied,
    differing,
    dino_of,
    few_digits,
    few_digits_config,
    photos_config,
    save_photos,
    two_classes,
)
from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.config.file import read_config
from vmf_pretrain.config.run import Config
from vmf_pretrain.data.batch import Batch
from vmf_pretrain.engine.run import Run
from vmf_pretrain.evaluation.judge import BASELINES
from vmf_pretrain.report.figures import draw_plots
from vmf_pretrain.storage.lines import read_lines
from vmf_pretrain.storage.metrics import read_metrics

STEPS = 10  # of the digits' configuration
PROMISED = [
    "config.yaml",
    "metrics.jsonl",
    "summary.json",
    *(f"weights/{name}.{kind}" for name in ("last", "best") for kind in ("safetensors", "json")),
    *(f"plots/{name}.png" for name in ("loss", "knn", "usage", "kappa", "attention")),
]


@pytest.fixture(scope="module", autouse=True)
def draw() -> Iterator[Callable[..., None]]:
    """Drawing, which takes longer than these runs: they go without it, and on few digits."""
    with pytest.MonkeyPatch.context() as patch:
        few_digits(patch)
        patch.setattr("vmf_pretrain.engine.run.draw_plots", lambda *arguments: None)
        yield draw_plots


@pytest.fixture
def plots(draw: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmf_pretrain.engine.run.draw_plots", draw)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run on the digits that nothing stopped; not to be changed."""
    return whole_run(few_digits_config(), tmp_path_factory.mktemp("whole") / "run")


def whole_run(config: Config, out: Path) -> Run:
    run, _ = a_run(config, out)
    assert run.train() == 0
    return run


RESUMPTIONS: dict[str, tuple[dict[str, Any], list[int]]] = {
    "stopped twice, at an epoch's end too": ({}, [4, 7]),
    "drop path": ({"backbone": {"drop_path": 0.4, "depth": 2}, "data": {"workers": 2}}, [6]),
    "dino, which centres logits": ({"method": "dino", "loss": {"center_start": "zero"}}, [6]),
    "checkpoints seldom, prototypes frozen": (
        {"train": {"checkpoint_every": 5}, "optim": {"freeze_last_layer_epochs": 2}},
        [3],
    ),
}


@pytest.mark.parametrize("name", list(RESUMPTIONS))
def test_run_that_was_stopped_goes_on_bit_for_bit_as_if_it_had_not_been(name: str, whole: Run, tmp_path: Path) -> None:
    sections, stops = RESUMPTIONS[name]
    if sections:
        whole = whole_run(few_digits_config(**sections), tmp_path / "whole")
    run, _ = a_run(few_digits_config(**sections), tmp_path / "stopped")
    for stop in stops:
        assert stopped_at(run, stop) == 130
        assert run.step == stop + 1, f"stopped after {run.step} steps, asked for {stop + 1}"
        run = resumed(tmp_path / "stopped")
    assert run.train() == 0
    assert differing(state_of(run), state_of(whole)) == []
    assert untimed(run) == untimed(whole)
    ours, theirs = ({**summary_of(each), "seconds": 0} for each in (run, whole))
    assert ours == theirs


@pytest.mark.parametrize("workers", [0, 2])
def test_run_on_a_folder_goes_on_bit_for_bit_too(workers: int, tmp_path: Path) -> None:
    two_classes(tmp_path / "photos", each=16)
    config = changed(photos_config(tmp_path / "photos"), train={"epochs": 2}, data={"workers": workers})
    whole = whole_run(config, tmp_path / "whole")
    run, _ = a_run(config, tmp_path / "stopped")
    assert stopped_at(run, 3) == 130
    run = resumed(tmp_path / "stopped")
    run.train()
    assert differing(state_of(run), state_of(whole)) == []
    assert untimed(run) == untimed(whole)


def test_run_that_crashed_repeats_the_steps_since_its_checkpoint(whole: Run, tmp_path: Path) -> None:
    def crash() -> NoReturn:
        raise PretrainError("the loss is nan.")

    run, _ = a_run(few_digits_config(), tmp_path / "crashed")
    with pytest.raises(PretrainError, match="the loss is nan"):
        before_step(run, 8, crash).train()
    run = resumed(tmp_path / "crashed")
    assert run.step == 5, f"the checkpoint is of step {run.step}"
    run.train()
    assert differing(state_of(run), state_of(whole)) == []
    assert untimed(run) == untimed(whole)


def lose_centre(run: Run) -> None:
    dino_of(run.loop).loss.centering.center.zero_()


def lose_optimizer(run: Run) -> None:
    run.loop.optimizer.state.clear()


def lose_teacher(run: Run) -> None:
    dino_of(run.loop).teacher.load_state_dict(dino_of(run.loop).student.state_dict())


def lose_place(run: Run) -> None:
    run.step -= 1


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was stopped."""
    out = tmp_path_factory.mktemp("stopped") / "run"
    stopped_at(a_run(few_digits_config(), out)[0], 6)
    return out


@pytest.mark.parametrize("lose", [lose_centre, lose_optimizer, lose_teacher, lose_place])
def test_each_part_of_a_checkpoint_is_needed(lose: Callable[[Run], None], stopped: Path) -> None:
    exact, lacking = (unlocked(resumed(stopped)) for _ in range(2))
    lose(lacking)
    for each in (exact, lacking):
        for step in (each.step, each.step + 1):
            batch = each.batches[step]
            assert isinstance(batch, Batch)
            each.loop.step(step, batch)
    students = [copied(dict(dino_of(each.loop).student.named_parameters())) for each in (exact, lacking)]
    assert differing(*students), f"{lose.__name__} changes nothing: the comparison cannot fail"


def test_another_seed_gives_another_run(tmp_path: Path) -> None:
    unfrozen = few_digits_config(optim={"freeze_last_layer_epochs": 0}, train={"epochs": 1})
    runs = [a_run(changed(unfrozen, seed=seed), tmp_path / str(seed))[0] for seed in (0, 1)]
    for run in runs:
        run.train()
    students = [copied(dict(dino_of(run.loop).student.named_parameters())) for run in runs]
    same = students[0].keys() - set(differing(*students))
    assert not same, f"weights that no seed changes: {same}"


def test_signal_during_the_last_step_does_not_undo_the_run(tmp_path: Path) -> None:
    run, _ = a_run(few_digits_config(), tmp_path / "run")
    assert stopped_at(run, STEPS - 1) == 0
    assert run.folder.summary.exists()


def test_finished_run_that_is_resumed_is_only_judged_again(whole: Run, tmp_path: Path) -> None:
    shutil.copytree(whole.folder.path, tmp_path / "run")
    again = resumed(tmp_path / "run")
    again.folder.summary.unlink()
    assert again.train() == 0
    assert differing(state_of(again), state_of(whole)) == []
    assert untimed(again) == untimed(whole)
    assert {**summary_of(again), "seconds": 0} == {**summary_of(whole), "seconds": 0}


def test_seconds_of_interrupted_parts_add_up(tmp_path: Path) -> None:
    run, _ = a_run(few_digits_config(), tmp_path / "run")
    run.facts["seconds_before"] = 1000.0
    stopped_at(run, 2)
    again = resumed(tmp_path / "run")
    again.train()
    assert 1000 < summary_of(again)["seconds"] < 1100, f"{summary_of(again)['seconds']} s"


def test_nothing_is_pickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> NoReturn:
        raise AssertionError("pickle")

    for module, names in ((torch, ("save", "load")), (pickle, ("dump", "dumps", "load", "loads", "Unpickler"))):
        for name in names:
            monkeypatch.setattr(module, name, refuse)
    run, _ = a_run(few_digits_config(), tmp_path / "run")
    assert stopped_at(run, 6) == 130
    assert resumed(tmp_path / "run").train() == 0
    suffixes = {path.suffix for path in (tmp_path / "run").rglob("*") if path.is_file() and "tfevents" not in path.name}
    assert suffixes == {".yaml", ".jsonl", ".json", ".safetensors", ""}, f"files of kinds {suffixes}"


@pytest.mark.usefixtures("plots")
def test_run_leaves_everything_it_promises(tmp_path: Path) -> None:
    run, printed = a_run(few_digits_config(), tmp_path / "run")
    assert run.train() == 0
    missing = [name for name in PROMISED if not (tmp_path / "run" / name).stat().st_size]
    events = list((tmp_path / "run" / "tensorboard").glob("events.out.tfevents.*"))
    figures = summary_of(run)
    assert not missing
    assert events
    assert not SUMMARY_KEYS - figures.keys(), f"summary.json lacks {SUMMARY_KEYS - figures.keys()}"
    assert all(isinstance(figures[key], int | float) for key in SUMMARY_KEYS - {"method"}), figures
    assert f"{figures['knn']:.1f}" in printed.getvalue()
    assert str(tmp_path / "run") in printed.getvalue()
    assert "Next: vmf-pretrain demo --method dino\n" in printed.getvalue()
    assert read_config(tmp_path / "run" / "config.yaml") == few_digits_config()


def test_metrics_hold_each_step_and_each_evaluation(whole: Run) -> None:
    records = read_metrics(whole.folder)
    steps = [record["step"] for record in records if "loss" in record]
    evaluations = [(record["step"], record["epoch"]) for record in records[1:] if "knn" in record]
    wanted = {"epoch", "kl", "teacher_entropy", "student_entropy", "mutual_information", "learning_rate", "seconds"}
    wanted |= {"least_norm", "median_norm", "largest_norm"}
    assert steps == list(range(1, STEPS + 1))
    assert records[0] == {"step": 0, "knn": summary_of(whole)["knn_untrained"]}
    assert evaluations == [(5, 1), (10, 2)]
    assert not wanted - records[1].keys(), f"a record lacks {wanted - records[1].keys()}"


@pytest.mark.parametrize("method", ["dino", "dino-vmf"])
def test_both_methods_run_under_autocast(method: str, tmp_path: Path) -> None:
    config = few_digits_config(method=method, train={"epochs": 1, "precision": "bf16"})
    run, _ = a_run(config, tmp_path / "run")
    assert run.train() == 0
    losses = [record["loss"] for record in read_metrics(run.folder) if "loss" in record]
    assert all(isinstance(loss, float) and 0 < loss < 20 for loss in losses), losses
    assert {value.dtype for value in dino_of(run.loop).student.parameters()} == {torch.float32}


@pytest.mark.usefixtures("plots")
def test_run_without_labels_has_no_accuracy_and_still_everything_else(tmp_path: Path) -> None:
    save_photos(tmp_path / "photos", 16)
    run, printed = a_run(photos_config(tmp_path / "photos"), tmp_path / "run")
    assert run.train() == 0
    figures = summary_of(run)
    assert [figures[name] for name in ("knn", "linear", *BASELINES)] == [None] * 6
    assert isinstance(figures["mutual_information"], float)
    assert "no labels" in printed.getvalue()
    missing = [name for name in PROMISED if not (tmp_path / "run" / name).exists()]
    assert missing == [], f"missing {missing}"


@pytest.mark.parametrize(("share", "ends"), [(0.01, False), (0.0, True)])
def test_unreadable_training_image_is_listed_and_ends_the_run_beyond_the_limit(
    share: float, ends: bool, tmp_path: Path
) -> None:
    save_photos(tmp_path / "photos", 15)
    (tmp_path / "photos" / "notes.jpg").write_text("these are not pixels")
    run, _ = a_run(photos_config(tmp_path / "photos", data={"max_bad_share": share}), tmp_path / "run")
    if ends:
        with pytest.raises(
            PretrainError, match=r"readings met .* cannot be read, more than data.max_bad_share.*notes\.jpg"
        ):
            run.train()
    else:
        assert run.train() == 0
        assert summary_of(run)["bad_images"] >= 1
    (first, *_) = read_lines(run.folder.bad_files)
    assert first["name"].endswith("notes.jpg"), first
    assert set(first) == {"name", "reason", "step"}


def test_existing_run_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "summary.json").write_text("{}")
    with pytest.raises(PretrainError, match="already exists"):
        a_run(few_digits_config(), tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["summary.json"]


def test_checkpoint_of_another_network_is_refused(tmp_path: Path) -> None:
    run, _ = a_run(few_digits_config(), tmp_path / "run")
    stopped_at(run, 2)
    with pytest.raises(PretrainError, match="of another run: The network has other shapes") as caught:
        a_run(few_digits_config(head={"prototypes": 33}), tmp_path / "run", resume=True)
    assert "\n" not in str(caught.value)


def test_another_seed_that_is_allowed_is_said_once(tmp_path: Path) -> None:
    stopped_at(a_run(few_digits_config(), tmp_path / "run")[0], 2)
    seeded = dataclasses.replace(few_digits_config(), seed=4)
    _, printed = a_run(seeded, tmp_path / "run", resume=True, allow_changed={"seed"})
    assert printed.getvalue().count("seed was 0 and is 4.") == 1, printed.getvalue()


def test_checkpoint_that_does_not_say_what_its_network_is_fed_is_judged_anew(whole: Run, tmp_path: Path) -> None:
    run, _ = a_run(few_digits_config(), tmp_path / "run")
    run.facts = {
        "seconds_before": 0.0,
        "best_knn": 99.0,
        "knn_pixels": 1.0,
        "knn_untrained": 2.0,
    }  # the first version's
    stopped_at(run, 6)
    again, printed = a_run(few_digits_config(), tmp_path / "run", resume=True)
    said = printed.getvalue()
    assert "does not say what its network is fed" in said, said
    assert again.facts["best_knn"] is None
    assert {name: again.facts[name] for name in BASELINES} == {name: whole.facts[name] for name in BASELINES}
    again.train()
    assert differing(state_of(again), state_of(whole)) == []


def test_network_that_was_fed_otherwise_is_not_gone_on_with(tmp_path: Path) -> None:
    run, _ = a_run(few_digits_config(), tmp_path / "run")
    run.facts["input"] = {**run.facts["input"], "mean": [0.5]}
    stopped_at(run, 2)
    with pytest.raises(PretrainError, match=r"fed with .*mean=\(0\.5,\).* asks for .*mean=\(0\.0,\)"):
        resumed(tmp_path / "run")


def test_no_more_checkpoints_are_kept_than_asked_for(tmp_path: Path) -> None:
    run, _ = a_run(few_digits_config(train={"epochs": 4, "keep_checkpoints": 2}), tmp_path / "run")
    run.train()
    kept = sorted(path.name for path in run.folder.checkpoints.glob("step_*"))
    assert kept == ["step_00000015", "step_00000020"]


def test_run_that_fails_in_its_first_step_can_be_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = a_run(few_digits_config(), tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(run.loop, "step", failing_step)
        with pytest.raises(PretrainError, match="not a number"):
            run.train()
    assert resumed(tmp_path / "run").step == 0


def failing_step(step: int, batch: Batch, **options: object) -> NoReturn:
    raise PretrainError("the loss is not a number.")


def test_refused_run_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmf_pretrain.evaluation.judge.Judge.baselines", interrupted)
    with pytest.raises(KeyboardInterrupt):
        a_run(few_digits_config(), tmp_path / "run")
    assert not (tmp_path / "run").exists(), "a run stopped before it began left its folder"


def interrupted(judge: object, untrained: object) -> NoReturn:
    raise KeyboardInterrupt


@pytest.mark.parametrize("best", ["few_shot", "few_shot/pets"])
def test_the_figure_asked_for_chooses_the_best_weights(
    best: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = {"online": ("linear", "few_shot"), "best": best, "max_images": 60}
    figures = iter([{"few_shot": 2.0, "few_shot/pets": 1.0}, {"few_shot": 1.0, "few_shot/pets": 2.0}])
    if "/" in best:
        wanted["sets"] = (str(two_classes(tmp_path / "pets")),)
        monkeypatch.setattr("vmf_pretrain.evaluation.judge.Judge.online", lambda judge, backbone: next(figures))
    run = whole_run(few_digits_config(evaluate=wanted), tmp_path / "run")
    found = [record[best] for record in read_metrics(run.folder) if best in record]
    assert len(found) == 2
    assert run.facts[f"best_{best}"] == max(found)
    about = json.loads((run.folder.weights / "best.json").read_text())
    assert about["step"] == (5, 10)[found.index(max(found))]
