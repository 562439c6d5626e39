"""The bundled digits and animals on their canvases; evaluation images; the split and the fingerprint."""

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
from tests.pretrain.tiny import animals_config, digits_config, one_sentence, photos_config, save_photos, two_classes
from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.config.run import Config
from vmf_pretrain.data.animals import ANIMAL_SIDE, animals
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


def test_animals_are_ten_and_none_is_on_both_sides() -> None:
    train, held_out = animals()
    assert train.labels.bincount().tolist() == [737, 612, 792, 796, 797, 800, 800, 797, 785, 800]
    assert held_out.labels.bincount().tolist() == [200] * 10
    pixels = torch.cat([train.silhouettes, held_out.silhouettes]).flatten(1)
    assert pixels.unique().tolist() == [0, 1, 2, 3], "four levels of gray"
    assert len(pixels.unique(dim=0)) == 9716, "some are alike"


def test_animals_are_evaluated_at_places_and_in_sizes_that_do_not_depend_on_their_company() -> None:
    train, held_out = animals()
    some = train.subset(torch.tensor([5, 7000, 900]))
    shown = train.evaluation_pixels([900, 5])
    assert torch.equal(some.evaluation_pixels([2, 0]), shown)
    assert shown.shape == (2, 1, 40, 40)
    drawn = held_out.evaluation_pixels(range(len(held_out)))[:, 0]
    assert torch.equal(held_out.evaluation_pixels([3]), drawn[3][None, None])
    shares = drawn.sum(dim=(1, 2)) / held_out.placed(range(len(held_out))).canvases.sum(dim=(1, 2))
    assert 0.34 < shares.min() < 0.4, f"the smallest has {shares.min():.3f} of its area, expected nearly 0.6 squared"
    assert 0.9 < shares.max() < 1.02, f"the largest has {shares.max():.3f} of its area"
    middles = [image.nonzero().float().mean(dim=0) for image in drawn]
    spread = torch.stack(middles).std(dim=0)
    assert spread.min() > 3, f"middles spread by {spread.tolist()} pixels, where places reach 6 either way"


def test_an_animal_is_named_by_its_place_in_the_file() -> None:
    train, held_out = animals()
    assert train.name(0) == "bear 0"
    assert [train.name(7715), held_out.name(1999)][1].startswith("zebra ")
    assert train.decode(0).shape == (1, 40, 40)
    assert train.decode(0)[0, 6:34, 6:34].shape == (ANIMAL_SIDE, ANIMAL_SIDE)
    assert torch.equal(train.decode(0)[0, 6:34, 6:34] * 3, train.silhouettes[0].float())


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


@pytest.mark.parametrize(
    ("config", "counts", "text"),
    [
        (
            digits_config(),
            (1297, 500),
            "1,797 images in the bundled digits, 10 classes, 500 held out; skipped: nothing.",
        ),
        (
            animals_config(),
            (7716, 2000),
            "9,716 images in the bundled animals, 10 classes, 2,000 held out; skipped: nothing.",
        ),
    ],
    ids=["digits", "animals"],
)
def test_bundled_images_have_a_fingerprint_of_both_parts(config: Config, counts: tuple[int, int], text: str) -> None:
    found = load_images(config)[2]
    assert (found.facts["images"], found.facts["held_out"]["images"]) == counts
    assert found.text == text
