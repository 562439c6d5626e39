"""A disk that is full or gone: every file of a run goes on when it comes back, and the user is told once for each reason."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vmf_pretrain.storage import lines
from vmf_pretrain.storage.lines import JsonLines, read_lines
from vmf_pretrain.storage.metrics import MetricsLog, read_metrics
from vmf_pretrain.storage.run_folder import RunFolder
from vmf_pretrain.storage.tolerant import TolerantWrites

pytestmark = pytest.mark.quick


class Disk:
    """Files whose writes stop half-way while ``full``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.full = False
        real: Callable[..., Any] = Path.open

        def opened(path: Path, mode: str = "r", *arguments: Any, **keywords: Any) -> Any:
            file = real(path, mode, *arguments, **keywords)
            if self.full and set("awx") & set(mode):
                return _Half(file)
            return file

        monkeypatch.setattr(Path, "open", opened)


class _Half:
    def __init__(self, file: Any) -> None:
        self._file = file

    def __enter__(self) -> _Half:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, content: bytes) -> None:
        self._file.write(content[: len(content) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")


def scalars_of(folder: RunFolder) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder.tensorboard)).Reload()
    return [(event.step, event.value) for event in events.Scalars("loss")]


def test_metrics_and_events_survive_a_full_disk_and_nothing_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    tolerant, disk = TolerantWrites(said.append), Disk(monkeypatch)
    folder = RunFolder.create(tmp_path / "run")
    log = MetricsLog(folder, 0, tolerant)
    for step in range(1, 7):
        disk.full = step in (2, 3, 5)
        log.write({"step": step, "loss": step / 2})
    log.close()
    assert [record["step"] for record in read_metrics(folder)] == [1, 2, 3, 4, 5, 6]
    assert scalars_of(folder) == [(step, step / 2) for step in range(1, 7)]
    assert tolerant.failures == {"metrics.jsonl": 3, "tensorboard": 3}
    about_metrics = [sentence for sentence in said if sentence.startswith("metrics.jsonl")]
    assert about_metrics == [
        "metrics.jsonl could not be written: No space left on device; training goes on, and it is tried again each time.",
        "metrics.jsonl is written again, after 2 failures in all.",
        "metrics.jsonl could not be written: No space left on device; training goes on, and it is tried again each time.",
        "metrics.jsonl is written again, after 3 failures in all.",
    ], said


def test_a_folder_that_vanishes_and_comes_back(tmp_path: Path) -> None:
    said: list[str] = []
    folder = RunFolder.create(tmp_path / "run")
    log = MetricsLog(folder, 0, TolerantWrites(said.append))
    log.write({"step": 1, "loss": 1.0})
    (tmp_path / "run").rename(tmp_path / "away")
    for step in (2, 3):
        log.write({"step": step, "loss": 1.0})
    log.close()
    assert sum("No such file or directory" in sentence for sentence in said) == 2, said
    assert "2 records of metrics.jsonl are lost." in said, said
    (tmp_path / "away").rename(tmp_path / "run")
    log.write({"step": 4, "loss": 1.0})
    assert [record["step"] for record in read_metrics(folder)] == [1, 2, 3, 4]
    assert [step for step, _ in scalars_of(folder)] == [1, 2, 3, 4]


def test_a_log_that_cannot_even_begin_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder.create(tmp_path / "run")
    (folder.metrics).write_text('{"step": 1}\n{"step": 2}\n{"st')
    disk = Disk(monkeypatch)
    disk.full = True
    log = MetricsLog(folder, 1, TolerantWrites(lambda sentence: None))
    assert folder.metrics.read_text() == '{"step": 1}\n{"step": 2}\n{"st', "the history was cut off by a failed write"
    disk.full = False
    log.write({"step": 2, "loss": 3.0})
    assert read_metrics(folder) == [{"step": 1}, {"step": 2, "loss": 3.0}]
    assert scalars_of(folder) == [(2, 3.0)]


def test_a_clock_that_is_set_back_hides_no_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder.create(tmp_path / "run")
    for moment, step in ((2_000_000_000, 1), (1_000_000_000, 2), (1_000_000_000, 3)):
        monkeypatch.setattr("vmf_pretrain.storage.tensorboard.time.time", lambda moment=moment: float(moment))
        MetricsLog(folder, step - 1).write({"step": step, "loss": float(step)})
    assert scalars_of(folder) == [(1, 1.0), (2, 2.0), (3, 3.0)]


def test_what_waits_for_the_disk_takes_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "MOST_WAITING", 100)
    said: list[str] = []
    log = JsonLines(tmp_path / "bad_files.jsonl", TolerantWrites(said.append))
    disk = Disk(monkeypatch)
    disk.full = True
    for place in range(50):
        log.write({"place": place})
    disk.full = False
    log.flush()
    kept = [record["place"] for record in read_lines(tmp_path / "bad_files.jsonl")]
    assert 1 < len(kept) < 10, kept
    assert kept == list(range(50 - len(kept), 50)), kept
    assert f"{50 - len(kept)} records of bad_files.jsonl are lost." in said, said


def test_lines_that_are_none_end_what_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    for rest in ('{"a', "[1]\n", "\xff\n"):
        path.write_bytes(b'{"a": 1}\n' + rest.encode("latin-1"))
        assert read_lines(path) == [{"a": 1}], rest


def test_each_kind_and_reason_is_said_once_and_each_failure_counted() -> None:
    said: list[str] = []
    tolerant = TolerantWrites(said.append)

    def fail(number: int) -> Callable[[], None]:
        def write() -> None:
            raise OSError(number, {errno.EROFS: "Read-only file system", errno.EIO: "Input/output error"}[number])

        return write

    for kind, number in (("plots", errno.EROFS), ("plots", errno.EROFS), ("plots", errno.EIO), ("summary", errno.EIO)):
        assert not tolerant.attempt(kind, fail(number))
    assert [sentence.split(";")[0] for sentence in said] == [
        "plots could not be written: Read-only file system",
        "plots could not be written: Input/output error",
        "summary could not be written: Input/output error",
    ]
    assert tolerant.failures == {"plots": 3, "summary": 1}
    assert tolerant.attempt("summary", lambda: None)


def test_a_mistake_of_the_program_is_not_tolerated() -> None:
    with pytest.raises(ZeroDivisionError):
        TolerantWrites().attempt("plots", lambda: 1 // 0)


def test_by_default_it_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match=r"lines.jsonl could not be written: File exists; training goes on"):
        JsonLines(tmp_path / "file" / "lines.jsonl", TolerantWrites()).write({"a": 1})


def test_a_run_without_tensorboard_says_so_and_logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tensorboard.compat.proto", None)
    said: list[str] = []
    folder = RunFolder.create(tmp_path / "run")
    log = MetricsLog(folder, 0, TolerantWrites(said.append))
    log.write({"step": 1, "loss": 0.5})
    log.close()
    assert [json.loads(line) for line in folder.metrics.read_text().splitlines()] == [{"step": 1, "loss": 0.5}]
    assert len(said) == 1, said
    assert "pip install tensorboard" in said[0], said
