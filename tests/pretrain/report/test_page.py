"""The page on a run: whatever became of the run, it says so; it is whole by itself; and what a file is called is text in it."""

from __future__ import annotations

import io
import json
import math
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from tests.browser import needs_browser
from tests.pretrain.methods.masked_runs import masked_config
from tests.pretrain.report.opened import PHONE, Opened, opened
from tests.pretrain.tiny import a_run, changed, photos_config, save_photos, some_digits
from vmf_pretrain.cli import main
from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.config.run import Config
from vmf_pretrain.data.bundled import DigitImages
from vmf_pretrain.data.images import Found
from vmf_pretrain.engine import history
from vmf_pretrain.engine.history import trained
from vmf_pretrain.report.page.page import write_page
from vmf_pretrain.report.page.run_data import read_run
from vmf_pretrain.report.page.state import state_of, verdicts
from vmf_pretrain.storage.lines import read_lines
from vmf_pretrain.storage.lock import RunLock

HOSTILE = "<img src=x onerror=alert(1)>"  # a class, and so a folder
QUOTED = 'it\'s a "broken" <b>file.png'
INJECTED = (
    """<img src="there.png" alt="faulty" onload="document.title = 'ran'"><script>console.error('faulty')</script>"""
)
BOOM = 'boom "</script><script>alert(1)</script>"'
DERIVED = ["unfinished", "empty", "not finite", "collapsed"]  # from the finished one
STATES = ["finished", "masked", "predicting", "failed", *DERIVED]


@dataclass(frozen=True)
class Runs:
    """Folders of runs by what became of them, and of them all the pages."""

    folders: dict[str, Path]
    pages: dict[str, Path]


