"""The doctor on folders with planted faults, and the whole command on a toy: what it says, and that nothing is left."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.pretrain.doctor.test_judging import said
from tests.pretrain.tiny import changed, one_sentence, photos_config, save_photos, two_classes, yaml_of
from vmf_pretrain import doctor_command
from vmf_pretrain.cli import BLOCKED, DONE, INTERRUPTED, main
from vmf_pretrain.data.folder import FolderSource
from vmf_pretrain.doctor.finding import Finding
from vmf_pretrain.doctor.images import equal_files, look_at
from vmf_pretrain.doctor.judge_images import judge_classes, judge_equal, judge_look

pytestmark = pytest.mark.quick

LONG = 60.0  # seconds: all images are looked at


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of everything below a folder."""
    return {str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*")}


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes, and one of a single image; broken files, copies, and images smaller than the views."""
    folder = two_classes(tmp_path_factory.mktemp("faulty"), each=12)
    save_photos(folder / "owls", 1)
    save_photos(folder / "dogs" / "small", 9, side=20)
    whole = (folder / "cats" / "photo_00.png").read_bytes()
    (folder / "dogs" / "copy.png").write_bytes(whole)
    (folder / "cats" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "cats" / "words.jpg").write_text("no pixels")
    (folder / "notes.txt").write_text("no image")
    return folder


def judged(folder: Path) -> list[Finding]:
    source, config = FolderSource(folder), changed(photos_config(folder), train={"epochs": 100})
    return [
        *judge_classes(source, "folder"),
        *judge_look(look_at(source, LONG), config),
        judge_equal(equal_files(source, LONG), source),
    ]


FAULTS = [
    ("fine", "images", "37; skipped: 1 files of other kinds"),
    ("problem", "readable", "2 of 37 images cannot be decoded: cats/cut.png, cats/words.jpg"),
    ("fine", "formats", "36 PNG, 36 RGB; shorter sides of 20 to 48 pixels"),
    ("note", "image sizes", "25% of the images are smaller than the views of 32 pixels"),
    ("note", "classes", "with a single image, which no other one can be compared with: owls"),
    ("note", "duplicates", "cats/photo_00.png = dogs/"),
    ("note", "duplicates", "in more than one class"),
]


def test_planted_faults_are_found_and_nothing_is_written(faulty: Path) -> None:
    before = contents(faulty)
    found = judged(faulty)
    for severity, subject, words in FAULTS:
        assert words in said(found, severity, subject), (words, found)
    assert contents(faulty) == before


def test_a_folder_without_faults_has_no_note(tmp_path: Path) -> None:
    found = judged(two_classes(tmp_path, each=6) if save_photos(tmp_path / "cats", 6) else tmp_path)
    notes = [one for one in found if one.severity != "fine" and one.subject != "duplicates"]
    assert not notes, notes


LAYOUTS = [
    ("one folder", ["a.png", "b.png"], "all images lie in one folder, so there are no labels"),
    ("beside", ["cats/a.png", "b.png"], "1 image beside the 1 sub-folder, so there are no labels"),
    ("one class", ["cats/a.png", "cats/b.png"], "all images lie in the one sub-folder cats"),
    ("split", ["train/cats/a.png", "val/cats/b.png"], "seem to be a split"),
]


@pytest.mark.parametrize(("name", "paths", "words"), LAYOUTS, ids=[row[0] for row in LAYOUTS])
def test_layout_without_classes_is_said(name: str, paths: list[str], words: str, tmp_path: Path) -> None:
    for path, photo in zip(paths, save_photos(tmp_path / "made", len(paths)), strict=True):
        (tmp_path / name / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.move(photo, tmp_path / name / path)
    found = judge_classes(FolderSource(tmp_path / name), "folder")
    assert words in said(found, "note", "classes")


def test_time_bounds_what_is_looked_at(faulty: Path) -> None:
    source = FolderSource(faulty)
    moments = iter(range(10**6))
    look = look_at(source, 20.0, clock=lambda: float(next(moments)))
    assert 1 <= look.looked < look.count == 37
    words = " ".join(one.words for one in judge_look(look, photos_config(faulty)))
    assert f"{look.looked} of 37, drawn at random," in words or f"of {look.looked} images cannot be decoded" in words
    equal = equal_files(source, 1.0, clock=lambda: float(next(moments)))
    assert equal.compared < equal.candidates


def test_bad_files_are_a_problem_only_above_the_limit(faulty: Path) -> None:
    look = look_at(FolderSource(faulty), LONG)
    short, long = (changed(photos_config(faulty), train={"epochs": epochs}) for epochs in (1, 100))
    lenient = changed(long, data={"max_bad_share": 0.1})
    found = [judge_look(look, config)[0].severity for config in (short, long, lenient)]
    assert found == ["note", "problem", "note"], "a run allows a share of a thousand images at least"


@pytest.fixture
def _small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Short steps, in an empty folder."""
    monkeypatch.setattr(doctor_command, "STEPPING", 2.0)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")


@pytest.mark.usefixtures("_small")
def test_command_examines_a_toy_and_leaves_only_the_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    photos = two_classes(tmp_path / "photos", each=20)
    config = yaml_of(changed(photos_config(photos), data={"workers": 0}), tmp_path / "toy.yaml")
    before = contents(photos)
    assert main(["doctor", "--config", str(config), "--json", "found.json"]) == DONE
    printed = capsys.readouterr().out
    assert "Nothing is in the way of a run." in printed
    for part in ("Machine", "Kernels", "Settings", "Images in", "First steps"):
        assert f"\n{part}" in f"\n{printed}"
    report = json.loads(Path("found.json").read_text())
    assert report["ready"] is True
    assert report["first_steps"]["images_per_second"] > 0
    assert report["images"]["looked"] == 40
    assert {one["severity"] for one in report["findings"]} <= {"fine", "note"}
    assert contents(photos) == before
    assert [path.name for path in Path().iterdir()] == ["found.json"]


@pytest.mark.usefixtures("_small")
def test_what_would_fail_is_named_and_ends_with_1(
    faulty: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("vmf_pretrain.doctor.kernels.OURS", {})  # they have a test of their own
    config = yaml_of(changed(photos_config(faulty), data={"workers": 0}), Path("toy.yaml"))
    faults = ["--out", "/dev/null", "--train.epochs", "100", "--data.batch_size", "64"]
    assert main(["doctor", "--config", str(config), *faults]) == BLOCKED
    printed = capsys.readouterr().out
    assert "A run would fail: output folder, readable, first steps." in printed
    assert "problem first steps: data.batch_size is 64 but there are" in printed


@pytest.mark.usefixtures("_small")
def test_interrupt_is_one_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def stop(device: object) -> list[object]:
        raise KeyboardInterrupt

    monkeypatch.setattr("vmf_pretrain.doctor.kernels.check_kernels", stop)
    assert main(["doctor"]) == INTERRUPTED
    error = capsys.readouterr().err
    assert one_sentence(error)
    assert error.startswith("vmf-pretrain: stopped")
    assert not list(Path().iterdir())
