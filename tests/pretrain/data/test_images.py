"""Images: the bundled digits on their canvases, and folders of files of every kind."""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor

from tests.pretrain.tiny import one_sentence, save_photos, two_classes
from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.data.images import FolderImages, digits, folder_images

pytestmark = pytest.mark.quick

EXIF_ORIENTATION = 0x0112
TURN_BY_270 = 6  # the value of a camera held upright
SIZE = 32  # of evaluation images


def ink_of(images: Tensor) -> Counter[tuple[int, bytes]]:
    """Each image cut to its ink: the width of the cut and its pixels."""
    found: Counter[tuple[int, bytes]] = Counter()
    for image in images:
        rows, columns = image.any(dim=1).nonzero(), image.any(dim=0).nonzero()
        cut = image[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        found[cut.shape[1], cut.contiguous().numpy().tobytes()] += 1
    return found


def decoded(path: Path) -> Tensor:
    return FolderImages([path], None, SIZE).decode(0)


def test_canvases_hold_every_bundled_digit_once_and_whole() -> None:
    train, held_out = digits()
    bundled = torch.from_numpy(load_digits().images / 16).float()
    assert ink_of(torch.cat([train.canvases, held_out.canvases])) == ink_of(bundled)


def test_digits_are_split_the_same_way_every_time_whatever_the_global_seed() -> None:
    first = digits()
    torch.manual_seed(123)
    second = digits()
    assert [len(part) for part in first] == [1297, 500]
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.canvases, other.canvases)
        assert torch.equal(one.labels, other.labels)


def test_digits_leave_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    digits()
    assert torch.equal(torch.get_rng_state(), before), "loading the digits drew from the global generator"


def test_digits_labels_follow_their_images() -> None:
    train, held_out = digits()
    counts = torch.cat([train.labels, held_out.labels]).bincount().tolist()
    assert counts == np.bincount(load_digits().target).tolist()
    some = train.subset(torch.tensor([5, 2]))
    assert torch.equal(some.labels, train.labels[[5, 2]])
    assert torch.equal(some.evaluation_pixels([1]), train.canvases[2][None, None])


def test_digits_lie_all_over_the_canvas() -> None:
    corners = digits()[0].middles.round().unique(dim=0)
    assert len(corners) > 80, f"only {len(corners)} places of a digit's middle"


def test_folder_is_searched_recursively_and_labelled_by_its_sub_folders(tmp_path: Path) -> None:
    save_photos(tmp_path / "b" / "deep" / "deeper", 3)
    save_photos(tmp_path / "a", 5)
    (tmp_path / "a" / "notes.txt").write_text("no image")
    train, held_out = folder_images(tmp_path, SIZE, 0.25)
    assert held_out is not None
    for images in (train, held_out):
        assert images.labels is not None
        expected = [["a", "b"].index(path.relative_to(tmp_path).parts[0]) for path in images.paths]
        assert images.labels.tolist() == expected, f"{images.labels.tolist()} for {images.paths}"
    assert len(train) + len(held_out) == 8


@pytest.mark.parametrize(("share", "kept"), [(0.25, 4), (0.5, 8), (0.001, 1)])
def test_folder_split_is_fixed_and_disjoint_and_has_its_share(share: float, kept: int, tmp_path: Path) -> None:
    two_classes(tmp_path)
    train, held_out = folder_images(tmp_path, SIZE, share)
    torch.manual_seed(123)
    again, kept_again = folder_images(tmp_path, SIZE, share)
    assert held_out is not None
    assert kept_again is not None
    assert (train.paths, held_out.paths) == (again.paths, kept_again.paths)
    assert len(held_out) == kept, f"{len(held_out)} of 16 held out"
    assert not set(train.paths) & set(held_out.paths)
    assert len(set(train.paths) | set(held_out.paths)) == 16


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


def gradient(side: int = 16) -> np.ndarray:
    """A ramp from dark at the left to bright at the right, 8 bits."""
    return np.tile(np.linspace(0, 255, side).round().astype(np.uint8), (side, 1))


def colours() -> Image.Image:
    return Image.fromarray(np.dstack([gradient(), gradient().T, np.full((16, 16), 128, np.uint8)]))


