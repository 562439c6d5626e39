"""Views of photographs do what their parameters say."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

from vmf_pretrain.config.views import PhotoViewConfig
from vmf_pretrain.data.photo_views import photo_view

pytestmark = pytest.mark.quick

SIDE = 32
BLUR_SIDE = 112  # of small images a blur takes next to nothing
DRAWS = 60
PLAIN = PhotoViewConfig(
    global_area=(1.0, 1.0),
    local_area=(1.0, 1.0),
    flip=0.0,
    jitter=0.0,
    grayscale=0.0,
    blur=(0.0, 0.0, 0.0),
    solarize=0.0,
)


def photo(height: int = SIDE, width: int = SIDE) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (3, height, width), generator=generator, dtype=torch.uint8)


def shares(image: Tensor) -> Tensor:
    return image.float() / 255


def ramps(side: int) -> Tensor:
    """[3, side, side] whose first channel is the place across, in bytes, and whose second the place down."""
    places = ((torch.arange(side) + 0.5) / side * 255).round().to(torch.uint8)
    return torch.stack(
        [places.expand(side, side), places[:, None].expand(side, side), torch.zeros(side, side, dtype=torch.uint8)]
    )


def shown(image: Tensor, config: PhotoViewConfig, view: int = 0, *, seed: int = 0, side: int = SIDE) -> Tensor:
    """A view of that seed."""
    return photo_view(image, view, side, config, torch.Generator().manual_seed(seed))


def test_plain_parameters_give_the_image_back() -> None:
    error = (shown(photo(), PLAIN) - shares(photo())).abs().max().item()
    assert error < 1e-5, f"off by {error:.1e}"


@pytest.mark.parametrize(("view", "area"), [(0, (0.4, 0.9)), (1, (0.4, 0.9)), (2, (0.05, 0.3)), (5, (0.05, 0.3))])
def test_crops_show_a_share_of_the_area_within_its_range(view: int, area: tuple[float, float]) -> None:
    config = replace(PLAIN, global_area=(0.4, 0.9), local_area=(0.05, 0.3))
    shares, aspects = [], []
    for seed in range(DRAWS):
        got = shown(ramps(256), config, view, seed=seed)
        width, height = ((got[place].max() - got[place].min()).item() * SIDE / (SIDE - 1) for place in (0, 1))
        shares.append(width * height)
        aspects.append(width / height)
    middle = sum(shares) / DRAWS
    assert area[0] * 0.93 < min(shares), f"smallest share {min(shares):.3f} of {area}"
    assert max(shares) < area[1] * 1.07, f"largest share {max(shares):.3f} of {area}"
    assert max(shares) - min(shares) > 0.7 * (area[1] - area[0]), f"shares from {min(shares):.3f} to {max(shares):.3f}"
    assert abs(middle / (sum(area) / 2) - 1) < 0.15, f"mean share {middle:.3f} of {area}"
    assert 0.7 < min(aspects) < 0.85, f"narrowest {min(aspects):.3f}"
    assert 1.18 < max(aspects) < 1.4, f"widest {max(aspects):.3f}"


def test_crops_lie_all_over_the_image() -> None:
    config = replace(PLAIN, global_area=(0.1, 0.1))
    middles = torch.stack([shown(ramps(128), config, seed=seed)[:2].mean(dim=(1, 2)) for seed in range(DRAWS)])
    assert (middles.amin(dim=0) < 0.25).all(), f"furthest left and up: {middles.amin(dim=0).tolist()}"
    assert (middles.amax(dim=0) > 0.75).all(), f"furthest right and down: {middles.amax(dim=0).tolist()}"


def test_flip_mirrors_the_same_crop() -> None:
    config = replace(PLAIN, global_area=(0.3, 0.8))
    mirrored = shown(photo(), replace(config, flip=1.0)).flip(2)
    error = (mirrored - shown(photo(), config)).abs().max().item()
    assert error < 1e-5, f"off by {error:.1e}"


def test_flip_comes_with_its_probability() -> None:
    plain = shown(photo(), PLAIN)
    flipped = sum(not torch.allclose(shown(photo(), replace(PLAIN, flip=0.3), seed=s), plain) for s in range(200))
    assert 40 <= flipped <= 80, f"{flipped} of 200 were flipped at a probability of 0.3"


def test_grayscale_leaves_one_shade_in_all_channels() -> None:
    got = shown(photo(), replace(PLAIN, grayscale=1.0))
    assert (got - got[:1]).abs().max() < 1e-5, f"channels differ by {(got - got[:1]).abs().max():.1e}"
    expected = functional.rgb_to_grayscale(shares(photo()))
    assert (got[:1] - expected).abs().max() < 2e-4, "torchvision has 0.2989 where Pillow has 0.299"


@pytest.mark.parametrize(("view", "inverted"), [(0, False), (1, True), (2, False)])
def test_solarize_inverts_bright_pixels_of_the_second_global_view_only(view: int, inverted: bool) -> None:
    got = shown(photo(), replace(PLAIN, solarize=1.0), view)
    expected = torch.where(shares(photo()) > 0.5, 1 - shares(photo()), shares(photo())) if inverted else shares(photo())
    assert (got - expected).abs().max() < 1e-5, f"off by {(got - expected).abs().max():.1e}"


@pytest.mark.parametrize("view", [0, 1, 2, 5])
@pytest.mark.parametrize("blurred", [0, 1, 2])
def test_blur_comes_with_the_probability_of_its_view(view: int, blurred: int) -> None:
    first, second, local = (float(blurred == place) for place in range(3))
    config, image = replace(PLAIN, blur=(first, second, local)), photo(BLUR_SIDE, BLUR_SIDE)
    got = [shown(image, config, view, seed=seed, side=BLUR_SIDE).diff(dim=2).abs().mean() for seed in range(4)]
    roughness = (min(got) / shares(image).diff(dim=2).abs().mean()).item()
    assert (roughness < 0.8) == (min(view, 2) == blurred), f"view {view} has {roughness:.2f} of its roughness"


@pytest.mark.parametrize("which", ["brightness", "contrast", "saturation", "hue"])
def test_each_part_of_the_jitter_acts_alone_and_keeps_the_range(which: str) -> None:
    nothing = replace(PLAIN, jitter=1.0, brightness=0.0, contrast=0.0, saturation=0.0, hue=0.0)
    unchanged = (shown(photo(), nothing) - shares(photo())).abs().max().item()
    amount = {which: 0.5}
    got = shown(photo(), replace(nothing, **amount))  # type: ignore[arg-type]
    assert unchanged < 1e-4, f"a jitter of nothing changes {unchanged:.1e}"
    assert (got - shares(photo())).abs().max() > 0.02, f"{which} changes {(got - shares(photo())).abs().max():.3f} only"
    assert got.min() > -1e-5
    assert got.max() < 1 + 1e-5


@pytest.mark.parametrize(("height", "width"), [(48, 80), (300, 20), (5, 3), (1, 1)])
def test_image_of_any_shape_gives_finite_views(height: int, width: int) -> None:
    for view, side in ((0, SIDE), (1, SIDE), (2, 16)):
        got = photo_view(photo(height, width), view, side, PhotoViewConfig(), torch.Generator().manual_seed(0))
        assert got.shape == (3, side, side)
        assert got.isfinite().all(), f"{int((~got.isfinite()).sum())} values are not finite"


def test_view_depends_on_its_generator_alone() -> None:
    torch.manual_seed(1)
    first = shown(photo(), PhotoViewConfig(), seed=5)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    assert torch.equal(shown(photo(), PhotoViewConfig(), seed=5), first)
    assert not torch.equal(shown(photo(), PhotoViewConfig(), seed=6), first), "another generator, the same view"
    assert torch.equal(torch.get_rng_state(), before), "the view drew from the global generator"
