"""Checkpoints when the disk is full or the process is killed, at any moment of a save."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.pretrain.saved import names, quiet_load, save
from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.storage import checkpoint

SYSTEM_CALLS = ("fsync", "replace")  # what a save asks of the disk, beside writes
KILLED = 9


def fail_at(monkeypatch: pytest.MonkeyPatch, call: int, action: Callable[[], None]) -> list[str]:
    """Do ``action`` in place of the ``call``-th system call of ``SYSTEM_CALLS``; the list grows by every call made."""
    made: list[str] = []

    def patched(name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def run(*arguments: Any) -> Any:
            made.append(name)
            if len(made) == call:
                action()
            return real(*arguments)

        return run

    for name in SYSTEM_CALLS:
        monkeypatch.setattr(os, name, patched(name))
    return made


def calls_of_a_save(folder: Path, step: int) -> int:
    save(folder, 3)
    with pytest.MonkeyPatch.context() as patch:
        made = fail_at(patch, 0, lambda: None)
        save(folder, step)
    return len(made)


def disk_full() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("step", [3, 4], ids=["same-step", "next-step"])
def test_a_full_disk_at_any_moment_leaves_a_whole_checkpoint(tmp_path: Path, step: int) -> None:
    calls = calls_of_a_save(tmp_path / "count", step)
    assert calls >= 8, f"a save made {calls} calls; expected 3 files, folders, LATEST and two renames"
    for call in range(1, calls + 1):
        folder = tmp_path / str(call)
        save(folder, 3, value=1.0)
        with pytest.MonkeyPatch.context() as patch:
            fail_at(patch, call, disk_full)
            with pytest.raises(PretrainError, match=rf"step_0000000{step} could not be written.*No space left"):
                save(folder, step, value=2.0, keep=1)
        left = [name for name in names(folder) if name.startswith(".tmp-")]
        assert not left, f"failing call {call} of {calls} left {left}"
        assert (folder / "step_00000003").is_dir(), f"failing call {call} of {calls} lost step 3: {names(folder)}"
        latest = folder / (folder / "LATEST").read_text().strip()
        assert latest.is_dir(), f"failing call {call} of {calls} left LATEST at {latest.name}"
        assert quiet_load(folder).state["value"] in (1.0, 2.0)


def test_a_write_that_stops_half_way_leaves_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def half(path: Path, tensors: Any) -> str:
        path.write_bytes(b"half")
        disk_full()
        return ""

    monkeypatch.setattr(checkpoint, "write_tensors", half)
    with pytest.raises(PretrainError, match="No space left on device"):
        save(tmp_path, 2, keep=1)
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert after == before, f"files are now {sorted(map(str, after))}"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork to die without cleaning up")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("step", [3, 4], ids=["same-step", "next-step"])
def test_a_kill_at_any_moment_leaves_a_whole_checkpoint_and_the_next_save_clears_up(tmp_path: Path, step: int) -> None:
    calls = calls_of_a_save(tmp_path / "count", step)
    for call in range(1, calls + 1):
        folder = tmp_path / str(call)
        save(folder, 3, value=1.0)
        child = os.fork()
        if child == 0:
            with pytest.MonkeyPatch.context() as patch:
                fail_at(patch, call, lambda: os._exit(KILLED))
                try:
                    save(folder, step, value=2.0, keep=1)
                finally:
                    os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status == KILLED, f"the child was to die in call {call} of {calls} but exited with {status}"
        value = quiet_load(folder).state["value"]
        assert value in (1.0, 2.0), f"killed in call {call} of {calls}: loaded {value}"
        save(folder, 5, value=3.0, keep=1)
        assert names(folder) == ["LATEST", "step_00000005"], f"killed in call {call} of {calls}: {names(folder)}"


def test_an_unwritable_place_is_a_users_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PretrainError, match=r"step_00000001 could not be written to .*file"):
        save(tmp_path / "file", 1)


# The optimizer
