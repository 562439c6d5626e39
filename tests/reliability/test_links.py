"""A run folder from somebody else may hold links in place of files, and other people may share the disk."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.pretrain.engine.stopping import resumed
from tests.reliability.disk import disk
from tests.reliability.runs import copy_of
from vmf_pretrain.cli import BAD_INPUT, main
from vmf_pretrain.crash import explained
from vmf_pretrain.engine.history import trained

PRECIOUS = "precious"
pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows has other rights and links")


@pytest.fixture
def private() -> Iterator[None]:
    """Nobody else may do anything."""
    before = os.umask(0o077)
    yield
    os.umask(before)


@pytest.fixture
def written(tmp_path: Path, stopped: Path, private: None) -> dict[str, set[str]]:
    """Paths that a continued run writes, by what it asks of the disk; none of them may be open to others."""
    with disk(copy_of(stopped, tmp_path / "run")) as watched:
        assert trained(resumed(tmp_path / "run")) == 0
    open_to_others = {
        call.path: oct(mode)
        for call in watched.calls
        if (watched.folder / call.path).exists() and call.what in ("rename", "open")
        if (mode := stat.S_IMODE((watched.folder / call.path).stat().st_mode)) & 0o077
    }
    assert not open_to_others, open_to_others
    return {what: {call.path for call in watched.calls if call.what == what} for what in ("open", "rename", "mkdir")}


def test_nothing_is_written_through_a_link_that_stands_for_a_file(
    tmp_path: Path, stopped: Path, written: dict[str, set[str]]
) -> None:
    run, outside = copy_of(stopped, tmp_path / "spoilt"), tmp_path / "outside"
    outside.mkdir()
    planted = 0
    # the lock's link would be read, as what says which process holds it, and the run refused
    for path in sorted(written["open"] | written["rename"] | written["mkdir"] - {"weights", "plots", "tensorboard"}):
        place, victim = run / path, outside / str(planted)
        if path == ".lock" or place.is_dir() or not place.parent.is_dir() or place.parent.is_symlink():
            continue
        if path in written["mkdir"]:
            victim.mkdir()
        else:
            victim.write_text(PRECIOUS)
        place.unlink(missing_ok=True)
        place.symlink_to(victim)
        planted += 1
    assert planted >= 15, f"only {planted} links of {written}"
    assert trained(resumed(run)) == 0
    found = {path.name: None if path.is_dir() else path.read_text() for path in outside.rglob("*")}
    assert len(found) == planted, f"new files outside: {sorted(found)}"
    assert set(found.values()) <= {None, PRECIOUS}, found


@pytest.mark.quick
def test_the_file_of_a_crash_is_not_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").touch()
    (tmp_path / "victim").write_text(PRECIOUS)
    (tmp_path / "crash.txt").symlink_to(tmp_path / "victim")
    assert "crash.txt" in explained(ValueError("x"), tmp_path)
    assert (tmp_path / "victim").read_text() == PRECIOUS
    assert "ValueError" in (tmp_path / "crash.txt").read_text()


def test_a_name_is_no_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.yaml").write_text("seed: 1\n")
    assert main(["recipes", f"../../../{tmp_path}/mine"]) == BAD_INPUT
    assert "seed" not in capsys.readouterr().out
