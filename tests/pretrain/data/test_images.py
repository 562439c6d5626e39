"""The bundled digits on their canvases; evaluation images; the split and the fingerprint."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor

from tests.pretrain.data.photo_files import BAD, colours, photos
from tests.pretrain.tiny import digits_config, one_sentence, photos_config, save_photos, two_classes
from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.data.bundled import digits
from vmf_pretrain.data.load import load_images

pytestmark = pytest.mark.quick

SIZE = 32  # of evaluation images


def ink_of(images: Tensor) -> Counter[tuple[int, bytes]]:
    """Each image cut to its ink: the width of the cut and its pixels."""
    found: Counter[tuple[int, bytes]] = Counter()
    for image in images:
        rows, columns = image.any(dim=1).nonzero(), image.any(dim=0).nonzero()
        cut = image[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        found[cut.shape[1], cut.contiguous().numpy().tobytes()] += 1
    return found


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


@pytest.mark.parametrize(("width", "height"), [(64, 48), (48, 64), (5, 3), (200, 4), (1, 1)])
def test_image_of_any_shape_becomes_a_square_for_evaluation(width: int, height: int, tmp_path: Path) -> None:
    colours().resize((width, height)).save(tmp_path / "image.png")
    batch = photos(tmp_path / "image.png", size=SIZE).evaluation_pixels([0, 0])
    assert batch.shape == (2, 3, SIZE, SIZE)
    assert batch.isfinite().all()


def test_evaluation_shows_the_middle_of_an_image(tmp_path: Path) -> None:
    pixels = np.zeros((70, 140, 3), np.uint8)
    pixels[15:55, 50:90] = 255
    Image.fromarray(pixels).save(tmp_path / "image.png")
    batch = photos(tmp_path / "image.png", size=35).evaluation_pixels([0])[0, 0]
    assert batch[17, 17] > 0.99, "the middle is dark"
    side = 40 * 40 / 70  # a bright square of 40 pixels, shrunk with the image from 70 to 40
    assert abs(batch.mean().item() - (side / 35) ** 2) < 0.02, f"{batch.mean():.3f} of the crop is bright"


def test_evaluation_takes_the_nearest_readable_image_of_the_same_class(tmp_path: Path) -> None:
    paths = [*save_photos(tmp_path / "a", 3), *save_photos(tmp_path / "b", 2)]
    paths[2].write_text("these are not pixels")
    images = photos(*paths)
    labelled = type(images)(images.source, images.indices, torch.tensor([0, 0, 0, 1, 1]), SIZE)
    shown = labelled.evaluation_pixels([2, 1])
    assert torch.equal(shown[0], shown[1])
    assert [image.name for image in labelled.bad.values()] == [str(paths[2])]


def test_evaluation_of_nothing_but_bad_images_ends_in_one_sentence(tmp_path: Path) -> None:
    paths = [tmp_path / f"{name}.jpg" for name in ("one", "two")]
    for path in paths:
        path.write_bytes(BAD["text"]())
    with pytest.raises(PretrainError, match="cannot be read") as caught:
        photos(*paths).evaluation_pixels([0])
    assert one_sentence(str(caught.value))
    assert all(str(path) in str(caught.value) for path in paths)


def test_fingerprint_changes_with_names_sizes_and_split_and_with_nothing_else(tmp_path: Path) -> None:
    two_classes(tmp_path)

    def facts(share: float = 0.25) -> object:
        return load_images(photos_config(tmp_path, data={"held_out": share}))[2].facts

    first = facts()
    assert facts() == first
    changed = [facts(0.5)]
    (tmp_path / "cats" / "photo_00.png").rename(tmp_path / "cats" / "renamed.png")
    changed.append(facts())
    (tmp_path / "cats" / "renamed.png").write_bytes(b"longer")
    changed.append(facts())
    assert all(one != first for one in changed), changed
    assert changed[1] != changed[2]


def test_digits_have_a_fingerprint_of_both_parts() -> None:
    found = load_images(digits_config())[2]
    assert (found.facts["images"], found.facts["held_out"]["images"]) == (1297, 500)
    assert found.text == "1,797 images in the bundled digits, 10 classes, 500 held out; skipped: nothing."
