"""The ways that ``bench.view_rates`` compares do the same work."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.view_rates import SIDES, jpegs, lightly, ours, torchvision

WAYS: dict[str, Any] = {
    "ours": lambda: ours,
    "lightly": lightly,
    "torchvision, PIL": lambda: torchvision(tensors=False),
    "torchvision, uint8": lambda: torchvision(tensors=True),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_gives_the_views_of_dino_on_the_networks_scale(way: str) -> None:
    views: Any = WAYS[way]()(jpegs(None)[0], 0)
    assert [tuple(view.shape) for view in views] == [(3, side, side) for side in SIDES]
    assert all(view.dtype == torch.float32 for view in views)
    low, high = min(view.min().item() for view in views), max(view.max().item() for view in views)
    assert -2.2 < low < -0.5, f"the darkest value is {low:.2f}"
    assert 1.0 < high < 2.7, f"the brightest value is {high:.2f}"
