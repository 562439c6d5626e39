"""The command: bad input is one sentence and exit code 2, Ctrl-C is 130 and a command to go on with."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shlex
import signal
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
import yaml

import vmf_kernels
from tests.pretrain.tiny import (
    FEW,
    changed,
    digits_config,
    few_digits,
    few_digits_config,
    one_sentence,
    photos_config,
    save_photos,
    two_classes,
    yaml_of,
)
from vmf_pretrain.cli import COMMANDS, main
from vmf_pretrain.config.file import read_config

PATIENCE = 120  # seconds that a run has to start, or to stop
UNFIT: dict[str, tuple[str, list[str]]] = {
    "unreadable YAML": ("data: [", ["is not YAML"]),
    "python object": ("seed: !!python/object/apply:os.getcwd []", ["is not YAML"]),
    "misspelt key": ("loss: {teacher_tmp: 0.04}", ["loss.teacher_tmp", "did you mean loss.teacher_temp?"]),
    "wrong type": ("train: {epochs: soon}", ["epochs", "soon"]),
    "out of range": ("data: {kind: digits}\nloss: {teacher_temp: 0}", ["loss.teacher_temp is", "greater than 0"]),
    "no folder": ("data: {kind: folder}", ["data.folder is missing"]),
}


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What the command says on stderr when it refuses its input."""
    code = main(arguments)
    said = capsys.readouterr().err
    assert code == 2, f"exit code {code}, said {said!r}"
    assert said.startswith("vmf-pretrain: "), said
    assert one_sentence(said), said
    return said


@pytest.mark.quick
def test_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"vmf-pretrain {vmf_kernels.__version__}\n"


@pytest.mark.quick
def test_every_command_of_the_parser_is_in_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(["no-such-command"], capsys)
    known = said.partition("choose from ")[2].partition(")")[0]
    assert re.findall(r"[\w-]+", known) == list(COMMANDS)


