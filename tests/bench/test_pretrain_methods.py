"""bench.pretrain_methods in runs of two steps: every method, twice the same command, and the tables of what it found."""

from __future__ import annotations

import copy
import functools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.pretrain_methods import (
    METHODS as ALL,
)
from bench.pretrain_methods import (
    Planned,
    finished,
    main,
    methods_plan,
    norms_plan,
    report,
    run_all,
    run_here,
    run_in_a_process,
)
from bench.pretrain_plot import plot_norms
from bench.pretrain_tables import collapsed, methods_table, norms_table
from tests.pretrain.tiny import digits_config
from vmf_bench.json_text import json_text
from vmf_pretrain.data.images import Found, Images
from vmf_pretrain.data.load import load_images

METHODS = [name for name in ALL if not name.endswith("-vmf")]  # those differ from the others by their head alone
TOY: dict[str, Any] = {
    "data.batch_size": 32,
    "views.local_count": 1,
    "backbone.width": 16,
    "backbone.depth": 1,
    "backbone.heads": 1,
    "head.prototypes": 16,
    "head.hidden_dim": 16,
    "head.bottleneck_dim": 8,
    "loss.warmup_teacher_temp_epochs": 0,
    "optim.warmup_epochs": 0,
    "optim.freeze_last_layer_epochs": 0,
    "train.epochs": 1,
    "train.log_every": 1,
    "train.device": "cpu",
    "log.tensorboard": False,
}


@functools.cache
def few_digits(kind: str) -> tuple[Images, Images | None, Found]:
    """Digits enough for two steps."""
    train, held_out, found = load_images(digits_config(data={"kind": kind}))
    assert held_out is not None
    return train.subset(torch.arange(70)), held_out.subset(torch.arange(30)), found


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    """Runs of this process train on few digits, and draw nothing: that takes longer than their steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vmf_pretrain.engine.run.load_images", lambda config, **_: few_digits(config.data.kind))
        patch.setattr("vmf_pretrain.engine.run.draw_plots", lambda *_: None)
        yield


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two steps of each method, as the JSON has them."""
    folder = tmp_path_factory.mktemp("methods")
    plan = methods_plan(["digits"], METHODS, [0], TOY)
    assert run_all(plan, folder, run_here, 1) == []
    result: dict[str, Any] = json.loads(json_text(report(plan, folder)))
    return result


def test_every_method_has_its_accuracies_and_its_own_figure(found: dict[str, Any]) -> None:
    runs = {run["name"]: run for run in found["runs"]}
    assert list(runs) == METHODS
    assert all(run["steps"] == 2 and 0 <= run["linear_untrained"] <= 100 for run in runs.values())
    assert runs["mae"]["own"].keys() == {"relative_loss", "mean_patch_loss"}
    assert runs["ijepa"]["own"].keys() == {"relative_loss", "constant_loss", "target_variance", "image_variance"}
    assert runs["dino"]["own"] == {}
    for name in ("ibot", "dinov2"):
        assert 0 <= runs[name]["own"]["masked_patch_accuracy"] <= 1, name


def test_table_has_a_row_for_each_method_and_says_by_how_much_bounds_are_missed(found: dict[str, Any]) -> None:
    better = copy.deepcopy(found)
    for seed, (run, gain) in enumerate([(dict(found["runs"][0]), 30.0), (dict(found["runs"][0]), 10.0)], 1):
        run |= {"seed": seed, "knn": run["knn_untrained"] + gain, "knn_pixels": run["knn_untrained"] + 15.0}
        better["runs"].append(run)
    better["runs"][0] |= {"knn": better["runs"][0]["knn_untrained"] + 25.0}
    better["runs"][0] |= {"knn_pixels": better["runs"][0]["knn_untrained"] + 18.0}
    lines = methods_table(better).splitlines()
    assert [line.split(" | ")[0] for line in lines if line.startswith("| ")][1:] == [f"| {name}" for name in METHODS]
    (dino,) = (line for line in lines if line.startswith("| dino |"))
    assert "+25.0 over untrained (met: 20), +7.0 over pixels (missed: 8)" in dino
    assert "16 used" in dino
    (mae,) = (line for line in lines if line.startswith("| mae |"))
    assert "of that of the mean patch" in mae


def test_finished_run_is_not_run_again_and_other_settings_are_refused(tmp_path: Path) -> None:
    [planned] = methods_plan(["digits"], ["mae"], [3], TOY)
    started: list[str] = []

    def start(one: Planned, out: Path) -> None:
        started.append(one.folder)
        run_here(one, out)

    assert run_all([planned], tmp_path, start, 1) == run_all([planned], tmp_path, start, 1) == []
    assert started == ["digits-mae-16-3"]
    other = Planned(planned.data, planned.name, planned.seed, {**planned.fields, "optim.learning_rate": 1.0})
    with pytest.raises(SystemExit, match="is a run with other settings"):
        finished(other, tmp_path / other.folder)
    (tmp_path / planned.folder / "summary.json").unlink()  # as if it had been stopped before its end
    assert run_all([planned], tmp_path, start, 1) == []
    assert finished(planned, tmp_path / planned.folder)


def test_run_in_a_process_that_fails_is_said_and_left_out(tmp_path: Path) -> None:
    plan = methods_plan(["digits"], ["mae"], [0], {**TOY, "optim.learning_rate": -1.0})
    [failure] = run_all(plan, tmp_path, run_in_a_process, 1)
    assert "optim.learning_rate is -1.0" in failure
    assert report(plan, tmp_path)["runs"] == []


def test_variants_of_dino_are_compared_by_their_norms(tmp_path: Path) -> None:
    plan = norms_plan(["digits"], [16], [0], TOY)
    assert run_all(plan, tmp_path, run_here, 1) == []
    found = report(plan, tmp_path)
    norms = {run["name"]: run["norms"][-1][1:] for run in found["runs"]}
    assert norms["dino"] == [1.0, 1.0, 1.0]
    free = [norms["dino-vmf"], norms["free norms"]]
    assert all(values == sorted(values) and values != norms["dino"] for values in free), f"no free norms: {norms}"
    table = norms_table(found)
    assert table.count("\n| 16 |") == 3
    assert f"{sum(map(collapsed, found['runs'][:1]))} of 1 |" in table.splitlines()[4]
    both = report(norms_plan(["digits"], [16, 32], [0], TOY), tmp_path)
    assert sorted(fields["head.prototypes"] for fields in both["settings"].values()) == [16] * 3 + [32] * 3
    plot_norms(found, tmp_path / "norms.png")
    assert (tmp_path / "norms.png").read_bytes().startswith(b"\x89PNG")


def test_norms_of_two_kinds_of_images_are_not_mixed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = "bench --norms --out runs --json norms.json --data digits animals"
    monkeypatch.setattr(sys, "argv", command.split())
    with pytest.raises(SystemExit):
        main()
    assert "on one kind of images" in capsys.readouterr().err
