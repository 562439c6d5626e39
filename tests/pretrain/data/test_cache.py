"""The cache changes speed and nothing else, and no fault of a disk ends a run."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.pretrain.data.photo_files import encoded, noise, photos
from vmf_pretrain.data import photos as photos_module
from vmf_pretrain.data.cache import ImageCache
from vmf_pretrain.data.decode import decode
from vmf_pretrain.data.photos import Photos

pytestmark = pytest.mark.quick


def an_image(folder: Path) -> Path:
    path = folder / "image.png"
    path.write_bytes(encoded(noise(40).resize((60, 40)), "PNG"))
    return path


def cached(path: Path, folder: Path, side: int = 20) -> Photos:
    return photos(path, cache=ImageCache(folder, side))


class Decoded:
    """Counts what is decoded."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0

        def counting(*arguments: Any) -> torch.Tensor:
            self.count += 1
            return decode(*arguments)

        monkeypatch.setattr(photos_module, "decode", counting)


def test_second_reading_decodes_nothing_and_gives_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, decoded = an_image(tmp_path), Decoded(monkeypatch)
    first, again = (cached(path, tmp_path / "cache").decode(0) for _ in range(2))
    assert decoded.count == 1
    assert first.shape == (3, 20, 30)
    assert torch.equal(first, again)
    assert torch.equal(cached(path, tmp_path / "cache", side=999).decode(0), photos(path).decode(0)), "enlarged"


@pytest.mark.parametrize("change", ["time", "size", "side"])
def test_another_file_or_side_is_decoded_anew(change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = an_image(tmp_path)
    cached(path, tmp_path / "cache").decode(0)
    if change == "time":
        os.utime(path, ns=(1, 1))
    elif change == "size":
        status = path.stat()
        path.write_bytes(path.read_bytes() + b" ")
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    decoded = Decoded(monkeypatch)
    cached(path, tmp_path / "cache", side=10 if change == "side" else 20).decode(0)
    assert decoded.count == 1


def full(*arguments: Any, **options: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("fails", ["write", "rename", "folder"])
def test_a_full_disk_costs_only_speed_and_leaves_nothing_half_written(
    fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path, folder = an_image(tmp_path), tmp_path / "cache"
    expected = cached(path, tmp_path / "other").decode(0)
    if fails == "folder":
        folder.write_text("not a folder")
    else:
        monkeypatch.setattr(*((np, "save") if fails == "write" else (os, "replace")), full)
    images = cached(path, folder)
    assert all(torch.equal(images.decode(0), expected) for _ in range(2))
    assert len([record for record in caplog.records if "takes no more images" in record.message]) == 1
    assert not [found for found in folder.rglob("*") if found.is_file()]


@pytest.mark.parametrize("damage", [lambda data: data[:100], lambda data: b"", lambda data: b"?" * len(data)])
def test_a_damaged_file_is_written_anew(damage: Any, tmp_path: Path) -> None:
    path = an_image(tmp_path)
    expected = cached(path, tmp_path / "cache").decode(0)
    (stored,) = (tmp_path / "cache").rglob("*.npy")
    whole = stored.read_bytes()
    stored.write_bytes(damage(whole))
    assert torch.equal(cached(path, tmp_path / "cache").decode(0), expected)
    assert stored.read_bytes() == whole
