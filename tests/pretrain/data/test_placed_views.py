"""Views of bundled images do what their parameters say."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.pretrain.tiny import some_digits
from vmf_pretrain.config.views import DigitViewConfig
from vmf_pretrain.data.placed_views import UNIFORM_DRAWS, Placed, affine_views, draw, ink_middles, placed_view

pytestmark = pytest.mark.quick

CANVAS = 16
ZOOM, ROTATION, SHIFT_X, SHIFT_Y, GAIN = range(UNIFORM_DRAWS)
STILL = DigitViewConfig(
    global_zoom=(1.0, 1.0), local_zoom=(1.0, 1.0), local_shift=0.0, rotation=0.0, gain=0.0, noise=0.0
)
DIGITS = some_digits(64)


def about(images: Tensor, middles: Tensor | None = None) -> Placed:
    """Images of a digit's size, turned about the middle of their ink if no other is given."""
    return Placed(images, ink_middles(images) if middles is None else middles, 8)


def square(side: int) -> Tensor:
    """[1, CANVAS, CANVAS] a square of ink in the middle of the canvas."""
    canvas, edge = torch.zeros(1, CANVAS, CANVAS), (CANVAS - side) // 2
    canvas[:, edge : edge + side, edge : edge + side] = 1.0
    return canvas


def drawn(**numbers: float) -> Tensor:
    """[1, UNIFORM_DRAWS] zeros but for the named numbers."""
    uniform = torch.zeros(1, UNIFORM_DRAWS)
    for name, value in numbers.items():
        uniform[0, globals()[name.upper()]] = value
    return uniform


def views(config: DigitViewConfig, side: int = CANVAS, *, epoch: int = 0, view: int = 0) -> Tensor:
    """[64, side, side] views of the digits."""
    return placed_view(
        DIGITS.placed(range(len(DIGITS))),
        seed=0,
        epoch=epoch,
        indices=list(range(len(DIGITS))),
        view=view,
        side=side,
        config=config,
    ).squeeze(1)


def test_still_parameters_give_a_centred_image_back() -> None:
    image = square(4)
    got = affine_views(about(image), drawn(), STILL, CANVAS)
    error = (got - image).abs().max().item()
    assert error < 1e-5, f"off by {error:.1e}"


@pytest.mark.parametrize("zoom", [0.5, 1.5, 2.0])
def test_zoom_magnifies_the_area_by_its_square(zoom: float) -> None:
    image = square(6)
    got = affine_views(about(image), drawn(), replace(STILL, global_zoom=(zoom, zoom)), CANVAS)
    ratio = (got.sum() / image.sum()).item()
    assert abs(ratio / zoom**2 - 1) < 0.03, f"area grew {ratio:.3f}-fold, expected {zoom**2}"


@pytest.mark.parametrize(("number", "zoom"), [(-1.0, 0.8), (0.0, 1.0), (1.0, 1.25)])
def test_zoom_goes_from_its_low_to_its_high_end(number: float, zoom: float) -> None:
    image = square(8)
    got = affine_views(about(image), drawn(zoom=number), replace(STILL, global_zoom=(0.8, 1.25)), CANVAS)
    side = got.sum().sqrt().item() / 8
    assert abs(side / zoom - 1) < 0.03, f"magnified by {side:.3f}, expected {zoom}"


def test_rotation_turns_by_its_angle_either_way() -> None:
    image = square(4)
    image[0, 6, 4:6] = 1.0  # an arm, so that a turn shows
    config = replace(STILL, rotation=90.0)
    one, other = (
        affine_views(about(image, torch.zeros(1, 2)), drawn(rotation=way), config, CANVAS) for way in (1.0, -1.0)
    )
    errors = {way: (one - image.rot90(way, dims=(1, 2))).abs().max().item() for way in (-1, 1)}
    way = min(errors, key=errors.__getitem__)
    assert errors[way] < 1e-4, f"no quarter turn: off by {errors}"
    error = (other - image.rot90(-way, dims=(1, 2))).abs().max().item()
    assert error < 1e-4, f"the negative number does not turn the other way: off by {error:.1e}"


def test_small_rotation_keeps_the_ink_and_its_middle() -> None:
    image = square(6)
    turned = affine_views(about(image), drawn(rotation=1.0), replace(STILL, rotation=30.0), CANVAS)
    assert abs(turned.sum().item() / 36 - 1) < 0.02, f"{turned.sum():.2f} of 36 pixels of ink are left"
    assert ink_middles(turned).abs().max() < 0.05, f"the middle moved to {ink_middles(turned).tolist()}"


@pytest.mark.parametrize(("x", "y"), [(1.0, 0.0), (0.0, -1.0), (-0.5, 0.5)])
def test_global_view_puts_the_digit_where_its_numbers_say(x: float, y: float) -> None:
    image = square(4)
    got = affine_views(about(image), drawn(shift_x=x, shift_y=y), STILL, CANVAS)
    error = (ink_middles(got) - 4 * torch.tensor([x, y])).abs().max().item()
    assert error < 0.01, f"the middle is at {ink_middles(got).tolist()}, expected {[4 * x, 4 * y]}"


