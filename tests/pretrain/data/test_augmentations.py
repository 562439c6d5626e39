"""Views and evaluated images are made as the table of the sources says: recipes by setting, code by what it does."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torch import Tensor
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as on_pillow

from tests.pretrain.data.photo_files import noise
from vmf_pretrain.config.views import PhotoViewConfig
from vmf_pretrain.data import colour, photo_views
from vmf_pretrain.data.clips import clip_view
from vmf_pretrain.data.network_input import network_input
from vmf_pretrain.data.photo_views import Draws, crop_box, photo_view
from vmf_pretrain.data.photos import centred
from vmf_pretrain.recipes.table import recipe_of

pytestmark = pytest.mark.quick

TABLE: dict[str, dict[str, Any]] = yaml.safe_load((Path(__file__).parent / "augmentations.yaml").read_text())
COLOURED = [name for name, row in TABLE.items() if "blur_radius" in row]
RECIPES = [(row, name) for row, entries in TABLE.items() for name in entries["recipes"]]
SIDE = 48
MIDDLE = Draws(
    [0.5] * 20, [0.5] * 2, [0.0, 0.1, 0.2, 0.3], [0.5] * 4, 1.0, 1.0, 1.0, 1.0, 0.5, 1.0
)  # nothing but a crop
GENERATOR = torch.Generator()
config_named = functools.cache(lambda name: recipe_of(name).config)


def photo_config(row: str, **changes: Any) -> PhotoViewConfig:
    """The settings of a row, as the recipes hold them."""
    values: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in TABLE[row]["photos"].items()
    }
    return replace(PhotoViewConfig(**values), **changes)


def picture(width: int = 100, height: int = 80) -> Image.Image:
    return noise(8).resize((width, height), Image.Resampling.BICUBIC)


def tensor_of(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def drawn(draws: Draws, patch: pytest.MonkeyPatch) -> None:
    """Views draw these numbers."""
    patch.setattr(photo_views.Draws, "of", lambda generator: draws)


def error(view: Tensor, image: Image.Image) -> float:
    """Mean difference in bytes."""
    return float((255 * view - tensor_of(image).float()).abs().mean())


# Recipes


@pytest.mark.parametrize(("row", "name"), RECIPES)
def test_recipe_has_the_settings_of_its_source(row: str, name: str) -> None:
    config, entry = config_named(name), TABLE[row]
    found = {**asdict(config.views.photos), **{key: getattr(config.views, key) for key in entry["views"]}}
    wanted = {**entry["photos"], **entry["recipes"][name], **entry["views"]}
    wrong = {key: (found[key], value) for key, value in wanted.items() if _listed(found[key]) != value}
    assert not wrong, f"ours and the source's: {wrong}"
    fed = network_input(config)
    assert {"mean": list(fed.mean), "deviation": list(fed.deviation)} == entry["normalise"]


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def test_every_recipe_of_a_source_is_in_the_table() -> None:
    from vmf_pretrain.recipes.table import recipe_names

    ours = ("small_", "cifar_", "digits", "animals")  # smaller views than any source has
    assert {name for _, name in RECIPES} == {name for name in recipe_names() if not name.startswith(ours)}


# Code


@pytest.mark.parametrize("row", TABLE)
@pytest.mark.parametrize("size", [(20, 300), (300, 20), (100, 101)])
def test_crop_that_never_fits_is_torchvisions_in_the_middle(row: str, size: tuple[int, int]) -> None:
    aspect = tuple(TABLE[row]["photos"]["aspect"])
    assert (TABLE[row]["fallback"], TABLE[row]["crop_tries"]) == ("centred", photo_views.CROP_TRIES)
    image = torch.zeros(3, *size)
    expected = RandomResizedCrop.get_params(image, [1.5, 1.5], list(aspect))  # more than all of the image
    assert crop_box(*size, (1.5, 1.5), aspect, MIDDLE) == tuple(expected)


@pytest.mark.parametrize("row", TABLE)
@pytest.mark.parametrize(("share", "shape"), [(0.0, 0.0), (0.0, 0.999999), (0.999999, 0.0), (0.5, 0.5)])
def test_crops_have_the_areas_and_aspects_of_the_table(row: str, share: float, shape: float) -> None:
    low, high = TABLE[row]["photos"]["aspect"]
    draws = replace(MIDDLE, crops=[share, shape] * 10)
    _, _, height, width = crop_box(10_000, 10_000, (0.05, 0.4), (low, high), draws)
    assert width / height == pytest.approx(low * (high / low) ** shape, rel=1e-3)
    assert width * height == pytest.approx((0.05 + 0.35 * share) * 1e8, rel=1e-3)


@pytest.mark.parametrize("row", TABLE)
def test_crops_are_resized_as_the_table_says(row: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To a rounding of bytes from Pillow's way of that name, and further from the other."""
    drawn(MIDDLE, monkeypatch)
    image = noise(100)
    config = photo_config(row, global_area=(0.25, 0.25), aspect=(1.0, 1.0), blur=(0.0, 0.0, 0.0))
    crop = tensor_of(image)
    got = photo_view(crop, 0, 20, config, GENERATOR)
    far = {
        way: error(
            got, on_pillow.resized_crop(image, 25, 25, 50, 50, [20, 20], interpolation=on_pillow.InterpolationMode(way))
        )
        for way in ("bicubic", "bilinear")
    }
    way = TABLE[row]["photos"]["interpolation"]
    assert min(far, key=far.__getitem__) == way
    assert far[way] < 0.6, f"{far} of 255"
    assert torch.equal(clip_view(crop[None], 20, config, GENERATOR)[0], got), "a clip is cropped otherwise"


