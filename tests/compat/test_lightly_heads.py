"""The drop-in's heads against lightly's own: state dicts, outputs, starts, and the last layer's rest.

Legend: K prototypes, D bottleneck dim.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.compat.lightly_networks import DIM, HIDDEN, IN_DIM, PROTOTYPES, published
from vmf_kernels import PrototypeLogits
from vmf_kernels.compat import lightly

pytestmark = [
    pytest.mark.quick,
    pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning"),  # what lightly's heads are made with
]


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("name", ["DINOProjectionHead", "DINOv2ProjectionHead"])
def test_heads_share_state_dicts_and_outputs(name: str, batch_norm: bool) -> None:
    sizes = (IN_DIM, HIDDEN, DIM, PROTOTYPES, batch_norm)
    theirs, ours, x = getattr(published(), name)(*sizes), getattr(lightly, name)(*sizes), torch.randn(9, IN_DIM)
    with torch.no_grad():
        theirs.last_layer.weight_g.uniform_(0.5, 1.5)
    ours.load_state_dict(theirs.state_dict())
    assert isinstance(ours(x), PrototypeLogits)
    torch.testing.assert_close(ours(x).materialize(), theirs(x))
    back = getattr(published(), name)(*sizes)
    assert (back(x) - theirs(x)).abs().max() > 1e-2, "the negative control, before loading, agrees"
    back.load_state_dict(copy.deepcopy(ours).state_dict())
    torch.testing.assert_close(back(x), theirs(x))
    flags = [{n: p.requires_grad for n, p in head.named_parameters()} for head in (ours, theirs)]
    assert flags[0] == flags[1]


def test_heads_start_as_there() -> None:
    theirs, ours = (package.DINOProjectionHead(64, 64, 32, 500).state_dict() for package in (published(), lightly))
    assert list(theirs) == list(ours)
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name].mean(), expected.mean(), atol=0.01, rtol=0)
        torch.testing.assert_close(ours[name].std(), expected.std(), atol=1e-7, rtol=0.1)


@pytest.mark.parametrize("make", [lambda: published().DINOProjectionHead, lambda: lightly.DINOProjectionHead])
def test_last_layer_rests_until_its_epoch(make: Callable[[], Any]) -> None:
    """Both sides, with gradients that were there before."""
    for epoch, rests in ((0, True), (1, True), (2, False)):
        head = make()(IN_DIM, HIDDEN, DIM, PROTOTYPES, freeze_last_layer=2, norm_last_layer=False)
        for parameter in head.parameters():
            parameter.grad = torch.ones_like(parameter)
        head.cancel_last_layer_gradients(current_epoch=epoch)
        gone = {name for name, p in head.named_parameters() if p.grad is None}
        assert gone == ({"last_layer.weight_g", "last_layer.weight_v"} if rests else set())
