"""Heads and losses built without memory, as FSDP2 users do: ``to_empty()``, then ``reset_parameters()`` of all modules.

Legend: K prototypes, D bottleneck dim.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed import HashStore
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrizations

from tests.compat.test_assigned_attributes import LOSSES
from vmf_kernels import DINOHead, DINOLoss, DINOvMFLoss, PrototypeLayer, fuse_head
from vmf_kernels.compat import dino, dinov2, dinov3, ibot, lightly, solo

IN_DIM, HIDDEN, DIM, K = 24, 48, 16, 600
SMALL: dict[str, Any] = {"hidden_dim": HIDDEN, "bottleneck_dim": DIM}
POISON = torch.nan


class Foreign(nn.Module):
    """A head of another codebase that ``fuse_head`` has changed; norms of 1, as published heads have."""

    def __init__(self, norm: str) -> None:
        super().__init__()
        self.mlp = nn.Linear(IN_DIM, DIM)
        self.last_layer = nn.Linear(DIM, K, bias=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            if norm != "plain":
                (nn.utils.weight_norm if norm == "hook" else parametrizations.weight_norm)(self.last_layer)
        fuse_head(self)
        for name, parameter in self.last_layer.named_parameters():
            if name.endswith(("_g", "original0")):
                parameter.data.fill_(1)

    def forward(self, x: Tensor) -> Any:
        return self.last_layer(nn.functional.normalize(self.mlp(x), dim=-1))


def initialised(module: nn.Module) -> nn.Module:
    module.init_weights()  # type: ignore[operator]
    return module


HEADS: dict[str, Callable[[], nn.Module]] = {
    "layer": lambda: PrototypeLayer(IN_DIM, K),
    "dino": lambda: dino.DINOHead(IN_DIM, K, **SMALL),
    "dino-free-norm-batch-norm": lambda: dino.DINOHead(IN_DIM, K, use_bn=True, norm_last_layer=False, **SMALL),
    "dino-one-layer": lambda: dino.DINOHead(IN_DIM, K, nlayers=1, **SMALL),
    "ibot": lambda: ibot.iBOTHead(IN_DIM, K, patch_out_dim=K, **SMALL),
    "ibot-shared-layer-norm": lambda: ibot.iBOTHead(IN_DIM, K, norm="ln", shared_head=True, **SMALL),
    "ibot-sync-batch-norm": lambda: ibot.iBOTHead(IN_DIM, K, patch_out_dim=K, norm="syncbn", **SMALL),
    "dinov2": lambda: dinov2.DINOHead(IN_DIM, K, use_bn=True, **SMALL),
    "dinov2-vmf": lambda: dinov2.DINOvMFHead(IN_DIM, K, mlp_bias=False, **SMALL),
    "dinov3": lambda: initialised(dinov3.DINOHead(IN_DIM, K, **SMALL)),
    "lightly": lambda: lightly.DINOProjectionHead(IN_DIM, HIDDEN, DIM, K),
    "lightly-v2": lambda: lightly.DINOv2ProjectionHead(IN_DIM, HIDDEN, DIM, K, batch_norm=True),
    "solo": lambda: solo.DINOHead(IN_DIM, K, **SMALL),
    "fused": lambda: Foreign("plain"),
    "fused-hook": lambda: Foreign("hook"),
    "fused-parametrization": lambda: Foreign("parametrization"),
}


def poisoned(make: Callable[[], nn.Module]) -> nn.Module:
    """Built without memory, then given some in which anything may be left."""
    with torch.device("meta"):
        module = make()
    module.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in module.state_dict(keep_vars=True).values():
            tensor.fill_(POISON if tensor.is_floating_point() else 77)
    return module


def reset(module: nn.Module, order: str) -> nn.Module:
    """As a user does, in whichever order."""
    modules = list(module.modules())
    for each in {"outer-first": modules, "inner-first": modules[::-1], "head": modules[:1]}[order]:
        if hasattr(each, "reset_parameters"):
            each.reset_parameters()  # type: ignore[operator]
    return module


def statistics(tensor: Tensor) -> tuple[float, float, float]:
    values = tensor.detach().double()
    return values.mean().item(), values.std(correction=0).item(), values.abs().max().item()


# a head of another codebase has no such method itself
ORDERS = ("outer-first", "inner-first", "head")
STARTS = [(name, order) for name in HEADS for order in ORDERS if order != "head" or not name.startswith("fused")]


@pytest.mark.parametrize(("name", "order"), STARTS)
def test_a_head_without_memory_starts_as_one_built_with_it(name: str, order: str) -> None:
    torch.manual_seed(0)
    built = HEADS[name]()
    head = reset(poisoned(HEADS[name]), order)
    frozen = [[p.requires_grad for p in module.parameters()] for module in (head, built)]
    assert frozen[0] == frozen[1]
    assert list(head.state_dict()) == list(built.state_dict())
    for key, value in head.state_dict().items():
        (mean, std, most), (mean_built, std_built, most_built) = statistics(value), statistics(built.state_dict()[key])
        assert value.isfinite().all(), key
        assert abs(mean - mean_built) <= 6 * std_built / value.numel() ** 0.5 + 1e-12, f"{key}: mean {mean}"
        assert std == pytest.approx(std_built, rel=0.15), f"{key}: deviation {std}, built {std_built}"
        assert most == pytest.approx(most_built, rel=0.5), f"{key}: up to {most}, built {most_built}"


@pytest.mark.parametrize("wrong", ["nothing", "as nn.Linear"])
def test_another_start_fails_that_comparison(wrong: str) -> None:
    """Negative control."""
    head = poisoned(HEADS["dino"])
    if wrong == "as nn.Linear":
        reset(head, "outer-first")
        for layer in head.modules():
            if isinstance(layer, nn.Linear):
                nn.Linear.reset_parameters(layer)
    std = statistics(head.get_parameter("mlp.0.weight"))[1]
    assert std != pytest.approx(statistics(HEADS["dino"]().get_parameter("mlp.0.weight"))[1], rel=0.15)


def test_numbers_drawn_by_a_constructor_are_what_they_were() -> None:
    """One seed gives the published numbers: nn.Linear draws its own before the head's."""
    torch.manual_seed(5)
    head = DINOHead(IN_DIM, K, nlayers=1, bottleneck_dim=DIM)
    torch.manual_seed(5)
    plain = nn.Linear(IN_DIM, DIM)
    nn.init.trunc_normal_(plain.weight, std=0.02)
    last = nn.Linear(DIM, K, bias=False)
    assert torch.equal(head.get_parameter("mlp.weight"), plain.weight)
    assert torch.equal(head.get_parameter("last_layer.weight_v"), last.weight)


