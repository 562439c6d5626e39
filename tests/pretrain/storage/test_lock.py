"""The lock of a run folder: one process has it, a dead one loses it, and two that start together do not both get it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.pretrain.saved import names
from tests.pretrain.tiny import one_sentence
from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.storage import lock
from vmf_pretrain.storage.lock import CLAIM, LOCK, RunLock
from vmf_pretrain.storage.run_folder import RunFolder

pytestmark = pytest.mark.quick

NO_SUCH_PROCESS = 2**22 + 1  # above the largest number that Linux gives
# waits for the moment, takes the lock, says whether it did, and holds it until its input ends
RACER = """
import sys, time
from pathlib import Path
from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.storage.lock import RunLock
print("ready", flush=True)
sys.stdin.readline()
try:
    with RunLock.take(Path(sys.argv[1]), say=lambda sentence: None):
        print("has it", flush=True)
        sys.stdin.read()
except PretrainError as error:
    print(error, flush=True)
"""


def held_by(folder: Path, **changes: Any) -> dict[str, Any]:
    """A lock as another process would have left it."""
    holder = {**lock._identity(os.getpid()), "token": "abc123", **changes}
    folder.mkdir(exist_ok=True)
    (folder / LOCK).write_text(json.dumps(holder))
    return holder


def test_a_lock_is_taken_once_and_given_up(tmp_path: Path) -> None:
    folder = tmp_path / "some" / "run"
    with (
        RunLock.take(folder),
        pytest.raises(PretrainError, match=rf"is in use by process {os.getpid()} on .*; stop it"),
    ):
        RunLock.take(folder)
    assert names(folder) == []
    RunLock.take(folder).release()


LIVING: list[tuple[str, dict[str, Any], str]] = [
    ("this", {}, "stop it first, or choose another folder with --out"),
    ("another machine", {"host": "elsewhere", "pid": NO_SUCH_PROCESS}, r"another machine.*if it has ended, remove"),
    ("another container", {"container": "pid:[1]", "pid": NO_SUCH_PROCESS}, r"another container.*remove"),
    ("parent", {"pid": os.getppid(), "started": lock._started(os.getppid())}, "is in use by process"),
]


@pytest.mark.parametrize(("changes", "said"), [case[1:] for case in LIVING], ids=[case[0] for case in LIVING])
def test_a_lock_whose_holder_may_live_is_respected(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    holder = held_by(tmp_path / "run", **changes)
    with pytest.raises(PretrainError, match=said) as caught:
        RunLock.take(tmp_path / "run")
    assert one_sentence(str(caught.value)), str(caught.value)
    assert json.loads((tmp_path / "run" / LOCK).read_text()) == holder


DEAD: dict[str, dict[str, Any]] = {
    "ended": {"pid": NO_SUCH_PROCESS},
    "its number was given again": {"started": "1"},
    "the machine started anew": {"boot": "another"},
}


@pytest.mark.parametrize("kind", DEAD)
def test_the_lock_of_a_dead_process_is_taken_over_with_a_sentence(kind: str, tmp_path: Path) -> None:
    holder = held_by(tmp_path / "run", **DEAD[kind])
    said: list[str] = []
    with RunLock.take(tmp_path / "run", said.append):
        assert said == [f"Took over the lock of {tmp_path / 'run'}: process {holder['pid']}, which held it, has ended."]
        assert names(tmp_path / "run") == [LOCK], "the claim is left"
        assert lock._read(tmp_path / "run" / LOCK) != holder
    assert names(tmp_path / "run") == []


def test_a_killed_process_that_nobody_has_waited_for_is_dead(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    held_by(tmp_path / "run", pid=child.pid, started=lock._started(child.pid))
    with pytest.raises(PretrainError, match=f"in use by process {child.pid}"):
        RunLock.take(tmp_path / "run")
    child.kill()
    until = time.monotonic() + 30
    while lock._started(child.pid) is not None and time.monotonic() < until:
        time.sleep(0.01)
    with RunLock.take(tmp_path / "run", lambda sentence: None):
        pass
    child.communicate()


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"pid": 1}', '{"pid": 1, "host": "h", "started": "1", "token": "../x"}']
)
def test_a_lock_that_names_nobody_is_not_removed(content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "UNREADABLE_FOR", 0.01)
    (tmp_path / LOCK).write_text(content)
    with pytest.raises(PretrainError, match=r"does not say which process holds it; if no run .* remove that file"):
        RunLock.take(tmp_path)
    assert (tmp_path / LOCK).read_text() == content


def test_a_lock_that_another_took_over_is_not_given_up(tmp_path: Path) -> None:
    mine = RunLock.take(tmp_path)
    theirs = held_by(tmp_path, pid=1)
    mine.release()
    assert json.loads((tmp_path / LOCK).read_text()) == theirs


def test_a_claim_of_a_dead_process_is_said(tmp_path: Path) -> None:
    dead = held_by(tmp_path, pid=NO_SUCH_PROCESS)
    (tmp_path / f"{CLAIM}{dead['token']}").write_text(json.dumps({**dead, "token": "def"}))
    with pytest.raises(PretrainError, match=r"ended while it took over .*; remove .*claim-abc123 and try again"):
        RunLock.take(tmp_path)


def test_a_locked_folder_is_new_to_a_run_and_a_used_one_is_not(tmp_path: Path) -> None:
    with RunLock.take(tmp_path / "run"):
        RunFolder.create(tmp_path / "run")
        (tmp_path / "run" / "metrics.jsonl").touch()
        with pytest.raises(PretrainError, match="already exists"):
            RunFolder.create(tmp_path / "run")


def test_a_place_that_cannot_be_locked_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PretrainError, match=r"file/run cannot be locked: Not a directory"):
        RunLock.take(tmp_path / "file" / "run")


@pytest.mark.thorough
@pytest.mark.parametrize("stale", [False, True], ids=["new", "stale"])
def test_of_processes_that_start_together_one_gets_the_lock(stale: bool, tmp_path: Path) -> None:
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, str(tmp_path / "run")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    if stale:
        held_by(tmp_path / "run", pid=NO_SUCH_PROCESS)
    for racer in racers:
        assert racer.stdout is not None
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("\n")
        racer.stdin.flush()
    said = [racer.stdout.readline().strip() for racer in racers if racer.stdout is not None]
    for racer in racers:
        racer.communicate()
    assert sorted("has it" in line or "in use by process" in line for line in said) == [True] * 4, said
    assert said.count("has it") == 1, said
