"""Last layers load what any way of storing one saved: the same prototypes, and strictly.

Legend: K prototypes, D bottleneck dim.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from vmf_kernels import DINOHead, PrototypeLayer, fuse_head
from vmf_kernels.compat import dinov2, dinov3, ibot, lightly, solo
from vmf_kernels.heads.layer_keys import PARAMETRIZED, PLAIN, WEIGHT_NORM

pytestmark = pytest.mark.quick

K, D = 7, 5
NAMES = {"plain": PLAIN, "hook": WEIGHT_NORM, "parametrization": PARAMETRIZED}


def linear(style: str, dim: int = 0) -> nn.Module:
    """torch's own layer with norms of both signs and a zero row, stored in one of three ways."""
    layer = nn.Linear(D, K, bias=False)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", FutureWarning)
        if style == "plain":
            layer.weight[2] = 0
        elif style == "hook":
            nn.utils.weight_norm(layer, dim=dim)
            layer.weight_g.uniform_(-2, 2)  # type: ignore[operator]
        else:
            parametrizations.weight_norm(layer, dim=dim)
            layer.parametrizations.weight.original0.uniform_(-2, 2)  # type: ignore[union-attr, operator]
    return layer


class Head(nn.Module):
    """A layer below another module, as in every head."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.last_layer = layer


def ours(style: str) -> nn.Module:
    if style == "layer":
        return PrototypeLayer(D, K)
    if style == "frozen":
        return PrototypeLayer(D, K, frozen_norm=True)
    return fuse_head(linear(style))


def logits(layer: nn.Module, x: Tensor) -> Tensor:
    out = layer(x)
    return out if isinstance(out, Tensor) else out.materialize()


@pytest.mark.parametrize("saved", NAMES)
@pytest.mark.parametrize("style", ["layer", "frozen", *NAMES])
def test_every_way_of_storing_a_layer_loads_into_every_layer(style: str, saved: str) -> None:
    source, layer, x = linear(saved), ours(style), torch.randn(4, D)
    given = Head(source).state_dict()
    names = list(layer.state_dict())
    Head(layer).load_state_dict(given)
    torch.testing.assert_close(logits(layer, x), source(x), rtol=1e-5, atol=1e-6)
    assert list(layer.state_dict()) == names, "the keys it saves changed"
    assert list(given) == [f"last_layer.{name}" for name in NAMES[saved]], "the mapping given changed"


@pytest.mark.parametrize("saved", NAMES)
def test_a_layer_alone_loads_as_below_a_head(saved: str) -> None:
    source, layer, x = linear(saved), ours("layer"), torch.randn(4, D)
    layer.load_state_dict(source.state_dict())
    torch.testing.assert_close(logits(layer, x), source(x), rtol=1e-5, atol=1e-6)


def test_frozen_norms_are_frozen_at_what_was_loaded() -> None:
    """The published teacher is built with frozen norms and loads a student's that are not 1."""
    layer, weight = PrototypeLayer(D, K, frozen_norm=True), 3 * torch.randn(K, D)
    layer.load_state_dict({"weight": weight})
    torch.testing.assert_close(layer.weight_g[:, 0], weight.norm(dim=1))
    assert not layer.weight_g.requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_norms_of_a_plain_weight_neither_overflow_nor_lose_digits(dtype: torch.dtype) -> None:
    layer = PrototypeLayer(D, K).to(torch.float64)
    weight = torch.full((K, D), 2000.0, dtype=dtype) + torch.randn(K, D, dtype=torch.float64).to(dtype)
    layer.load_state_dict({"weight": weight})
    torch.testing.assert_close(layer.weight_g, weight.double().norm(dim=1, keepdim=True).to(dtype).double())


