"""A run that is gone on with after something has happened to its folder, to the clock, or while another run is in it."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.pretrain.engine.stopping import resumed, state_of, summary_of, untimed
from tests.pretrain.tiny import differing, one_sentence
from tests.reliability.runs import Ended, copy_of
from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.engine.run import Run
from vmf_pretrain.storage.manifest import FORMAT, STATE_FILE, hash_of

NEWEST, BEFORE = "step_00000008", "step_00000005"


def cut(run: Path) -> None:
    path = run / "checkpoints" / NEWEST / "student.safetensors"
    os.truncate(path, path.stat().st_size // 2)


def flip(run: Path) -> None:
    path = run / "checkpoints" / NEWEST / "optimizer.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def lose_a_file(run: Path) -> None:
    (run / "checkpoints" / NEWEST / "student.safetensors").unlink()


def lose_the_newest(run: Path) -> None:
    shutil.rmtree(run / "checkpoints" / NEWEST)


def age(run: Path) -> None:
    """The newest checkpoint is the oldest by its time, and LATEST names nothing."""
    os.utime(run / "checkpoints" / NEWEST, (0, 0))
    (run / "checkpoints" / "LATEST").write_text("step_no")


def spoil_logs(run: Path) -> None:
    """What a crash leaves of them, and what a person who makes room takes."""
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')
    shutil.rmtree(run / "tensorboard")
    shutil.rmtree(run / "plots")
    (run / "bad_files.jsonl").unlink()


DAMAGE: dict[str, tuple[Callable[[Path], None], int, str]] = {  # and the step that it goes on from, and what is said
    "cut": (cut, 5, rf"{NEWEST}: student.safetensors .*sha256.*using {BEFORE} instead"),
    "a bit": (flip, 5, rf"{NEWEST}: optimizer.safetensors .*sha256.*using {BEFORE} instead"),
    "a file missing": (lose_a_file, 5, rf"{NEWEST}: student.safetensors is missing; using {BEFORE} instead"),
    "gone": (lose_the_newest, 5, rf"{NEWEST}: LATEST names it but it is missing; using {BEFORE} instead"),
    "times and LATEST": (age, 8, ""),
    "logs": (spoil_logs, 8, ""),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_run_goes_on_to_the_same_bits_whatever_has_happened_to_its_folder(
    kind: str, tmp_path: Path, stopped: Path, whole: Ended
) -> None:
    spoil, step, said = DAMAGE[kind]
    spoil(copy_of(stopped, tmp_path / "run"))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        run = resumed(tmp_path / "run")
    assert run.step == step
    passed_over = [str(one.message) for one in warned if "damaged checkpoint" in str(one.message)]
    assert len(passed_over) == bool(said), passed_over
    assert run.train() == 0
    assert_same(run, whole)
    if said:
        assert re.search(said, passed_over[0]), passed_over


def assert_same(run: Run, whole: Ended) -> None:
    assert not differing(state_of(run), whole.state)
    assert untimed(run) == whole.records


def test_a_checkpoint_of_a_newer_version_ends_the_run_before_it_has_begun(tmp_path: Path, stopped: Path) -> None:
    path = copy_of(stopped, tmp_path / "run") / "checkpoints" / NEWEST / STATE_FILE
    described = json.loads(path.read_text())
    del described["sha256"]
    described["format"] = FORMAT + 1
    path.write_text(json.dumps({**described, "sha256": hash_of(described)}))
    before = {each: each.read_bytes() for each in (tmp_path / "run").rglob("*") if each.is_file()}
    with pytest.raises(PretrainError, match="a newer vmf_kernels wrote") as told:
        resumed(tmp_path / "run")
    assert one_sentence(str(told.value))
    assert {each: each.read_bytes() for each in (tmp_path / "run").rglob("*") if each.is_file()} == before


def test_a_clock_that_jumps_changes_nothing_but_times(
    tmp_path: Path, stopped: Path, whole: Ended, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers, year = random.Random(0), 365 * 86400
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: numbers.uniform(0, 100 * year))
        run = resumed(copy_of(stopped, tmp_path / "run"))
        assert run.train() == 0
    assert_same(run, whole)
    assert 0 <= summary_of(run)["seconds"] < 600


def test_a_second_run_in_the_folder_is_refused_and_disturbs_nothing(
    tmp_path: Path, stopped: Path, whole: Ended
) -> None:
    run = resumed(copy_of(stopped, tmp_path / "run"))
    with pytest.raises(PretrainError, match=rf"in use by process {os.getpid()}") as told:
        resumed(tmp_path / "run")
    assert one_sentence(str(told.value))
    assert run.train() == 0
    assert_same(run, whole)