@pytest.mark.parametrize("name", list(UNFIT))
def test_unfit_configuration_is_refused(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, parts = UNFIT[name]
    (tmp_path / "config.yaml").write_text(text)
    said = refused(["fit", "--config", str(tmp_path / "config.yaml"), "--out", str(tmp_path / "run")], capsys)
    missing = [part for part in parts if part not in said]
    assert not missing, f"{said!r} does not say {missing}"
    assert not (tmp_path / "run").exists(), "a refused configuration left a run folder"


def test_missing_configuration_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(["fit", "--config", str(tmp_path / "absent.yaml"), "--out", str(tmp_path / "run")], capsys)
    assert "absent.yaml cannot be read: No such file" in said


def test_fit_without_a_configuration_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(["fit", "--out", str(tmp_path / "run")], capsys)
    assert "fit got no images; expected --data FOLDER, --recipe NAME, --config FILE" in said


@pytest.mark.parametrize("name", ["absent", "empty"])
def test_folder_without_images_is_refused(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    path = yaml_of(photos_config(tmp_path / name), tmp_path / "config.yaml")
    said = refused(["fit", "--config", str(path), "--out", str(tmp_path / "run")], capsys)
    assert str(tmp_path / name) in said
    assert not (tmp_path / "run").exists(), "a refused folder left a run folder"


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_image_is_refused_by_name_where_none_is_allowed(
    workers: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_photos(tmp_path / "photos", 15)
    (tmp_path / "photos" / "notes.jpg").write_text("these are not pixels")
    config = changed(photos_config(tmp_path / "photos"), data={"workers": workers, "max_bad_share": 0.0})
    path = yaml_of(config, tmp_path / "config.yaml")
    said = refused(["fit", "--config", str(path), "--out", str(tmp_path / "run")], capsys)
    assert "cannot be read, more than data.max_bad_share" in said
    assert "notes.jpg" in said


def test_batch_larger_than_the_data_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_photos(tmp_path / "photos", 3)
    path = yaml_of(photos_config(tmp_path / "photos"), tmp_path / "config.yaml")
    said = refused(["fit", "--config", str(path), "--out", str(tmp_path / "run")], capsys)
    assert "data.batch_size is 8 but there are 3 training images" in said


def test_batch_of_one_with_koleo_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_photos(tmp_path / "photos", 3)
    path = yaml_of(photos_config(tmp_path / "photos"), tmp_path / "config.yaml")
    values = yaml.safe_load(path.read_text())
    values["data"]["batch_size"] = 1
    path.write_text(yaml.safe_dump(values))
    said = refused(["fit", "--config", str(path), "--out", str(tmp_path / "run")], capsys)
    assert "batch_size" in said


def test_unknown_backbone_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = yaml_of(digits_config(backbone={"name": "vit_smal"}), tmp_path / "config.yaml")
    said = refused(["fit", "--config", str(path), "--out", str(tmp_path / "run")], capsys)
    assert "backbone.name vit_smal" in said
    assert not (tmp_path / "run").exists(), "a refused backbone left a run folder"


@pytest.mark.quick
@pytest.mark.parametrize("seed", ["-1", "2147483648"])
def test_seed_out_of_range_is_refused(seed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(["demo", "--seed", seed, "--out", str(tmp_path / "run")], capsys)
    assert f"seed is {seed}" in said


def test_existing_run_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("precious")
    said = refused(["demo", "--out", str(tmp_path / "run")], capsys)
    assert f"run folder {tmp_path / 'run'} already exists" in said


@pytest.mark.parametrize("command", ["demo", "fit"])
def test_resuming_without_a_run_is_refused(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused([command, "--resume", "--out", str(tmp_path / "absent")], capsys)
    assert str(tmp_path / "absent") in said


@pytest.mark.parametrize("extra", [["--method", "dino"], ["--config", "other.yaml"]])
def test_resuming_with_other_settings_is_refused(
    extra: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(["fit", "--resume", "--out", str(tmp_path / "run"), *extra], capsys)
    assert f"{extra[0]} does not go with --resume" in said


@pytest.mark.quick
def test_fit_on_a_folder_of_photographs_runs_to_its_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    two_classes(tmp_path / "photos")
    path = yaml_of(photos_config(tmp_path / "photos"), tmp_path / "config.yaml")
    arguments = ["fit", "--config", str(path), "--out", str(tmp_path / "run"), "--seed", "3", "--method", "dino"]
    assert main(arguments) == 0
    figures = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (figures["seed"], figures["method"], figures["steps"]) == (3, "dino", 1)
    assert 0 <= figures["knn"] <= 100
    assert read_config(tmp_path / "run" / "config.yaml").seed == 3
    assert "tensorboard --logdir" in capsys.readouterr().out


def test_runs_without_a_name_get_the_next_free_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("vmf_pretrain.engine.run.draw_plots", lambda *arguments: None)
    two_classes(tmp_path / "photos")
    path = yaml_of(photos_config(tmp_path / "photos"), tmp_path / "config.yaml")
    for _ in range(2):
        assert main(["fit", "--config", str(path)]) == 0
    assert sorted(folder.name for folder in (tmp_path / "runs").iterdir()) == ["fit", "fit-2"]


def records_in(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    return metrics.read_text().count('"loss"') if metrics.exists() else 0


def run_command(arguments: list[str], printed: Path, errors: Path) -> None:
    """The command in a session of its own, as from a terminal, on few digits."""
    os.setsid()
    for number, path in ((1, printed), (2, errors)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        few_digits(patch)
        sys.exit(main(arguments))


def wait_for(process: BaseProcess, run: Path, steps: int) -> None:
    """Until the run has logged some steps."""
    end = time.monotonic() + PATIENCE
    while records_in(run) < steps:
        assert process.is_alive(), f"ended with {process.exitcode}"
        assert time.monotonic() < end, f"no step in {PATIENCE} s"
        time.sleep(0.02)


def test_ctrl_c_stops_cleanly_and_the_command_that_it_prints_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = few_digits_config(data={"batch_size": 4, "workers": 2}, evaluate={"every": 2})
    steps = 2 * (FEW // 4)
    path, out = yaml_of(config, tmp_path / "config.yaml"), tmp_path / "run"
    arguments = ["fit", "--config", str(path), "--out", str(out)]
    files = tmp_path / "printed", tmp_path / "errors"
    # forked from a server that has imported what a command takes seconds for
    process = multiprocessing.get_context("forkserver").Process(target=run_command, args=(arguments, *files))
    process.start()
    try:
        wait_for(process, out, steps=3)
        os.killpg(int(str(process.pid)), signal.SIGINT)  # as a terminal does: the workers get it too
        process.join(PATIENCE)
    finally:
        process.kill()
    printed, errors = (file.read_text() for file in files)
    assert process.exitcode == 130, f"exit code {process.exitcode}: {errors[-500:]}"
    assert "Traceback" not in errors, errors
    assert list((out / "checkpoints").glob("step_*"))
    assert records_in(out) < steps, "the run was over before the signal"
    command = shlex.split(printed.split("Go on with: vmf-pretrain ")[1].splitlines()[0])
    monkeypatch.setattr("vmf_pretrain.engine.run.draw_plots", lambda *arguments: None)
    few_digits(monkeypatch)
    assert main(command) == 0
    assert records_in(out) == steps
    assert json.loads((out / "summary.json").read_text())["steps"] == steps