@pytest.mark.parametrize(
    ("make", "prefixes"),
    [
        (lambda: DINOHead(4, K, hidden_dim=6, bottleneck_dim=D), ["last_layer."]),
        (lambda: dinov2.DINOHead(4, K, hidden_dim=6, bottleneck_dim=D), ["last_layer."]),
        (lambda: dinov3.DINOHead(4, K, hidden_dim=6, bottleneck_dim=D), ["last_layer."]),
        (lambda: ibot.iBOTHead(4, K, patch_out_dim=K, hidden_dim=6, bottleneck_dim=D), ["last_layer.", "last_layer2."]),
        (lambda: lightly.DINOProjectionHead(4, 6, D, K), ["last_layer."]),
        (lambda: solo.DINOHead(4, K, hidden_dim=6, bottleneck_dim=D), ["last_layer."]),
    ],
    ids=["dino", "dinov2", "dinov3", "ibot", "lightly", "solo"],
)
@pytest.mark.parametrize("saved", NAMES)
def test_every_head_takes_every_form(make: Callable[[], nn.Module], prefixes: list[str], saved: str) -> None:
    head, source = make(), linear(saved)
    state = {key: value for key, value in head.state_dict().items() if not key.startswith("last_layer")}
    state |= {prefix + name: value for prefix in prefixes for name, value in source.state_dict().items()}
    head.load_state_dict(state)
    x = torch.randn(3, D)
    for prefix in prefixes:
        got = logits(head.get_submodule(prefix[:-1]), x)
        torch.testing.assert_close(got, source(x), rtol=1e-5, atol=1e-6)


FAULTS: dict[str, tuple[str, dict[str, Any], str]] = {
    "only g": ("layer", {"weight_g": torch.ones(K, 1)}, r'Missing key.*"last_layer.weight_v"'),
    "only v": ("plain", {"weight_v": torch.ones(K, D)}, r'(?s)Missing.*"last_layer.weight".*Unexpected.*weight_v"'),
    "half a parametrization": ("layer", {PARAMETRIZED[0]: torch.ones(K, 1)}, r"(?s)Missing.*Unexpected.*original0"),
    "nothing": ("layer", {}, r'Missing key.*"last_layer.weight_g", "last_layer.weight_v"'),
    "two forms": (
        "layer",
        {"weight_g": torch.ones(K, 1), "weight_v": torch.ones(K, D), "weight": torch.ones(K, D)},
        r'Unexpected key.*"last_layer.weight"',
    ),
    "two other forms": (
        "plain",
        dict.fromkeys([*WEIGHT_NORM, *PARAMETRIZED], torch.ones(K, 1)),
        r"(?s)Missing.*Unexpected.*weight_g.*original0",
    ),
    "bias": ("layer", {"weight": torch.ones(K, D), "bias": torch.ones(K)}, r'Unexpected key.*"last_layer.bias"'),
    "another K": ("layer", {"weight": torch.ones(K + 1, D)}, r"size mismatch for last_layer.weight_g"),
    "another D": (
        "plain",
        {"weight_g": torch.ones(K, 1), "weight_v": torch.ones(K, D + 1)},
        r"size mismatch for last_layer.weight:",
    ),
    "vector": ("layer", {"weight": torch.ones(D)}, r'(?s)Missing.*Unexpected key.*"last_layer.weight"'),
    "no tensor": ("layer", {"weight": "gone"}, r'(?s)Missing.*Unexpected key.*"last_layer.weight"'),
    "integers": (
        "plain",
        dict.fromkeys(WEIGHT_NORM, torch.ones(K, 1, dtype=torch.int64)),
        r"(?s)Missing.*Unexpected.*weight_g",
    ),
    "norm over dim 1": (
        "plain",
        linear("hook", dim=1).state_dict(),
        r"weight_g has shape \(1, 5\).*over dim 0, to form last_layer.weight",
    ),
    "norm over dim 1, kept": (
        "layer",
        linear("parametrization", dim=1).state_dict(),
        r"size mismatch for last_layer.weight_g",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_does_not_fit_is_named(fault: str) -> None:
    style, state, message = FAULTS[fault]
    with pytest.raises(RuntimeError, match=message):
        Head(ours(style)).load_state_dict({f"last_layer.{key}": value for key, value in state.items()})


def test_a_lenient_load_reports_only_what_is_left_over() -> None:
    state = {f"last_layer.{key}": value for key, value in linear("parametrization").state_dict().items()}
    report = Head(ours("layer")).load_state_dict(state | {"other": torch.ones(1)}, strict=False)
    assert (report.missing_keys, report.unexpected_keys) == ([], ["other"])