@pytest.mark.parametrize("order", list(itertools.permutations(range(4)))[::5])
def test_jitter_has_the_drawn_order(order: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Brightness, contrast, saturation and hue in any order, as torchvision on Pillow's images."""
    assert {TABLE[row]["jitter_order"] for row in COLOURED} == {"random"}
    amounts = [0.9, 0.1, 0.8, 0.7]
    keys = [0.0] * 4
    for place, part in enumerate(order):
        keys[part] = place / 4
    drawn(replace(MIDDLE, jitter=0.0, order=keys, amounts=amounts), monkeypatch)
    config = photo_config("dino", global_area=(1.0, 1.0), aspect=(1.0, 1.0), blur=(0.0, 0.0, 0.0))
    parts: list[Callable[[Image.Image], Image.Image]] = [
        lambda image: ImageEnhance.Brightness(image).enhance(1 + 0.4 * 0.8),
        lambda image: ImageEnhance.Contrast(image).enhance(1 - 0.4 * 0.8),
        lambda image: ImageEnhance.Color(image).enhance(1 + 0.2 * 0.6),
        lambda image: on_pillow.adjust_hue(image, 0.1 * 0.4),
    ]
    image = picture(SIDE, SIDE)
    far = []
    for chain in (order, order[::-1]):
        expected = image
        for part in chain:
            expected = parts[part](expected)
        far.append(error(photo_view(tensor_of(image), 0, SIDE, config, GENERATOR), expected))
    assert far[0] < 2.5, f"{far[0]:.2f} of 255; Pillow rounds each part to bytes, and hues to 256 steps"
    assert far[1] > 1.5 * far[0], f"the order makes no difference: {far}"


@pytest.mark.parametrize("row", COLOURED)
def test_blur_has_the_radii_of_the_table_at_any_side(row: str, monkeypatch: pytest.MonkeyPatch) -> None:
    radii: list[float] = []

    def blur(planes: colour.Planes, radius: float) -> colour.Planes:
        radii.append(radius)
        return planes

    monkeypatch.setattr(colour, "blur", blur)
    config = photo_config(row, blur=(1.0, 1.0, 1.0))
    for side, share in itertools.product((16, 64), (0.0, 1.0)):
        drawn(replace(MIDDLE, blur=0.0, radius=share), monkeypatch)
        photo_view(tensor_of(picture()), 0, side, config, GENERATOR)
    assert radii == TABLE[row]["blur_radius"] * 2


# what is drawn for an operation, its probabilities by view, and the operation
CHANCES = [
    ("jitter", "jitter", "brightness"),
    ("grayscale", "grayscale", "grayscale"),
    ("blur", "blur", "blur"),
    ("solarize", "solarize", "solarize"),
]


@pytest.mark.parametrize("row", TABLE)
@pytest.mark.parametrize("view", [0, 1, 2])
def test_operations_come_with_the_probabilities_of_the_table(
    row: str, view: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    def operate(name: str, planes: colour.Planes, *_: Any) -> colour.Planes:
        done.append(name)
        return planes

    for name in {operation for *_, operation in CHANCES}:
        monkeypatch.setattr(colour, name, functools.partial(operate, name))
    config, image = photo_config(row), tensor_of(picture())
    for draw, setting, operation in CHANCES:
        given = TABLE[row]["photos"][setting]
        chance = given[view] if isinstance(given, list) else given * (setting != "solarize" or view == 1)
        for number, wanted in ((chance - 1e-6, chance > 0), (chance, False)):
            if 0 <= number < 1:
                done.clear()
                drawn(replace(MIDDLE, **{draw: number}), monkeypatch)
                photo_view(image, view, 16, config, GENERATOR)
                assert (operation in done) == wanted, f"{operation} at {number}: {done}"


@pytest.mark.parametrize("row", COLOURED)
def test_operations_are_done_in_the_order_of_the_table(row: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them on one view, as Pillow does them one after the other."""
    drawn(Draws([0.5] * 20, [0.5] * 2, [0.0, 0.1, 0.2, 0.3], [0.9] * 4, 0.0, 0.0, 1.0, 0.0, 1.0, 0.0), monkeypatch)
    config = photo_config(row, global_area=(1.0, 1.0), aspect=(1.0, 1.0), blur=(1.0, 1.0, 1.0), hue=0.0)
    image = picture(SIDE, SIDE)
    steps: dict[str, Callable[[Image.Image], Image.Image]] = {
        "crop": lambda image: image,
        "flip": ImageOps.mirror,
        "jitter": lambda image: ImageEnhance.Color(
            ImageEnhance.Contrast(ImageEnhance.Brightness(image).enhance(1.32)).enhance(1.32)
        ).enhance(1.16),
        "grayscale": lambda image: image,
        "blur": lambda image: image.filter(ImageFilter.GaussianBlur(2.0)),
        "solarize": lambda image: ImageOps.solarize(image, TABLE[row]["solarize_from"]),
    }
    got = photo_view(tensor_of(image), 1, SIDE, config, GENERATOR)
    order = TABLE[row]["order"]
    far = []
    for chain in (order, [*order[:-2], order[-1], order[-2]]):
        expected = image
        for step in chain:
            expected = steps[step](expected)
        far.append(error(got, expected))
    assert far[0] < 3, f"{far[0]:.2f} of 255"
    assert far[1] > 2 * far[0], f"solarizing before the blur is as near: {far}"


@pytest.mark.parametrize("row", [name for name, entries in TABLE.items() if "evaluation" in entries])
@pytest.mark.parametrize("size", [(300, 400), (500, 280)])
def test_evaluated_images_are_the_published_crop(row: str, size: tuple[int, int]) -> None:
    wanted, image = TABLE[row]["evaluation"], picture(size[1], size[0])
    way = on_pillow.InterpolationMode(wanted["interpolation"])
    resized = on_pillow.resize(image, wanted["resize"], interpolation=way)
    expected = on_pillow.center_crop(resized, [wanted["crop"]] * 2)
    got = centred(tensor_of(image), wanted["crop"])
    assert error(got, expected) < 0.6, f"{error(got, expected):.2f} of 255"
