"""A data folder that other people work in while a run reads it."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import pytest
from PIL import Image

from tests.pretrain.engine.stopping import before_step, resumed
from tests.pretrain.tiny import a_run, one_sentence, two_classes
from tests.reliability.runs import small_photos
from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.data.bad_images import UnreadableImageError
from vmf_pretrain.data.plain_files import read_plain
from vmf_pretrain.engine.run import Run
from vmf_pretrain.storage.checkpoint import load_checkpoint


def replaced_by_link(path: Path, to: str) -> None:
    path.unlink()
    path.symlink_to(to)


def grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(bytes(1000))


def replaced_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def replaced_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {  # and why the image cannot be read then; nothing if it can
    "vanishes": (Path.unlink, "No such file"),
    "garbage": (lambda path: path.write_bytes(b"\x00" * 100), "no image that Pillow knows"),
    "emptied": (lambda path: path.write_bytes(b""), "no image that Pillow knows"),
    "a folder": (replaced_by_folder, "Is a directory"),
    "a pipe": (replaced_by_pipe, "no plain file"),
    "endless": (lambda path: replaced_by_link(path, "/dev/zero"), "no plain file"),
    "grows": (grow, ""),
    "another image": (lambda path: Image.new("RGB", (60, 40), "red").save(path), ""),
    "one more": (lambda path: shutil.copy(path, path.with_name("new.png")), ""),
}


@pytest.mark.parametrize("workers", [0, 2])
def test_what_happens_to_images_during_a_run_is_listed_and_the_run_ends_well(workers: int, tmp_path: Path) -> None:
    data = two_classes(tmp_path / "data", 20)
    config = small_photos(data, data={"workers": workers, "max_bad_share": 0.2}, train={"epochs": 6})
    run, _ = a_run(config, tmp_path / "run")
    names = dict(zip(CHANGES, trained_on(run)[::2], strict=False))
    before_step(run, 2, lambda: [CHANGES[kind][0](data / name) for kind, name in names.items()])
    assert run.train() == 0
    listed = [json.loads(line) for line in (tmp_path / "run" / "bad_files.jsonl").read_text().splitlines()]
    reasons = {bad["name"]: bad["reason"] for bad in listed}
    assert set(reasons) == {name for kind, name in names.items() if CHANGES[kind][1]}
    for kind, name in names.items():
        assert CHANGES[kind][1] in reasons.get(name, ""), f"{kind}: {reasons[name]}"
    for path in data.rglob("*"):
        if path.is_fifo():
            path.unlink()
    with pytest.raises(PretrainError, match="--allow-changed data"):  # the steps to come would mean other images
        resumed(tmp_path / "run")


def trained_on(run: Run) -> list[str]:
    return [run.batches.images.name(place) for place in range(len(run.batches.images))]


def test_a_folder_that_goes_away_ends_the_run_and_its_return_lets_it_go_on(tmp_path: Path) -> None:
    data = two_classes(tmp_path / "data", 8)
    config = small_photos(data, data={"workers": 0}, train={"epochs": 4})
    run, _ = a_run(config, tmp_path / "run")
    before_step(run, 3, lambda: data.rename(tmp_path / "away"))
    with pytest.raises(PretrainError, match="cannot be read") as told:
        run.train()
    assert one_sentence(str(told.value)), told.value
    assert load_checkpoint(tmp_path / "run" / "checkpoints").step >= 1
    (tmp_path / "away").rename(data)
    assert resumed(tmp_path / "run").train() == 0


@pytest.mark.quick
def test_a_pipe_would_be_waited_for_and_a_giant_would_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_bytes(bytes(2000))
    monkeypatch.setattr("vmf_pretrain.data.plain_files.LARGEST_IMAGE", 1999)
    for name, said in (("pipe", "no plain file"), ("file", "2000 bytes are more than 1999")):
        with pytest.raises(UnreadableImageError, match=said):
            read_plain(tmp_path / name)

    def tell(number: int, frame: FrameType | None) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, tell)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    with pytest.raises(TimeoutError):
        (tmp_path / "pipe").read_bytes()
    signal.signal(signal.SIGALRM, before)
