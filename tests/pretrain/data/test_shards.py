"""Tar shards: read at random, damaged ones named, nothing leaves the archive."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.pretrain.data.photo_files import colours, encoded, noise
from tests.pretrain.tiny import batches_over, changed, one_sentence, photos_config, two_classes
from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.config.run import Config
from vmf_pretrain.data.bad_images import UnreadableImageError
from vmf_pretrain.data.decode import decode
from vmf_pretrain.data.load import load_images
from vmf_pretrain.data.shards import CUT, HIDDEN, NOT_FILES, OTHERS, OUTSIDE, ShardSource

pytestmark = pytest.mark.quick

PIXELS = encoded(colours(), "PNG")


def add(archive: tarfile.TarFile, name: str, data: bytes = PIXELS, kind: bytes = tarfile.REGTYPE) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.type = len(data) if kind == tarfile.REGTYPE else 0, kind
    member.linkname = "/etc/passwd"
    archive.addfile(member, io.BytesIO(data))


def shard(path: Path, **members: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            add(archive, name, data)
    return path


def as_shards(folder: Path, root: Path) -> Path:
    """The images of two classes as shards of four with .cls members, in the order of the folder."""
    paths = sorted(folder.rglob("*.png"))
    for start in range(0, len(paths), 4):
        members = {}
        for number, path in enumerate(paths[start : start + 4], start):
            members[f"{number:04d}.png"] = path.read_bytes()
            members[f"{number:04d}.cls"] = str(int(path.parent.name == "dogs")).encode()
        shard(root / f"part-{start:03d}.tar", **members)
    return root


def shards_config(root: Path) -> Config:
    return changed(photos_config(root), data={"kind": "shards"})


def test_shards_are_read_as_their_folder_is_from_any_step(tmp_path: Path) -> None:
    folder = two_classes(tmp_path / "folder")
    root = as_shards(folder, tmp_path / "shards")
    configs = [photos_config(folder), shards_config(root)]
    loaded = [load_images(config) for config in configs]
    assert [found.text.split(" in ")[0] for _, _, found in loaded] == ["16 images"] * 2
    for one, other in zip(loaded[0][:2], loaded[1][:2], strict=True):
        assert one is not None
        assert other is not None
        assert torch.equal(one.evaluation_pixels(range(len(one))), other.evaluation_pixels(range(len(other))))
        assert one.labels is not None
        assert other.labels is not None
        assert one.labels.tolist() == other.labels.tolist()
    batches = [batches_over(images, config) for (images, _, _), config in zip(loaded, configs, strict=True)]
    first, second = (part.batch(0) for part in batches)
    assert first.indices == second.indices
    assert all(torch.equal(a, b) for a, b in zip(first.views, second.views, strict=True))


def test_members_of_other_kinds_are_counted_and_no_name_is_a_path(tmp_path: Path) -> None:
    path = tmp_path / "one.tar"
    with tarfile.open(path, "w") as archive:
        for name in (
            "good.png",
            "folder/good.JPG",
            "../../outside.png",
            "/etc/absolute.png",
            "a/../b.png",
            "._hidden.png",
        ):
            add(archive, name)
        add(archive, "labels.json", b"{}")
        add(archive, "link.png", kind=tarfile.SYMTYPE)
        add(archive, "hard.png", kind=tarfile.LNKTYPE)
        add(archive, "device.png", kind=tarfile.CHRTYPE)
        add(archive, "folder", kind=tarfile.DIRTYPE)
    source = ShardSource(tmp_path)
    assert list(source.names) == ["one.tar/good.png", "one.tar/folder/good.JPG"]
    assert source.skipped == {OUTSIDE: 3, HIDDEN: 1, OTHERS: 1, NOT_FILES: 3}
    assert source.read(1) == PIXELS


def test_long_names_find_their_bytes(tmp_path: Path) -> None:
    name = "deep/" * 40 + "größe.png"
    shard(tmp_path / "a" / "one.tar", **{name: PIXELS, "small.png": encoded(noise(4), "PNG")})
    source = ShardSource(tmp_path)
    assert source.names[0] == f"a/one.tar/{name}"
    assert decode(source.read(1)).shape == (3, 4, 4)


MEMBERS = {f"{number}.png": encoded(noise(20), "PNG") for number in range(4)}  # three blocks each


@pytest.mark.parametrize(
    ("damage", "whole"),
    [
        (lambda data, at: data[: at + 700], 2),  # within the bytes of a member
        (lambda data, at: data[: at + 200], 2),  # within a header
        (lambda data, at: data[:at], 2),  # between two members
        (
            lambda data, at: data[:at] + b"?" * 512 + data[at + 512 :],
            2,
        ),  # a damaged header, which tarfile takes for the end
    ],
)
def test_a_damaged_shard_gives_what_is_whole_and_names_the_rest(
    damage: Callable[[bytes, int], bytes], whole: int, tmp_path: Path
) -> None:
    path = shard(tmp_path / "one.tar", **MEMBERS)
    with tarfile.open(path) as archive:
        at = archive.getmember("2.png").offset
    path.write_bytes(damage(path.read_bytes(), at))
    source = ShardSource(tmp_path)
    assert list(source.names) == [f"one.tar/{number}.png" for number in range(whole)]
    assert source.skipped[CUT] == 1
    assert "one.tar/" in source.notes[0]
    assert all(source.read(index) == MEMBERS[f"{index}.png"] for index in range(whole))


def test_a_shard_that_shrinks_during_the_run_is_a_bad_image(tmp_path: Path) -> None:
    path = shard(tmp_path / "one.tar", **MEMBERS)
    source = ShardSource(tmp_path)
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(UnreadableImageError, match="has been cut"):
        source.read(2)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"one.tar.gz": b"\x1f\x8b\x08\x00rest"}, "compressed with gzip; decompress it"),
        ({"one.tar": b"\x28\xb5\x2f\xfdrest"}, "compressed with zstd"),
        ({"one.tar": b"these are not archives" * 99}, "is no tar file"),
        ({"one.tar": b""}, "is no tar file"),
        ({"notes.txt": b""}, "holds no tar shard with an image"),
    ],
)
def test_files_that_are_no_shards_are_refused_in_one_sentence(
    files: dict[str, bytes], said: str, tmp_path: Path
) -> None:
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(PretrainError) as caught:
        ShardSource(tmp_path)
    assert said in str(caught.value)
    assert one_sentence(str(caught.value))


def test_classes_are_numbers_or_named_as_none(tmp_path: Path) -> None:
    classes = {"a.png": PIXELS, "a.cls": b"10", "b.png": PIXELS, "b.cls": b"9\n"}
    shard(tmp_path / "good" / "one.tar", **classes)
    labels, names = ShardSource(tmp_path / "good").labels()
    assert labels is not None
    assert (labels.tolist(), [int(name) for name in names]) == ([1, 0], [9, 10])
    shard(tmp_path / "some" / "one.tar", **classes, **{"c.png": PIXELS})
    some = ShardSource(tmp_path / "some")
    assert some.labels() == (None, [])
    assert "Only 2 of 3 images have a class" in some.notes[0]
    shard(tmp_path / "bad" / "one.tar", **{**classes, "b.cls": b"cat"})
    with pytest.raises(PretrainError, match=r"member b\.cls holds b'cat'; expected the number of a class"):
        ShardSource(tmp_path / "bad")
