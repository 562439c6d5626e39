"""What there is to choose by: images are counted by name, and their sizes taken from headers."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

import pytest
from PIL import Image, ImageFile

from tests.pretrain.tiny import save_photos
from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.recipes import machine
from vmf_pretrain.recipes.machine import Photos, photos_in, this_machine

pytestmark = pytest.mark.quick


def test_images_are_counted_and_measured_without_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place, size in enumerate([(40, 90), (300, 50), (60, 60)]):
        Image.new("RGB", size).save(tmp_path / f"{place}.png")
    (tmp_path / "deep" / "er").mkdir(parents=True)
    os.replace(tmp_path / "2.png", tmp_path / "deep" / "er" / "2.PNG")
    (tmp_path / "broken.jpg").write_text("no pixels")
    (tmp_path / "notes.txt").write_text("no image")
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("an image was decoded"))
    assert photos_in(tmp_path) == Photos(count=4, side=50)


def test_headers_of_a_sample_only_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in range(30):
        (tmp_path / f"{place}.jpg").touch()
    read: list[int] = []
    monkeypatch.setattr(machine, "SAMPLED", 7)

    def side(source: object, index: int) -> int:
        read.append(index)
        return 64

    monkeypatch.setattr(machine, "_shorter_side", side)
    assert photos_in(tmp_path) == Photos(count=30, side=64)
    assert len(set(read)) == 7
    first = list(read)
    assert photos_in(tmp_path).count == 30
    assert read[7:] == first, "another sample the second time"


def test_folder_without_a_readable_header_is_still_counted(tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_text("no pixels")
    assert photos_in(tmp_path) == Photos(count=1, side=None)


def test_shards_are_known_by_their_names(tmp_path: Path) -> None:
    (photo,) = save_photos(tmp_path / "photos", 1, side=40)
    (tmp_path / "shards").mkdir()
    with tarfile.open(tmp_path / "shards" / "0.tar", "w") as shard:
        for name in ("a.png", "b.png"):
            shard.add(photo, name)
    assert photos_in(tmp_path / "shards") == Photos(count=2, side=40, kind="shards")


def test_folder_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    save_photos(tmp_path, 1)
    for folder, message in [(tmp_path / "absent", "is not a folder"), (tmp_path / "photo_00.png", "is not a folder")]:
        with pytest.raises(PretrainError, match=message) as caught:
            photos_in(folder)
        assert str(folder) in str(caught.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(PretrainError, match="holds no image"):
        photos_in(tmp_path / "empty")


def test_machine_without_a_gpu_is_a_cpu_with_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    found = this_machine("cpu")
    assert (found.device, found.ranks) == ("cpu", 2)
    assert found.cores >= 1
    assert 1 << 28 < found.memory < 1 << 50, "not bytes"
