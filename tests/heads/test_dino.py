"""The head against the published one: parameters, initialisation, checkpoints, copies, and hard inputs."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from torch import nn

from tests.fuzz.statements.dino import PublishedDINOHead
from tests.measure import worst_error
from vmf_kernels import DINOHead, DINOLoss, DINOvMFHead, DINOvMFLoss, PrototypeLayer, PrototypeLogits

pytestmark = pytest.mark.quick

SMALL: dict[str, Any] = {"hidden_dim": 16, "bottleneck_dim": 8}
VARIANTS = [
    pytest.param({}, id="default"),
    pytest.param({"nlayers": 1}, id="one-layer"),
    pytest.param({"nlayers": 0}, id="no-layer"),
    pytest.param({"nlayers": 2, "norm_last_layer": False}, id="two-layers-free-norm"),
    pytest.param({"use_bn": True}, id="batch-norm"),
    pytest.param({"use_bn": True, "nlayers": 4}, id="batch-norm-four-layers"),
]
LAST = ["last_layer.weight_g", "last_layer.weight_v"]


def linear(*indices: int) -> list[str]:
    return [f"mlp.{i}.{name}" for i in indices for name in ("weight", "bias")]


def batch_norm(index: int) -> list[str]:
    return [f"mlp.{index}.{name}" for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")]


@pytest.mark.parametrize(
    ("options", "keys"),
    [
        ({}, [*linear(0, 2, 4), *LAST]),
        ({"nlayers": 1}, ["mlp.weight", "mlp.bias", *LAST]),
        ({"nlayers": 2}, [*linear(0, 2), *LAST]),
        ({"use_bn": True}, [*linear(0), *batch_norm(1), *linear(3), *batch_norm(4), *linear(6), *LAST]),
        ({"use_bn": True, "nlayers": 1}, ["mlp.weight", "mlp.bias", *LAST]),
    ],
    ids=["default", "one-layer", "two-layers", "batch-norm", "batch-norm-one-layer"],
)
def test_state_dict_has_the_published_keys(options: dict[str, Any], keys: list[str]) -> None:
    assert list(DINOHead(5, 7, **SMALL, **options).state_dict()) == keys


def test_constructor_has_the_published_defaults() -> None:
    ours, published = (inspect.signature(head).parameters for head in (DINOHead, PublishedDINOHead))
    assert [(p.name, p.default, p.kind) for p in ours.values()] == [
        (p.name, p.default, p.kind) for p in published.values()
    ]
    head = DINOHead(10, 20)
    shapes = {name: tuple(p.shape) for name, p in head.named_parameters()}
    assert shapes["mlp.0.weight"] == (2048, 10)
    assert shapes["mlp.2.weight"] == (2048, 2048)
    assert shapes["mlp.4.weight"] == (256, 2048)
    assert shapes["last_layer.weight_g"] == (20, 1)
    assert shapes["last_layer.weight_v"] == (20, 256)


@pytest.mark.parametrize("options", VARIANTS)
def test_same_seed_gives_the_published_parameters_and_logits(options: dict[str, Any]) -> None:
    heads = []
    for head_class in (DINOHead, PublishedDINOHead):
        torch.manual_seed(0)
        heads.append(head_class(5, 7, **SMALL, **options))
    ours, published = heads
    x = torch.randn(6, 5)
    error, name = worst_error(dict(ours.state_dict()), dict(published.state_dict()))
    assert error == 0, f"{name}: relative difference {error:.2e}"
    torch.testing.assert_close(ours(x).materialize(), published(x))
    assert [p.requires_grad for p in ours.parameters()] == [p.requires_grad for p in published.parameters()]


@pytest.mark.parametrize("options", VARIANTS)
def test_state_dicts_of_both_heads_load_into_each_other(options: dict[str, Any]) -> None:
    ours, published = DINOHead(5, 7, **SMALL, **options), PublishedDINOHead(5, 7, **SMALL, **options)
    x = torch.randn(6, 5)
    ours.load_state_dict(published.state_dict())
    torch.testing.assert_close(ours.eval()(x).materialize(), published.eval()(x))
    published.load_state_dict(DINOHead(5, 7, **SMALL, **options).state_dict())


def test_initialisation_has_the_published_statistics() -> None:
    head = DINOHead(64, 4096, hidden_dim=512, bottleneck_dim=64)
    for index in (0, 2, 4):
        layer = head.mlp[index]  # type: ignore[index]
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert layer.bias.eq(0).all()
    v, g = head.last_layer.weight_v, head.last_layer.weight_g
    bound = 64**-0.5  # of nn.Linear's uniform
    assert v.abs().max() <= bound
    assert v.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
    assert g.eq(1).all()
    torch.testing.assert_close(head.last_layer.prototypes().norms(), torch.ones(4096))


@pytest.mark.parametrize("options", VARIANTS)
def test_deepcopy_is_equal_and_independent(options: dict[str, Any]) -> None:
    head = DINOHead(5, 7, **SMALL, **options).eval()
    head(torch.randn(6, 5)).materialize().sum().backward()  # a used head copies too
    twin, x = copy.deepcopy(head), torch.randn(6, 5)
    before = twin(x).materialize()
    torch.testing.assert_close(before, head(x).materialize(), rtol=0, atol=0)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(1.0)
    torch.testing.assert_close(twin(x).materialize(), before, rtol=0, atol=0)
    assert (head(x).materialize() - before).abs().max() > 1e-3


@pytest.mark.parametrize("frozen", [True, False])
def test_norm_last_layer_freezes_the_norms_alone(frozen: bool) -> None:
    head = DINOHead(5, 7, norm_last_layer=frozen, **SMALL)
    fixed = [name for name, parameter in head.named_parameters() if not parameter.requires_grad]
    assert fixed == (["last_layer.weight_g"] if frozen else [])


def test_zero_prototypes_give_zero_logits_and_finite_gradients() -> None:
    head = DINOHead(5, 7, norm_last_layer=False, **SMALL)
    with torch.no_grad():
        head.last_layer.weight_v[3] = 0
    logits = head(torch.randn(6, 5)).materialize()
    logits.square().sum().backward()
    assert logits[:, 3].eq(0).all()
    assert logits.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-7, 1e-4])
def test_tiny_bottleneck_rows_give_no_nan(size: float, dtype: torch.dtype) -> None:
    head = DINOHead(8, 7, nlayers=1, bottleneck_dim=8)
    head.mlp = nn.Identity()
    x = torch.full((2, 8), size, dtype=dtype).requires_grad_()
    logits = head.to(dtype)(x)
    logits.materialize().sum().backward()
    assert logits.dtype == dtype
    assert logits.features.isfinite().all()
    assert logits.features.norm(dim=1).max() <= 1.01
    assert x.grad is not None
    assert not x.grad.isnan().any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_features_are_unit_rows_in_the_dtype_of_the_head(dtype: torch.dtype) -> None:
    logits = DINOHead(5, 7, **SMALL).to(dtype)(torch.randn(6, 5).to(dtype))
    step = torch.finfo(dtype).eps
    assert logits.dtype == dtype
    assert (logits.features.double().norm(dim=1) - 1).abs().max() <= 2 * step


def test_layer_accepts_any_number_of_row_dims() -> None:
    layer = PrototypeLayer(8, 7)
    logits = layer(torch.randn(2, 3, 8))
    assert isinstance(logits, PrototypeLogits)
    assert logits.shape == (2, 3, 7)


@pytest.mark.parametrize(
    "sizes",
    [{"in_dim": 0}, {"out_dim": 0}, {"hidden_dim": -1}, {"bottleneck_dim": 1}],
    ids=lambda sizes: next(iter(sizes)),
)
def test_wrong_sizes_are_refused(sizes: dict[str, Any]) -> None:
    with pytest.raises(
        ValueError, match=r"in_dim, out_dim, hidden_dim, bottleneck_dim are .* expected at least 1, 1, 1 and 2"
    ):
        DINOHead(**({"in_dim": 5, "out_dim": 7} | SMALL | sizes))


def test_a_vmf_head_is_the_same_head_whose_logits_say_that_their_prototypes_are_components() -> None:
    torch.manual_seed(5)
    plain = DINOHead(6, 10, norm_last_layer=False, **SMALL)
    torch.manual_seed(5)
    head = DINOvMFHead(6, 10, **SMALL)
    assert all(torch.equal(one, head.state_dict()[name]) for name, one in plain.state_dict().items())
    assert head.last_layer.weight_g.requires_grad
    x = torch.randn(8, 6)
    assert head(x).prototypes.has_normalizer
    assert not plain(x).prototypes.has_normalizer
    with torch.no_grad():
        for each in (plain, head):
            each.last_layer.weight_g.copy_(torch.linspace(0.3, 3, 10)[:, None])
    # the normaliser is added once, whoever asks for it
    schedule = (10, 2, 0.04, 0.04, 0, 1)
    by_head = DINOLoss(*schedule)(head(x), head(x[:8]), 0)
    by_loss = DINOvMFLoss(*schedule, centering="logit")(plain(x), plain(x[:8]), 0)
    by_both = DINOvMFLoss(*schedule, centering="logit")(head(x), head(x[:8]), 0)
    without = DINOLoss(*schedule)(plain(x), plain(x[:8]), 0)
    assert torch.equal(by_head, by_loss)
    assert torch.equal(by_head, by_both)
    assert abs(by_head - without) > 1e-3, "the normaliser changes nothing"
