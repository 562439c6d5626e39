"""What code written for ``torch.nn.utils.weight_norm`` does to a last layer: reads its weight, freezes norms, takes them off.

Legend: K prototypes, D bottleneck dim.
"""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.weight_norm import WeightNorm

from vmf_kernels import DINOHead, PrototypeLayer, PrototypeLogits, fuse_head
from vmf_kernels.compat import dinov2, ibot

pytestmark = pytest.mark.quick

K, DIM = 11, 6


def fused(norm: Callable[[nn.Linear], nn.Module] | None = None) -> Any:
    linear = nn.Linear(DIM, K, bias=False)
    layer: nn.Module = linear
    if norm is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            layer = norm(linear)
    return fuse_head(layer)


def of_head(head: nn.Module, layer: str = "last_layer") -> Any:
    return head.get_submodule(layer)


WEIGHT_NORMED: dict[str, Callable[[], Any]] = {
    "layer": lambda: PrototypeLayer(DIM, K),
    "frozen": lambda: PrototypeLayer(DIM, K, frozen_norm=True),
    "dino": lambda: of_head(DINOHead(3, K, nlayers=1, bottleneck_dim=DIM)),
    "dinov2": lambda: of_head(dinov2.DINOHead(3, K, nlayers=1, bottleneck_dim=DIM)),
    "ibot-patches": lambda: of_head(ibot.iBOTHead(3, 5, patch_out_dim=K, nlayers=1, bottleneck_dim=DIM), "last_layer2"),
    "fused-hook": lambda: fused(nn.utils.weight_norm),
}
LAYERS = WEIGHT_NORMED | {
    "fused": fused,
    "fused-parametrized": lambda: fused(parametrizations.weight_norm),
}


def with_norms(layer: Any) -> Any:
    """Norms between 0.5 and 1.5 of either sign, where it has any."""
    norms = [p for name, p in layer.named_parameters() if name.endswith(("weight_g", "original0"))]
    with torch.no_grad():
        for g in norms:
            g.copy_((0.5 + torch.rand_like(g)) * torch.randn_like(g).sign())
    return layer


@pytest.mark.parametrize("name", LAYERS)
def test_weight_is_the_effective_one(name: str) -> None:
    layer = with_norms(LAYERS[name]())
    x, keys = torch.randn(4, DIM), list(layer.state_dict())
    torch.testing.assert_close(x @ layer.weight.T, layer(x).materialize())
    torch.testing.assert_close(x @ layer.weight.data.T, layer(x).materialize())
    assert (tuple(layer.weight.shape), layer.bias) == ((K, DIM), None)
    assert (layer.in_features, layer.out_features) == (DIM, K)
    trained = [p for p in layer.parameters() if p.requires_grad]
    ours = torch.autograd.grad(layer.weight.square().cos().sum(), trained)
    theirs = torch.autograd.grad(layer.prototypes().effective_weight().square().cos().sum(), trained)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)
    assert list(layer.state_dict()) == keys, "reading the weight has made it a part of the state"


@pytest.mark.parametrize("name", WEIGHT_NORMED)
def test_norms_are_filled_and_frozen_as_in_the_published_heads(name: str) -> None:
    layer = with_norms(WEIGHT_NORMED[name]())
    layer.weight_g.data.fill_(1)
    layer.weight_g.requires_grad = False
    torch.testing.assert_close(layer.weight.norm(dim=1), torch.ones(K))
    layer(torch.randn(4, DIM)).sum().backward()
    assert layer.weight_g.grad is None
    assert layer.weight_v.grad.abs().sum() > 0


@pytest.mark.parametrize("removed_twice", [False, True])
@pytest.mark.parametrize("name", WEIGHT_NORMED)
def test_weight_norm_is_removed(name: str, removed_twice: bool) -> None:
    layer = with_norms(WEIGHT_NORMED[name]())
    weight, x = layer.weight.detach(), torch.randn(4, DIM)
    logits = layer(x).materialize()
    assert nn.utils.remove_weight_norm(layer) is layer
    assert list(layer.state_dict()) == ["weight"]
    assert isinstance(layer.weight, nn.Parameter)
    assert torch.equal(layer.weight, weight)
    assert isinstance(layer, nn.Linear)
    assert isinstance(layer(x), PrototypeLogits)
    torch.testing.assert_close(layer(x).materialize(), logits)
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    twin = nn.Linear(DIM, K, bias=False)
    twin.load_state_dict(layer.state_dict())
    torch.testing.assert_close(twin(x), logits)
    assert torch.equal(copy.deepcopy(layer).weight, weight)
    if removed_twice:
        with pytest.raises(ValueError, match="weight_norm of 'weight' not found"):
            nn.utils.remove_weight_norm(layer)


