"""A disk that is full or read-only at each single write of a run, of its continuation, and of the commands after it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.pretrain.engine.stopping import state_of
from tests.pretrain.export.kept import kept_run
from tests.pretrain.tiny import a_run, config_in, differing, one_sentence, two_classes
from tests.reliability.disk import FULL, READ_ONLY, Call, disk
from tests.reliability.runs import FAULTS, Ended, small_digits, small_photos
from vmf_pretrain.cli import main
from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.engine.history import trained


def spread(count: int, least: int) -> list[int]:
    """Numbers of the writes that fail, of ``count``: ``least`` times as many as are asked for, evenly spread."""
    tried = min(count, least * FAULTS)
    return sorted({round(place * (count - 1) / max(1, tried - 1)) for place in range(tried)})


ROWS: dict[str, tuple[str, str]] = {  # kinds of files: their paths, and what is read when the disk refuses them
    "lock": (r"\.|\.lock", "run folder .* cannot be locked: Read-only file system"),
    "folders": (r"weights|plots|checkpoints", "run folder .* cannot be made: Read-only file system"),
    "first checkpoint": (r"checkpoints/.*(step_00000000|LATEST).*", "the run cannot begin.*Read-only file system"),
    "settings": (r"(\.tmp-)?config\.yaml", "config.yaml cannot be written: Read-only file system"),
    "later checkpoints": (r"checkpoints/.*(step_0*[1-9]|LATEST).*|checkpoints", "LAST STATE IS NOT ON DISK"),
    "weights": (r"weights/.*", "Weights .* could not be written: Read-only file system"),
    "numbers": (r"(\.tmp-)?metrics\.jsonl", "metrics.jsonl could not be written: Read-only file system"),
    "events": (r"tensorboard.*", "tensorboard could not be written: Read-only file system"),
    "bad images": (r"(\.tmp-)?bad_files\.jsonl", "bad_files.jsonl could not be written: Read-only file system"),
    "skipped steps": (r"(\.tmp-)?skipped_steps\.jsonl", "skipped_steps.jsonl could not be written"),
    "plots": (r"plots/.*", "plots could not be written: Read-only file system"),
    "histograms": (r"(\.tmp-)?histograms\.jsonl", "histograms.jsonl could not be written: Read-only file system"),
    "history": (r"(\.tmp-)?history\.jsonl", "history.jsonl could not be written: Read-only file system"),
    "page": (r"(\.tmp-)?report\.html|plots/(\.tmp-)?views\.png", "report.html could not be written"),
    "summary": (r"(\.tmp-)?summary\.json", "summary.json could not be written: Read-only file system"),
}
REFUSED = ("lock", "folders", "first checkpoint", "settings")
LOST = ("later checkpoints", "weights")


def refusing(kinds: tuple[str, ...]) -> Callable[[int, Call], int | None]:
    pattern = re.compile("|".join(f"run/({ROWS[kind][0]})" for kind in kinds))
    return lambda number, call: READ_ONLY if pattern.fullmatch(call.path) else None


def what_is_read(out: Path) -> str:
    """A new run's output and exit code, or the sentence that it ends in."""
    try:
        run, printed = a_run(small_digits(), out)
        return f"{trained(run)} {printed.getvalue()}"
    except PretrainError as told:
        return str(told)


def test_every_write_of_a_run_is_of_a_kind_in_the_table(whole: Ended) -> None:
    known = re.compile("run|" + "|".join(f"run/({path})" for path, _ in ROWS.values()))
    assert not [call for call in whole.calls if not known.fullmatch(call.path)]
    for kind, (path, _) in ROWS.items():
        assert any(re.fullmatch(f"run/({path})", call.path) for call in whole.calls), f"nothing writes {kind}"


@pytest.mark.parametrize("kind", REFUSED)
def test_a_run_that_could_not_be_gone_on_with_does_not_begin(kind: str, tmp_path: Path) -> None:
    with disk(tmp_path, refusing((kind,))) as watched, pytest.raises(PretrainError, match=ROWS[kind][1]) as told:
        a_run(small_digits(), tmp_path / "run")
    assert watched.failed
    assert one_sentence(str(told.value)), told.value
    a_run(small_digits(), tmp_path / "run")[0].close()  # the folder is as good as new