def save_kind(kind: str, folder: Path) -> Path:
    """The ramp, or the colours, stored the way ``kind`` says."""
    path = folder / f"image{'.jpg' if kind == 'cmyk jpeg' else '.tif' if 'tiff' in kind else '.PNG'}"
    images = {
        "rgb": colours,
        "rgba": lambda: colours().convert("RGBA"),
        "palette": lambda: colours().quantize(256),
        "cmyk jpeg": lambda: colours().convert("CMYK"),
        "grayscale": lambda: Image.fromarray(gradient()),
        "grayscale with alpha": lambda: Image.fromarray(gradient()).convert("LA"),
        "palette with transparency": lambda: Image.fromarray(gradient()).quantize(256),
        "16-bit": lambda: Image.fromarray(gradient().astype(np.uint16) * 257),
        "16-bit tiff": lambda: Image.fromarray(gradient().astype(np.uint16) * 257),
    }
    image = images[kind]()
    if kind == "palette with transparency":
        image.info["transparency"] = 0
    image.save(path)
    return path


COLOURED = {"rgb": 0.0, "rgba": 0.0, "palette": 0.2, "cmyk jpeg": 0.1}  # largest error of a pixel
GRAY = ["grayscale", "grayscale with alpha", "palette with transparency", "16-bit", "16-bit tiff"]


@pytest.mark.parametrize("kind", list(COLOURED))
def test_colours_survive_every_way_of_storing_them(kind: str, tmp_path: Path) -> None:
    expected = torch.from_numpy(np.asarray(colours()).copy()).permute(2, 0, 1) / 255
    error = (decoded(save_kind(kind, tmp_path)) - expected).abs().max().item()
    assert error <= COLOURED[kind] + 1e-6, f"{kind} is off by {error:.3f} of the range"


@pytest.mark.parametrize("kind", GRAY)
def test_shades_survive_every_way_of_storing_them(kind: str, tmp_path: Path) -> None:
    expected = torch.from_numpy(gradient()).expand(3, 16, 16) / 255
    got = decoded(save_kind(kind, tmp_path))
    assert got.shape == (3, 16, 16)
    error = (got - expected).abs().max().item()
    assert error <= 0.01, f"{kind} is off by {error:.3f} of the range"


def test_orientation_that_the_camera_noted_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = TURN_BY_270
    wide = colours().crop((0, 0, 16, 8))
    wide.save(tmp_path / "plain.png")
    wide.save(tmp_path / "turned.png", exif=exif)
    plain, turned = decoded(tmp_path / "plain.png"), decoded(tmp_path / "turned.png")
    assert torch.equal(turned, plain.rot90(-1, dims=(1, 2))), f"shapes {tuple(plain.shape)} and {tuple(turned.shape)}"


def broken_files(folder: Path) -> dict[str, Path]:
    whole = save_photos(folder, 1)[0]
    files = {name: folder / f"{name}.jpg" for name in ("text", "empty", "cut", "gif")}
    files["text"].write_text("these are not pixels")
    files["empty"].write_bytes(b"")
    files["cut"].write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    Image.fromarray(gradient()).save(files["gif"], format="GIF")
    return files


@pytest.mark.parametrize("kind", ["text", "empty", "cut", "gif"])
def test_unreadable_file_is_named_in_one_sentence(kind: str, tmp_path: Path) -> None:
    path = broken_files(tmp_path)[kind]
    with pytest.raises(PretrainError, match="cannot be read") as caught:
        decoded(path)
    message = str(caught.value)
    assert one_sentence(message), message
    assert str(path) in message, message


def test_image_that_would_fill_the_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_photos(tmp_path, 1)[0]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(PretrainError, match="cannot be read"):
        decoded(path)


@pytest.mark.parametrize(("width", "height"), [(64, 48), (48, 64), (5, 3), (200, 4), (1, 1)])
def test_image_of_any_shape_becomes_a_square_for_evaluation(width: int, height: int, tmp_path: Path) -> None:
    colours().resize((width, height)).save(tmp_path / "image.png")
    batch = FolderImages([tmp_path / "image.png"], None, SIZE).evaluation_pixels([0, 0])
    assert batch.shape == (2, 3, SIZE, SIZE)
    assert batch.isfinite().all()


def test_evaluation_shows_the_middle_of_an_image(tmp_path: Path) -> None:
    pixels = np.zeros((70, 140, 3), np.uint8)
    pixels[15:55, 50:90] = 255
    Image.fromarray(pixels).save(tmp_path / "image.png")
    batch = FolderImages([tmp_path / "image.png"], None, 35).evaluation_pixels([0])[0, 0]
    assert batch[17, 17] > 0.99, "the middle is dark"
    side = 40 * 40 / 70  # a bright square of 40 pixels, shrunk with the image from 70 to 40
    assert abs(batch.mean().item() - (side / 35) ** 2) < 0.02, f"{batch.mean():.3f} of the crop is bright"