def test_an_exported_head_has_plain_weights() -> None:
    head = DINOHead(3, K, nlayers=2, hidden_dim=4, bottleneck_dim=DIM)
    x = torch.randn(4, 3)
    before = head(x).materialize()
    nn.utils.remove_weight_norm(head.last_layer)
    assert list(head.state_dict())[-1] == "last_layer.weight"
    torch.testing.assert_close(head(x).materialize(), before)


def test_a_shared_last_layer_is_removed_from_both_places() -> None:
    head = ibot.iBOTHead(3, K, nlayers=1, bottleneck_dim=DIM, shared_head=True)
    nn.utils.remove_weight_norm(head.last_layer)
    assert head.last_layer2 is head.last_layer
    assert head(torch.randn(2, 3, 3))[1].shape == (2, 2, K)


def test_a_frozen_teacher_stays_frozen() -> None:
    layer = PrototypeLayer(DIM, K).requires_grad_(False)
    assert not nn.utils.remove_weight_norm(layer).get_parameter("weight").requires_grad


def test_a_parametrization_is_removed_from_a_fused_layer() -> None:
    layer = with_norms(fused(parametrizations.weight_norm))
    x, weight = torch.randn(4, DIM), layer.weight.detach()
    parametrize.remove_parametrizations(layer, "weight")
    assert list(layer.state_dict()) == ["weight"]
    torch.testing.assert_close(layer(x).materialize(), x @ weight.T)


def test_a_layer_without_parametrization_says_how_to_remove_its_norm() -> None:
    with pytest.raises(
        ValueError, match=r"torch.nn.utils.remove_weight_norm takes off.* does not have a parametrization"
    ):
        parametrize.remove_parametrizations(PrototypeLayer(DIM, K), "weight")


def test_a_layer_of_another_class_is_not_changed() -> None:
    class Mine(PrototypeLayer):
        pass

    layer = Mine(DIM, K)
    with pytest.raises(
        RuntimeError,
        match=r"remove weight norm from a Mine whose weight_v is a Parameter; expected a PrototypeLayer with",
    ):
        nn.utils.remove_weight_norm(layer)
    assert layer(torch.randn(4, DIM)).shape == (4, K)


@pytest.mark.parametrize("name", WEIGHT_NORMED)
def test_no_weight_is_computed_by_a_call(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = WEIGHT_NORMED[name]()

    def refuse(*arguments: object) -> Tensor:
        raise AssertionError("a weight was computed")

    monkeypatch.setattr("vmf_kernels.heads.prototype_layer.StoredNorm.compute_weight", refuse)
    monkeypatch.setattr(WeightNorm, "compute_weight", refuse)
    layer(torch.randn(4, DIM))


@pytest.mark.parametrize("name", WEIGHT_NORMED)
def test_a_weight_is_not_assigned_in_silence(name: str) -> None:
    layer = WEIGHT_NORMED[name]()
    with pytest.raises(AttributeError, match="weight is computed from weight_g and weight_v; expected those"):
        layer.weight = torch.zeros(K, DIM)
    with pytest.raises(KeyError, match="already exists"):
        layer.weight = nn.Parameter(torch.zeros(K, DIM))


@pytest.mark.parametrize("name", WEIGHT_NORMED)
def test_those_who_copy_layers_with_weight_norm_find_nothing_in_the_way(name: str) -> None:
    """The known way around torch's refusal to copy them: delete what the hook computed, copy."""
    layer = with_norms(WEIGHT_NORMED[name]())
    for hook in layer._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm):
            delattr(layer, hook.name)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    x = torch.randn(4, DIM)
    for twin in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        assert torch.equal(twin(x).materialize(), layer(x).materialize())
        nn.utils.remove_weight_norm(twin)  # the copy alone
    assert list(layer.state_dict()) == ["weight_g", "weight_v"]


def test_initialisers_that_walk_a_head_change_what_they_change_in_the_published_one() -> None:
    """Its MLP: writing into the weight that weight norm computes has no effect there either."""
    head = DINOHead(3, K, nlayers=2, hidden_dim=4, bottleneck_dim=DIM)
    before = copy.deepcopy(head.state_dict())
    for module in head.modules():
        if hasattr(module, "weight"):
            nn.init.constant_(module.weight, 0.5)  # type: ignore[arg-type]
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.constant_(module.bias, 0.25)
    changed = [name for name, value in head.state_dict().items() if not torch.equal(value, before[name])]
    assert changed == ["mlp.0.weight", "mlp.0.bias", "mlp.2.weight", "mlp.2.bias"]
