"""Masks of patches: how many are hidden, where, and that a mask depends on its own generators only.

The figures are those of the published samplers, run on 20,000 views of 14 x 14 patches (bytedance/ibot loader.py with ratios 0
and 0.3 and spreads 0 and 0.2; facebookresearch/dinov2 collate.py and masking.py with batches of 128 views).
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Generator

from vmf_pretrain.data.masks import MASK, RatioMasks, SpreadMasks, Uniforms, hide_blocks
from vmf_pretrain.data.plan import MaskSampler

pytestmark = pytest.mark.quick

GRID = (14, 14)
IMAGES, VIEWS, BATCHES = 64, 2, 24
SAMPLERS: dict[str, MaskSampler] = {
    "ibot": RatioMasks(GRID, VIEWS, (0.0, 0.3), (0.0, 0.2)),
    "dinov2": SpreadMasks(GRID, VIEWS, 0.5, (0.1, 0.5)),
}
# mean and deviation of the hidden share, share of whole views, how often corner, border and middle are hidden, and how often a
# hidden patch has a hidden one on its right; with what 3,000 views may differ from them
PUBLISHED = {
    "ibot": {
        "mean": 0.147,
        "sd": 0.168,
        "whole": 0.5,
        "corner": 0.015,
        "border": 0.051,
        "middle": 0.282,
        "pairs": 0.849,
    },
    "dinov2": {
        "mean": 0.1485,
        "sd": 0.1695,
        "whole": 0.5,
        "corner": 0.022,
        "border": 0.059,
        "middle": 0.257,
        "pairs": 0.811,
    },
}
WITHIN = {"mean": 0.012, "sd": 0.006, "whole": 0.035, "corner": 0.006, "border": 0.009, "middle": 0.025, "pairs": 0.012}


def generators(batch: int) -> list[Generator]:
    return [Generator().manual_seed(1000 * batch + image) for image in range(IMAGES)]


def batch_of(name: str, batch: int) -> np.ndarray:
    """[images, views, H, W]."""
    return SAMPLERS[name].draw(generators(batch))[MASK].numpy()


def figures(masks: np.ndarray) -> dict[str, float]:
    """Of [views, H, W]."""
    hidden = masks.mean(axis=(1, 2))
    covered = masks.mean(axis=0)
    borders = [covered[0], covered[-1], covered[:, 0], covered[:, -1]]
    return {
        "mean": hidden.mean(),
        "sd": hidden.std(),
        "whole": (hidden == 0).mean(),
        "corner": covered[[0, 0, -1, -1], [0, -1, 0, -1]].mean(),
        "border": np.mean(borders),
        "middle": covered[6:8, 6:8].mean(),
        "pairs": (masks[:, :, 1:] & masks[:, :, :-1]).sum() / masks[:, :, :-1].sum(),
    }


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_masks_are_distributed_as_the_published_ones(name: str) -> None:
    masks = np.concatenate([batch_of(name, batch).reshape(-1, *GRID) for batch in range(BATCHES)])
    for figure, value in figures(masks).items():
        expected = PUBLISHED[name][figure]
        assert abs(value - expected) <= WITHIN[figure], f"{figure} is {value:.4f}, published {expected}"


def test_masks_of_dinov2_are_half_of_the_views_in_even_steps_below_the_bound() -> None:
    sampler = SAMPLERS["dinov2"]
    assert isinstance(sampler, SpreadMasks)
    assert sampler.most_hidden(IMAGES) == 3771  # as published for 64 images
    for batch in range(4):
        counts = np.sort(batch_of("dinov2", batch).sum(axis=(2, 3)).ravel())
        assert (counts[:64] == 0).all()
        ceilings = np.floor(196 * np.linspace(0.1, 0.5, 65)[1:])
        assert (counts[64:] <= ceilings).all(), "a view hides more than its step allows"
        assert 3650 < counts.sum() <= 3771


def test_mask_of_an_image_depends_on_its_own_generator_only() -> None:
    alone, together = (SAMPLERS["ibot"].draw(part)[MASK] for part in (generators(0)[3:5], generators(0)))
    assert torch.equal(alone, together[3:5])
    assert not torch.equal(together[0], together[1])
    again = SAMPLERS["dinov2"].draw(generators(0))[MASK]
    assert torch.equal(again, SAMPLERS["dinov2"].draw(generators(0))[MASK])


def test_places_at_random_are_exactly_as_many_as_wanted() -> None:
    masks = RatioMasks(GRID, VIEWS, (0.3,), (0.0,), blocks=False).draw(generators(0))[MASK]
    assert (masks.sum(dim=(2, 3)) == 58).all()  # 0.3 of 196, rounded down
    assert 0.2 < masks.double().mean(dim=(0, 1))[0, 0] < 0.4, "the corner is hidden as often as any place"


def test_block_is_narrower_and_lower_than_the_view() -> None:
    for seed in range(50):
        numbers = Uniforms(Generator().manual_seed(seed))
        assert not hide_blocks(numbers, (4, 4), 16, least=16, most=16).any(), "a block spans the view"