def few(config: Config, **_: Any) -> tuple[DigitImages, DigitImages, Found]:
    """Some of the digits in place of all."""
    digits = some_digits(80)
    facts = {"images": 80, "held_out": None}
    return digits, digits, Found("some digits", 100, tuple("0123456789"), 20, {"hidden files": 2}, facts=facts)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Runs of a step or a few, each trained once; not to be changed."""
    base = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vmf_pretrain.engine.run.draw_plots", lambda *_: None)  # drawing takes longer than all the rest
        folders = {"finished": finished(base)}
        patch.setattr("vmf_pretrain.engine.run.load_images", few)
        short: dict[str, Any] = {"data": {"batch_size": 40}, "train": {"epochs": 1}, "evaluate": {"max_images": 30}}
        for name, method in (("masked", "mae"), ("predicting", "ijepa")):
            folders[name] = base / name
            assert trained(a_run(changed(masked_config(method), **short), folders[name])[0]) == 0
        folders["failed"] = failed(changed(masked_config("mae"), **short), base / "failed")
    folders |= {name: derived(folders["finished"], base / name) for name in DERIVED}
    for name in ("unfinished", "not finite"):
        lines = (folders[name] / "history.jsonl").read_text().splitlines(keepends=True)
        (folders[name] / "history.jsonl").write_text("".join(lines[:-1]))
        (folders[name] / "summary.json").unlink()
    (folders["empty"] / "metrics.jsonl").write_text("")
    (folders["empty"] / "histograms.jsonl").write_text("")
    broken = (
        '{"step": 1, "loss": NaN, "kl": 1.5, "teacher_entropy": -Infinity}\n{"step": 2, "loss": 4.5, "kl": 1e999}\n'
    )
    (folders["not finite"] / "metrics.jsonl").write_text(broken)
    pages = {name: folder / "report.html" for name, folder in folders.items()}
    dead = {"loss": 0.01, "teacher_entropy": 0.01, "kl": 0.0, "mutual_information": 0.0, "prototypes_in_use": 1.01}
    steps: list[dict[str, Any]] = [{"step": step, "epoch": 2, **dead} for step in range(10, 110, 10)]
    steps.append({"step": 30, "warning": "data wait", "words": "<b>Slow</b>.", "evidence": ["a"], "try": ["b"]})
    (folders["collapsed"] / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in steps))
    for name in DERIVED:
        write_page([folders[name]], pages[name])
    pages["compared"] = base / "compared.html"
    write_page([folders[name] for name in ("finished", "masked", "failed")], pages["compared"])
    return Runs(folders, pages)


def finished(base: Path) -> Path:
    """A run on photographs whose class has a hostile name, with a broken file among them."""
    photos = base / "photos"
    for name in (HOSTILE, "cats"):
        save_photos(photos / name, 8)
    (photos / HOSTILE / QUOTED).write_bytes(b"no image")
    run, _ = a_run(photos_config(photos, evaluate={"max_images": 16}, train={"epochs": 2}), base / 'a "run" <b>')
    assert trained(run) == 0
    picture = Image.new("RGB", (40, 30), "red")
    for name in ("neighbours", "attention", "reconstructions"):
        (run.folder.pictures).mkdir(exist_ok=True)
        picture.save(run.folder.pictures / f"{name}.png")
    write_page([run.folder.path], run.folder.report)
    return run.folder.path


def failed(config: Config, out: Path) -> Path:
    """A run that ends by an error after its first step."""
    run, _ = a_run(config, out)
    loop: Any = run.loop
    step = loop.step

    def once(number: int, *arguments: Any, **options: Any) -> Any:
        if number:
            raise RuntimeError(BOOM)
        return step(number, *arguments, **options)

    loop.step = once
    with pytest.raises(RuntimeError, match="boom"):
        trained(run)
    return out


def derived(run: Path, out: Path) -> Path:
    """A copy of a run, without its checkpoints."""
    shutil.copytree(run, out, ignore=shutil.ignore_patterns("checkpoints", "tensorboard", "report.html"))
    return out


@pytest.fixture(scope="module")
def seen(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Opened:
    """All pages in one browser, and one whose every fault has to be found."""
    folder = tmp_path_factory.mktemp("browser")
    Image.new("RGB", (9, 9)).save(folder / "there.png")
    control = folder / "control.html"
    control.write_text(f"<!doctype html><body><img src='absent.png'><div style='width: 900px'>wide</div>{INJECTED}")
    injected = folder / "injected.html"
    injected.write_text(runs.pages["masked"].read_text().replace("<main>", f"<main>{INJECTED}"))
    return opened({**runs.pages, "control": control, "injected": injected}, folder)


@needs_browser
def test_faults_are_found(seen: Opened) -> None:
    """Negative control of what follows."""
    page = seen.pages["control"]
    assert page["width"] > PHONE
    assert (page["broken"], page["unsaid"], page["foreign"], page["sideways"]) == (1, 1, 2, 1)
    assert page["charts"] is None
    assert page["title"] == "ran"
    assert any("faulty" in line and "control.html" in line for line in seen.console)


@needs_browser
def test_page_runs_and_loads_nothing_that_is_not_its_own(seen: Opened) -> None:
    """Even if markup got into it: the same markup runs in the control."""
    page = seen.pages["injected"]
    assert (page["broken"], page["foreign"]) == (1, 1), "a picture beside the page was loaded"
    assert page["title"] == "masked \N{MIDDLE DOT} vmf-pretrain"
    assert page["charts"] is not None
    refused = [line for line in seen.console if "injected.html" in line]
    # a blocked picture has its handler refused too, which Chromium says or not; the title shows that it did not run
    for directive in ("img-src", "script-src"):
        assert any(f'directive: "{directive}' in line or f"directive '{directive}" in line for line in refused), (
            directive
        )
    assert all("Content Security Policy" in line for line in refused)


@needs_browser
@pytest.mark.parametrize("name", [*STATES, "compared"])
def test_page_is_whole_on_a_phone_in_the_dark(name: str, seen: Opened) -> None:
    page = seen.pages[name]
    assert "error" not in page, page["error"]
    assert page["width"] <= PHONE, f"{page['width']} pixels wide"
    assert (page["broken"], page["unsaid"], page["foreign"], page["sideways"]) == (0, 0, 0, 0)
    assert page["dark"]
    assert page["background"] == "rgb(18, 22, 28)"
    assert page["charts"] is not None, "its script did not run to the end"
    assert page["headings"][1:] == [
        "Verdict", "Figures at the end", "Curves", "Features", "Prototypes", "Pictures", "Evaluations", "Data", "Speed",
        "Command and machine", "Settings",
    ]  # fmt: skip
    others = ("control.html", "injected.html", "absent.png")
    assert [line for line in seen.console if not any(other in line for other in others)] == []


@needs_browser
@pytest.mark.parametrize("name", ["finished", "masked", "predicting", "compared"])
def test_values_are_read_out_and_lines_are_hidden(name: str, seen: Opened) -> None:
    page = seen.pages[name]
    assert (page["pointed"].partition(":")[0], page["keyed"].partition(":")[0]) == ("2", "1")
    assert re.search(r": \S.* \d", page["pointed"]), page["pointed"]
    assert (page["hidden"], page["shown"]) == ("none", "inline")
    if name == "finished":
        assert page["enlarged"] == "true"


@needs_browser
@pytest.mark.parametrize("name", ["finished", "masked", "predicting"])
def test_figures_are_those_of_the_summary(name: str, runs: Runs, seen: Opened) -> None:
    summary = json.loads((runs.folders[name] / "summary.json").read_text())
    rows = {row[0]: row[1:] for row in seen.pages[name]["rows"]}
    assert rows["this run"] == [f"{summary['knn']:.1f}", f"{summary['linear']:.1f}"]
    assert rows["raw pixels"] == [f"{summary['knn_pixels']:.1f}", f"{summary['linear_pixels']:.1f}"]
    labels = {"rankme": "rank of the features", "mutual_information": "mutual information", "steps": "steps"}
    for key, label in labels.items():
        cells = [cells for title, cells in rows.items() if title.startswith(label)]
        if summary[key] is None:
            assert cells == []
        else:
            assert math.isclose(float(cells[0][0]), summary[key], rel_tol=1e-3)


@needs_browser
def test_saved_data_is_what_was_logged(runs: Runs, seen: Opened) -> None:
    saved = dict(seen.pages["finished"]["saved"])
    head, *rows = saved["Loss-and-its-parts.csv"].splitlines()
    records = [record for record in read_lines(runs.folders["finished"] / "metrics.jsonl") if "loss" in record]
    assert head == "optimizer step,loss,teacher entropy H(q),KL(q || p)"
    assert [[float(cell) for cell in row.split(",")] for row in rows] == [
        [record[key] for key in ("step", "loss", "teacher_entropy", "kl")] for record in records
    ]
    histograms = read_lines(runs.folders["finished"] / "histograms.jsonl")
    counts = [int(row.split(",")[3]) for row in saved["Concentrations-kappa-of-the-prototypes.csv"].splitlines()[1:]]
    assert counts == [count for record in histograms for count in record["kappa"]["counts"]]
    assert sum(counts) == 32 * len(histograms)


@needs_browser
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("finished", [HOSTILE, QUOTED, "Images that could not be read: 1", "pictures/attention.png"]),
        ("finished", ["Too short to say", "uniform collapse: ln 32", "views.png", "images17", "classes2", 'a "run" <b>']),
        ("masked", ["Loss as a share of what a constant prediction has", "skipped: hidden files2"]),
        ("masked", ["the method has no prototypes", "Use of the prototypes: no histogram"]),
        ("predicting", ["Reconstructions: not drawn", "Variance of the features"]),
        ("failed", [f"The run failed after step 1: RuntimeError: {BOOM}", "has no summary.json"]),
        ("unfinished", ["has not said that it ended"]),
        ("empty", ["No step has been logged", "No speed was logged", "No accuracy was measured", "were not logged"]),
        ("collapsed", ["One-hot collapse", "Evidence", "What to try", "raise loss.teacher_temp"]),
        ("collapsed", ["Warnings during the run", "step 30, data wait: <b>Slow</b>."]),
        ("not finite", ["KL(q || p) 1.500", "loss 4.500"]),
        ("compared", ["3 runs side by side", "Settings that differ", "method", "dino-vmf", "mae"]),
    ],
)  # fmt: skip
def test_page_says_what_became_of_the_run(name: str, said: list[str], seen: Opened) -> None:
    text = seen.pages[name]["text"]
    missing = [part for part in said if part not in text]
    assert not missing, f"{missing} not in: {text[:3000]}"


def test_history_has_each_start_and_end(runs: Runs) -> None:
    start, end = read_lines(runs.folders["failed"] / "history.jsonl")
    assert (start["event"], start["step"], start["images"]["images"]) == ("start", 0, 100)
    assert {"torch", "vmf_kernels", "python"} <= set(start["versions"])
    assert (end["event"], end["how"], end["step"], end["reason"]) == ("end", "failed", 1, f"RuntimeError: {BOOM}")
    assert "in once\n    raise RuntimeError(BOOM)" in end["traceback"]
    page = (runs.folders["failed"] / "report.html").read_text()
    assert "raise RuntimeError(BOOM)" in page, "the page that was written at the failure has no traceback"
    last = read_lines(runs.folders["finished"] / "history.jsonl")[-1]
    assert (last["how"], last["traceback"]) == ("finished", "")


GOES_ON = "Go on with: vmf-pretrain fit --resume --out "
UNENDED = {
    "going": ({}, "still going", "The run is still going: process {pid} on "),
    "killed": ({"boot": "an earlier one"}, "killed", "The run was killed or lost at step 7: process {pid} on "),
    "elsewhere": ({"host": "other"}, "perhaps still going", "Whether process {pid} on other still runs cannot be seen"),
    "nobody's": (None, "not finished", "no process has its folder"),
}


@pytest.mark.parametrize(("lock", "state", "said"), UNENDED.values(), ids=UNENDED)
def test_run_that_has_not_said_how_it_ended_is_told_by_its_lock(
    lock: dict[str, str] | None, state: str, said: str, tmp_path: Path
) -> None:
    folder = _bare(tmp_path)
    (folder / "metrics.jsonl").write_text('{"step": 7, "loss": 1.0}\n')
    (folder / "history.jsonl").write_text('{"event": "start", "step": 0}\n')
    with RunLock.take(folder) as held:
        holder = json.loads(held.path.read_text())
        held.path.write_text(json.dumps({**holder, **(lock or {})}))
        if lock is None:
            held.path.unlink()
        run = read_run(folder)
    shown = verdicts([run])
    assert state_of(run) == state
    assert said.format(pid=holder["pid"]) in shown, shown
    assert (GOES_ON in shown) == (state in ("killed", "not finished"))


@pytest.mark.parametrize("fails", [False, True])
def test_report_that_fails_is_a_warning_and_hides_nothing(
    fails: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(*_: Any) -> None:
        raise ValueError("no page today")

    class Run:
        """As much of a run as its history needs."""

        first, step = True, 3
        console = Console(file=io.StringIO(), width=200)

        def train(self) -> int:
            if fails:
                raise PretrainError("the run's own error.")
            return 0

    run: Any = Run()
    run.folder, run.tolerant, run.batches = read_run(_bare(tmp_path)).folder, history_tolerant(), None
    monkeypatch.setattr(history, "_facts", lambda _: {})
    monkeypatch.setattr(history, "draw_views", lambda *_: None)
    monkeypatch.setattr(history, "write_page", broken)
    if fails:
        with pytest.raises(PretrainError, match="the run's own error"):
            trained(run)
    else:
        assert trained(run) == 0
    assert "report.html could not be written (ValueError: no page today)" in run.console.file.getvalue()


def history_tolerant() -> Any:
    from vmf_pretrain.storage.tolerant import TolerantWrites

    return TolerantWrites()


def _bare(folder: Path) -> Path:
    """As little as a run's folder can hold."""
    (folder / "config.yaml").write_text("method: dino\n")
    return folder


