"""The folder of a run: made once, and its history kept."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.storage.metrics import MetricsLog, read_metrics
from vmf_pretrain.storage.run_folder import RunFolder

pytestmark = pytest.mark.quick


def folder_with(records: int, path: Path) -> RunFolder:
    folder = RunFolder.create(path)
    log = MetricsLog(folder, 0)
    for step in range(1, records + 1):
        log.write({"step": step, "loss": step / 2})
    log.close()
    return folder


def test_new_folder_is_made_with_its_parents_and_an_empty_one_is_taken(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "some" / "where", tmp_path / "empty"):
        folder = RunFolder.create(path)
        assert all(part.is_dir() for part in (folder.weights, folder.plots, folder.checkpoints))


@pytest.mark.parametrize("kind", ["folder with a file", "file"])
def test_existing_folder_is_refused_and_left_alone(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "run"
    held = path if kind == "file" else path / "thesis.txt"
    held.parent.mkdir(exist_ok=True)
    held.write_text("precious")
    with pytest.raises(PretrainError, match=r"already exists.*; choose another with --out\.$"):
        RunFolder.create(path)
    assert held.read_text() == "precious"


def test_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PretrainError, match="cannot be made"):
        RunFolder.create(tmp_path / "file" / "run")


def test_folder_without_a_run_cannot_be_reopened(tmp_path: Path) -> None:
    with pytest.raises(PretrainError, match=r"holds no run to resume; expected a config.yaml in it") as caught:
        RunFolder.reopen(tmp_path / "absent")
    assert str(tmp_path / "absent") in str(caught.value)
    assert not (tmp_path / "absent").exists(), "a failed reopening made a folder"


def test_records_come_back_as_they_were_written(tmp_path: Path) -> None:
    assert read_metrics(folder_with(2, tmp_path / "run")) == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 1.0}]


def test_each_record_is_on_disk_as_soon_as_it_is_written(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run")
    MetricsLog(folder, 0).write({"step": 1, "loss": 0.5})
    assert folder.metrics.read_text() == '{"step": 1, "loss": 0.5}\n'


def test_number_that_is_not_finite_becomes_null(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run")
    MetricsLog(folder, 0).write({"step": 1, "loss": math.nan, "kl": math.inf, "knn": None})
    assert read_metrics(folder) == [{"step": 1, "loss": None, "kl": None, "knn": None}]


def test_resumed_log_drops_the_steps_that_will_be_repeated_and_keeps_the_rest(tmp_path: Path) -> None:
    folder = folder_with(5, tmp_path / "run")
    MetricsLog(folder, 3).write({"step": 4, "loss": 7.0})
    assert [record["loss"] for record in read_metrics(folder)] == [0.5, 1.0, 1.5, 7.0]


def test_last_line_cut_short_by_a_crash_is_left_out_and_then_written_over(tmp_path: Path) -> None:
    folder = folder_with(3, tmp_path / "run")
    with folder.metrics.open("a") as lines:
        lines.write('{"step": 4, "lo')
    assert [record["step"] for record in read_metrics(folder)] == [1, 2, 3]
    MetricsLog(folder, 3).write({"step": 4, "loss": 2.0})
    assert [json.loads(line)["step"] for line in folder.metrics.read_text().splitlines()] == [1, 2, 3, 4]


def test_run_without_records_has_no_metrics(tmp_path: Path) -> None:
    assert read_metrics(RunFolder.create(tmp_path / "run")) == []


def test_tensorboard_shows_each_step_once_after_a_resumption(tmp_path: Path) -> None:
    folder = folder_with(5, tmp_path / "run")
    log = MetricsLog(folder, 3)
    for step in (4, 5, 6):
        log.write({"step": step, "loss": 10.0 * step, "note": "text"})
    log.close()
    events = EventAccumulator(str(folder.path / "tensorboard")).Reload()
    assert events.Tags()["scalars"] == ["loss"]
    scalars = [(event.step, event.value) for event in events.Scalars("loss")]
    assert scalars == [(1, 0.5), (2, 1.0), (3, 1.5), (4, 40.0), (5, 50.0), (6, 60.0)], scalars