def test_place_in_a_global_view_does_not_depend_on_the_place_on_the_canvas() -> None:
    at_middle = square(4)
    moved = at_middle.roll((3, -2), dims=(1, 2))
    some, others = (affine_views(about(image), drawn(), STILL, CANVAS) for image in (at_middle, moved))
    assert (some - others).abs().max() < 1e-4, f"off by {(some - others).abs().max():.1e}"


def test_global_views_keep_the_whole_digit() -> None:
    shares = views(STILL).sum(dim=(1, 2)) / DIGITS.canvases.sum(dim=(1, 2))
    assert shares.min() > 0.9, f"a view holds {shares.min():.3f} of its digit's ink"


def test_local_view_is_the_part_around_the_middle() -> None:
    image = torch.rand(1, CANVAS, CANVAS)
    got = affine_views(about(image, torch.zeros(1, 2)), drawn(), STILL, 8)
    error = (got - image[:, 4:12, 4:12]).abs().max().item()
    assert error < 1e-5, f"off by {error:.1e}"


def test_local_view_looks_no_further_than_its_shift() -> None:
    image = square(2)
    got = affine_views(about(image), drawn(shift_x=1.0), replace(STILL, local_shift=2.0), 8)
    assert (ink_middles(got) - torch.tensor([2.0, 0.0])).abs().max() < 0.01, f"middle {ink_middles(got).tolist()}"


def test_gain_scales_each_view_by_its_own_factor_within_its_range() -> None:
    factors = views(replace(STILL, gain=0.3)).sum(dim=(1, 2)) / views(STILL).sum(dim=(1, 2))
    assert 0.7 <= factors.min() < 0.8, f"smallest factor {factors.min():.3f}"
    assert 1.2 < factors.max() <= 1.3, f"largest factor {factors.max():.3f}"


def test_noise_has_its_deviation_and_no_mean() -> None:
    noise = views(replace(STILL, noise=0.05)) - views(STILL)
    assert abs(noise.std().item() / 0.05 - 1) < 0.03, f"deviation {noise.std():.4f}"
    assert abs(noise.mean().item()) < 0.002, f"mean {noise.mean():.4f}"


@pytest.mark.parametrize("side", [16, 8])
def test_views_have_their_shape_and_stay_near_the_range_of_ink(side: int) -> None:
    got = views(DigitViewConfig(noise=0.0), side)
    assert got.shape == (64, side, side)
    assert got.min() >= 0, f"smallest value {got.min():.3f}"
    assert got.max() <= 1.1 + 1e-6, f"largest value {got.max():.3f}"


def test_flip_mirrors_the_image_about_its_own_middle_wherever_it_is_put() -> None:
    image = square(4)
    image[0, 6, 4:6] = 1.0  # an arm, so that a flip shows
    placed, numbers = about(image), drawn(shift_x=0.5)
    both = [affine_views(placed, numbers, STILL, CANVAS, flipped=torch.tensor([way])) for way in (False, True)]
    expected = both[0].flip(2).roll(4, dims=2)  # the place in the view is 2 to the right of its middle
    error = (both[1] - expected).abs().max().item()
    assert error < 1e-5, f"off by {error:.1e}"


def test_as_many_views_are_mirrored_as_the_share_says() -> None:
    plain, mirrored = views(STILL), views(replace(STILL, flip=1.0))
    mixed = views(replace(STILL, flip=0.5))
    ways = [[torch.equal(one, other) for one, other in zip(mixed, some, strict=True)] for some in (plain, mirrored)]
    assert all(one or other for one, other in zip(*ways, strict=True)), "a view is neither"
    assert 16 < sum(ways[1]) < 48, f"{sum(ways[1])} of 64 are mirrored"


def test_random_numbers_of_a_row_do_not_depend_on_its_batch() -> None:
    together, alone = draw(1, 2, [5, 7, 9], 3, 8), draw(1, 2, [7], 3, 8)
    assert all(torch.equal(some[1], one[0]) for some, one in zip(together, alone, strict=True))


def test_random_numbers_fill_their_range() -> None:
    uniform, normal, flip = draw(0, 0, list(range(400)), 0, 4)
    assert uniform.min() >= -1
    assert uniform.max() < 1
    assert uniform.abs().amax(dim=0).min() > 0.9, f"largest of each number: {uniform.abs().amax(dim=0).tolist()}"
    assert abs(normal.std().item() - 1) < 0.05, f"deviation {normal.std():.3f}"
    assert abs(flip.mean().item() - 0.5) < 0.05, f"mean {flip.mean():.3f}"


def test_ink_middles_are_means_of_places_weighted_by_ink() -> None:
    images = torch.rand(3, CANVAS, CANVAS)
    for image, middle in zip(images, ink_middles(images), strict=True):
        rows, columns = torch.meshgrid(torch.arange(CANVAS), torch.arange(CANVAS), indexing="ij")
        expected = [((place - 7.5) * image).sum() / image.sum() for place in (columns, rows)]
        assert torch.allclose(middle, torch.stack(expected), atol=1e-5), f"{middle.tolist()} is not {expected}"


def test_image_without_ink_has_its_middle_in_the_middle() -> None:
    assert torch.equal(ink_middles(torch.zeros(1, CANVAS, CANVAS)), torch.zeros(1, 2))
