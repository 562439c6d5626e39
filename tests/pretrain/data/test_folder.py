"""A folder of images: what is found in it, what is skipped, and that nothing is skipped without a word."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.pretrain.tiny import folder_images, one_sentence, photos_config, save_photos, two_classes
from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.data.decode import SUFFIXES
from vmf_pretrain.data.folder import BROKEN, CIRCLES, HIDDEN, OTHERS, RUNS, FolderSource, files_below
from vmf_pretrain.data.load import load_images
from vmf_pretrain.data.photos import Photos
from vmf_pretrain.data.source import Names

pytestmark = pytest.mark.quick

SIZE = 32  # of evaluation images
# held out of two classes of 8 by the version before folders were searched here
EARLIER = ["cats/photo_02.png", "dogs/photo_00.png", "dogs/photo_01.png", "dogs/photo_06.png"]


def names_of(images: Photos) -> list[str]:
    return [images.name(index) for index in range(len(images))]


def test_folder_is_searched_recursively_and_labelled_by_its_sub_folders(tmp_path: Path) -> None:
    save_photos(tmp_path / "b" / "deep" / "deeper", 3)
    save_photos(tmp_path / "a", 5)
    (tmp_path / "a" / "notes.txt").write_text("no image")
    train, held_out = folder_images(tmp_path, SIZE, 0.25)
    assert held_out is not None
    for images in (train, held_out):
        assert images.labels is not None
        expected = [["a", "b"].index(Path(name).parts[0]) for name in names_of(images)]
        assert images.labels.tolist() == expected, f"{images.labels.tolist()} for {names_of(images)}"
    assert len(train) + len(held_out) == 8


@pytest.mark.parametrize(("share", "kept"), [(0.25, 4), (0.5, 8), (0.001, 1)])
def test_folder_split_is_fixed_and_disjoint_and_has_its_share(share: float, kept: int, tmp_path: Path) -> None:
    two_classes(tmp_path)
    train, held_out = folder_images(tmp_path, SIZE, share)
    torch.manual_seed(123)
    again, kept_again = folder_images(tmp_path, SIZE, share)
    assert held_out is not None
    assert kept_again is not None
    assert (names_of(train), names_of(held_out)) == (names_of(again), names_of(kept_again))
    assert len(held_out) == kept, f"{len(held_out)} of 16 held out"
    assert not set(names_of(train)) & set(names_of(held_out))
    assert len({*names_of(train), *names_of(held_out)}) == 16


@pytest.mark.parametrize("folders", [["."], ["one"], [".", "one", "two"]], ids=["flat", "one class", "mixed"])
def test_without_classes_no_image_is_labelled_or_held_out(folders: list[str], tmp_path: Path) -> None:
    for name in folders:
        save_photos(tmp_path / name, 2)
    train, held_out = folder_images(tmp_path, SIZE, 0.25)
    assert train.labels is None
    assert held_out is None
    assert len(train) == 2 * len(folders)


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(PretrainError, match="is not a folder; expected one with images") as caught:
        folder_images(tmp_path / "absent", SIZE, 0.1)
    assert str(tmp_path / "absent") in str(caught.value)


def test_folder_without_images_is_named_with_the_suffixes_that_count(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(PretrainError, match=r"holds no image; .* \.jpg, \.jpeg, \.png") as caught:
        folder_images(tmp_path, SIZE, 0.1)
    assert str(tmp_path) in str(caught.value)


def test_split_is_that_of_earlier_versions(tmp_path: Path) -> None:
    two_classes(tmp_path)
    _, held_out = folder_images(tmp_path, SIZE, 0.25)
    assert held_out is not None
    assert names_of(held_out) == EARLIER


def linked_class(folder: Path, elsewhere: Path) -> None:
    save_photos(elsewhere / "tigers", 3)
    (folder / "tigers").symlink_to(elsewhere / "tigers", target_is_directory=True)


def linked_image(folder: Path, elsewhere: Path) -> None:
    save_photos(elsewhere, 1)[0].rename(elsewhere / "one.png")
    (folder / "cats" / "one.png").symlink_to(elsewhere / "one.png")


def circle(folder: Path, elsewhere: Path) -> None:
    (folder / "cats" / "up").symlink_to(folder, target_is_directory=True)
    (folder / "cats" / "itself").symlink_to(folder / "cats" / "itself")


def hidden(folder: Path, elsewhere: Path) -> None:
    save_photos(folder / "cats" / ".ipynb_checkpoints", 2)
    (folder / "cats" / "._photo_00.png").write_bytes(b"what a Mac leaves")


def others(folder: Path, elsewhere: Path) -> None:
    (folder / "labels.csv").write_text("a,b")
    os.mkfifo(folder / "cats" / "pipe.png")


def broken(folder: Path, elsewhere: Path) -> None:
    (folder / "cats" / "gone.png").symlink_to(elsewhere / "gone.png")


@pytest.mark.parametrize(
    ("change", "images", "skipped"),
    [
        (linked_class, 19, {}),
        (linked_image, 17, {}),
        (circle, 16, {CIRCLES: 2}),
        (hidden, 16, {HIDDEN: 2}),
        (others, 16, {OTHERS: 2}),
        (broken, 16, {BROKEN: 1}),
    ],
)
def test_every_entry_is_an_image_or_counted(
    change: Callable[[Path, Path], None], images: int, skipped: dict[str, int], tmp_path: Path
) -> None:
    change(two_classes(tmp_path / "data"), tmp_path / "elsewhere")
    found = load_images(photos_config(tmp_path / "data"))[2]
    assert (found.images, found.skipped) == (images, skipped)
    assert found.text.startswith(f"{images} images in {tmp_path / 'data'}, {len(found.classes)} classes"), found.text
    assert all(f"{count} {kind}" in found.text for kind, count in skipped.items()), found.text


def test_run_below_the_data_and_links_above_it_add_no_images(tmp_path: Path) -> None:
    save_photos(tmp_path / "all" / "photos", 3)
    save_photos(tmp_path / "all" / "others", 2)
    root = tmp_path / "all" / "photos"
    before, _ = files_below(root, SUFFIXES)
    save_photos(root / "runs" / "fit" / "plots", 2)
    (root / "runs" / "fit" / "config.yaml").write_text("")
    (root / "runs" / "fit" / "checkpoints").mkdir()
    (root / "up").symlink_to(tmp_path / "all")
    found, skipped = files_below(root, SUFFIXES)
    assert found == before
    assert skipped[RUNS] == 1
    assert skipped[CIRCLES] == 1


def test_folder_that_cannot_be_entered_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two_classes(tmp_path)
    original = os.scandir

    def refusing(path: Any) -> Any:
        if Path(path).name == "dogs":  # as for anyone but root; root enters every folder
            raise PermissionError(13, "Permission denied")
        return original(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(PretrainError, match="Permission denied") as caught:
        FolderSource(tmp_path)
    assert str(tmp_path / "dogs") in str(caught.value)
    assert one_sentence(str(caught.value))


def test_a_folder_below_a_hidden_one_has_images(tmp_path: Path) -> None:
    assert len(FolderSource(two_classes(tmp_path / ".cache" / "data")).names) == 16


def test_names_come_back_from_their_arrays() -> None:
    given = ["", "a/b.png", "größe.jpg", os.fsdecode(b"\xff.png")]
    names = Names(given)
    assert (list(names), len(names), names[1:3]) == (given, 4, given[1:3])
    with pytest.raises(IndexError):
        names[4]