@pytest.mark.parametrize(
    "kinds", [LOST, tuple(kind for kind in ROWS if kind not in REFUSED + LOST)], ids=["lost", "log"]
)
def test_a_run_goes_on_without_the_files_that_the_disk_refuses_and_says_so(
    kinds: tuple[str, ...], tmp_path: Path, whole: Ended
) -> None:
    run, printed = a_run(small_digits(), tmp_path / "run")
    with disk(tmp_path, refusing(kinds)) as watched:
        code = trained(run)
    assert code == (1 if kinds == LOST else 0)
    said = " ".join(printed.getvalue().split())
    for kind in kinds:
        path, sentence = ROWS[kind]
        assert any(re.fullmatch(f"run/({path})", call.path) for call in watched.failed), f"nothing wrote {kind}"
        assert re.search(sentence, said), f"{kind}: {said}"
    assert not differing(state_of(run), whole.state), "what could not be written has changed what was learned"


def test_a_disk_that_is_full_from_any_write_on_costs_no_step_for_good(tmp_path: Path, whole: Ended) -> None:
    calls = whole.calls
    for moment in spread(len(calls), 3):
        out = tmp_path / f"{moment}" / "run"
        out.parent.mkdir()
        with disk(out.parent, lambda number, call, moment=moment: FULL if number >= moment else None) as watched:  # type: ignore[misc]
            printed = what_is_read(out)
        assert watched.failed, f"write {moment} was never reached"
        assert "No space left on device" in " ".join(printed.split()), f"write {moment}, {calls[moment]}: {printed}"
        begun = (out / "config.yaml").exists()
        run, _ = a_run(config_in(out) if begun else small_digits(), out, resume=begun)
        assert run.train() == 0, f"write {moment}, {calls[moment]}"
        assert not differing(state_of(run), whole.state), f"write {moment}, {calls[moment]}"


COMMANDS: dict[str, list[str]] = {
    "eval": ["--task", "knn", "--data", "DATA", "--out", "OUT/found"],
    "embed": ["--data", "DATA", "--out", "OUT/features.npz"],
    "export": ["--to", "timm", "--out", "OUT/timm"],
    "pictures": ["--out", "OUT/pictures"],
    "report": ["--out", "OUT/page.html", "--no-pictures"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_on_a_full_disk_ends_in_a_sentence_and_leaves_nothing_half_written(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SHOWN", "NEIGHBOURS"):  # tiles take time to draw
        monkeypatch.setattr(f"vmf_pretrain.report.gallery.{name}", 1)
    data, out = two_classes(tmp_path / "data", 6), tmp_path / "out"
    run = kept_run(small_photos(data), tmp_path / "run")
    words = [word.replace("DATA", str(data)).replace("OUT", str(out)) for word in COMMANDS[command]]
    out.mkdir()
    with disk(out) as whole:
        assert main([command, str(run), *words]) == 0, capsys.readouterr().err
    good = {path.relative_to(out) for path in out.rglob("*")}
    for moment in spread(len(whole.calls), 2):
        shutil.rmtree(out)
        out.mkdir()
        capsys.readouterr()
        with disk(out, lambda number, call, moment=moment: FULL if number >= moment else None):  # type: ignore[misc]
            assert main([command, str(run), *words]) != 0, f"write {moment}, {whole.calls[moment]}"
        told = capsys.readouterr()
        said, at = told.err or told.out, f"write {moment}, {whole.calls[moment]}: {told.err}{told.out}"
        assert "No space left on device" in " ".join(said.split()), at
        assert "unexpected" not in said, at
        left = {path.name for path in out.rglob("*") if path.is_file() and "tmp" in path.name}
        assert not left, f"{at} left {left}"
        assert main([command, str(run), *words]) == 0, f"{at}, and again"
        assert {path.relative_to(out) for path in out.rglob("*")} == good, at