@pytest.mark.parametrize("order", ["outer-first", "inner-first"])
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_without_memory_starts_as_one_built_with_it(name: str, order: str) -> None:
    of = LOSSES[name]
    loss, built = reset(poisoned(of.make), order), of.make()
    for epoch in range(2):
        value = of.step(loss, epoch)
        assert value.isfinite()
        assert value == of.step(built, epoch)
    for key, center in loss.state_dict().items():
        assert torch.equal(center, built.state_dict()[key])


@pytest.mark.parametrize("how", ["to_empty", "assign"])
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_without_memory_loads_a_checkpoint(name: str, how: str) -> None:
    of = LOSSES[name]
    trained = of.make()
    of.step(trained, 0)
    with torch.device("meta"):
        loss = of.make()
    if how == "to_empty":
        loss.to_empty(device="cpu")
    loss.load_state_dict(trained.state_dict(), assign=how == "assign")
    assert of.step(loss, 1) == of.step(trained, 1)
    assert not any(tensor.is_meta for tensor in [*loss.buffers(), *loss.parameters()])


@pytest.mark.parametrize("make", [DINOLoss, DINOvMFLoss, solo.DINOLoss])
def test_temperatures_and_epoch_survive(make: Any) -> None:
    crops = () if make is solo.DINOLoss else (3,)
    with torch.device("meta"):
        loss = make(11, *crops, 0.04, 0.07, 2, 4)
    loss.to_empty(device="cpu")
    stored = dict(loss.named_buffers())
    assert stored["_temperatures.stored"].tolist() == loss.teacher_temp_schedule.tolist()
    if make is solo.DINOLoss:
        loss.epoch = 3
        loss.to_empty(device="cpu")
        assert loss.epoch_now == 3


@pytest.fixture
def _one_rank() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:DTensor random operators")
@pytest.mark.usefixtures("_one_rank")
@pytest.mark.parametrize("name", ["dino", "ibot", "dinov3", "fused-hook"])
def test_a_head_that_is_sharded_without_memory_starts_as_one_built_with_it(name: str) -> None:
    with torch.device("meta"):
        head = HEADS[name]()
    fully_shard(head, mesh=init_device_mesh("cpu", (1,)))
    head.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.fill_(POISON)
    reset(head, "outer-first")
    built = HEADS[name]().state_dict()
    for key, value in head.state_dict().items():
        assert isinstance(value, DTensor)
        assert statistics(value.full_tensor())[1] == pytest.approx(statistics(built[key])[1], rel=0.15), key
    if name != "dinov3":
        with pytest.raises(RuntimeError, match=r"whose weight_v is a DTensor; expected .* before fully_shard"):
            nn.utils.remove_weight_norm(head.get_submodule("last_layer"))


def test_one_step_of_a_head_and_a_loss_without_memory() -> None:
    def make() -> nn.Module:
        return nn.ModuleDict({"head": DINOHead(5, 11, **SMALL), "loss": DINOLoss(11, 3, 0.04, 0.07, 2, 4)})

    network: Any = reset(poisoned(make), "outer-first")
    rows = torch.randn(12, 5)
    loss = network["loss"](network["head"](rows), network["head"](rows[:8]), 0)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in network.parameters() if p.requires_grad)