def test_command_draws_what_is_missing_or_old_and_reuses_the_rest(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn: list[Path] = []

    def draw(run: Path, out: Path, **_: Any) -> None:
        drawn.append(run)
        out.mkdir(exist_ok=True)
        Image.new("RGB", (9, 9)).save(out / "neighbours.png")

    monkeypatch.setattr("vmf_pretrain.report.gallery.draw_gallery", draw)
    run = derived(runs.folders["masked"], tmp_path / "run")
    assert main(["report", str(run), "--no-pictures"]) == 0
    assert drawn == []
    assert main(["report", str(run)]) == 0
    assert main(["report", str(run), "--out", str(tmp_path / "page.html")]) == 0
    assert drawn == [run], "pictures of the newest weights are drawn once"
    shown = (tmp_path / "page.html").read_text()
    assert "pictures/neighbours.png" in shown
    other = derived(runs.folders["failed"], tmp_path / "other")
    assert main(["report", str(run), str(other), "--no-pictures"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"Report: {tmp_path / 'report.html'}"


def test_pictures_that_cannot_be_drawn_are_said_and_the_page_is_written(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = derived(runs.folders["failed"], tmp_path / "run")
    shutil.rmtree(run / "weights")
    assert main(["report", str(run)]) == 0
    assert "could not be drawn: run" in capsys.readouterr().err
    assert "could not be drawn: run" in (run / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["RUN"], "holds no run; expected a config.yaml in it."),
        (["RUN", "--optim.clip", "1"], "--optim.clip does not go with report"),
        (["GOOD", "GOOD"], "is given twice; expected each run once."),
        (["GOOD", "--no-pictures", "--out", "RUN/absent/page.html"], "cannot be written: No such file or directory"),
    ],
)
def test_command_that_cannot_be_done_is_one_sentence(
    arguments: list[str], said: str, runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"RUN": str(tmp_path), "GOOD": str(runs.folders["masked"])}
    given = [word.replace("RUN", places["RUN"]) if word != "GOOD" else places["GOOD"] for word in arguments]
    assert main(["report", *given]) == 2
    assert said in capsys.readouterr().err
