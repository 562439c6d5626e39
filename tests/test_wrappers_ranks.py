"""Outputs of wrappers on ranks: copies of a head's outputs at each call, which still count as those of one head.

Each case trains a head for two steps through a wrapper that copies outputs, or frees parameters, once with all views in one
call and once with a call for each; both have to end in the same weights.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard

from tests.on_ranks import RANKS, run_cases
from vmf_kernels import DINOHead, DINOLoss

K, D, IN, VIEWS, IMAGES, STEPS = 61, 8, 6, 3, 4, 2
BUDGET = 1e-10  # relative, of fp64


def head_of() -> DINOHead:
    torch.manual_seed(0)
    return DINOHead(IN, K, norm_last_layer=False, hidden_dim=12, bottleneck_dim=D).double()


def ddp(**options: Any) -> Callable[[nn.Module], nn.Module]:
    return lambda head: nn.parallel.DistributedDataParallel(head, **options)


def fsdp2(**options: Any) -> Callable[[nn.Module], nn.Module]:
    def wrap(head: nn.Module) -> nn.Module:
        fully_shard(head, mesh=init_device_mesh("cpu", (RANKS,)), **options)
        return head

    return wrap


def fsdp1(**options: Any) -> Callable[[nn.Module], nn.Module]:
    return lambda head: FullyShardedDataParallel(head, device_id=torch.device("cpu"), **options)


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "ddp": ddp(),
    "ddp find_unused": ddp(find_unused_parameters=True),
    "ddp static_graph": ddp(static_graph=True),
    "fsdp2 reshard": fsdp2(reshard_after_forward=True),
    "fsdp2 keep": fsdp2(reshard_after_forward=False),
    "fsdp1": fsdp1(use_orig_params=True),
    "fsdp1 flat": fsdp1(use_orig_params=False),
    "fsdp1 grad op": fsdp1(use_orig_params=True, sharding_strategy=ShardingStrategy.SHARD_GRAD_OP),
}


def trained(wrap: Callable[[nn.Module], nn.Module], rank: int | None, calls: int) -> dict[str, Tensor]:
    student: nn.Module = head_of()
    teacher = copy.deepcopy(student).requires_grad_(False)
    criterion = DINOLoss(K, VIEWS, 0.04, 0.04, 0, 10).double()
    model = student if rank is None else wrap(student)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        x = torch.randn(VIEWS, IMAGES, IN, dtype=torch.float64, generator=generator)
        mine = x if rank is None else x[:, rank * IMAGES // RANKS : (rank + 1) * IMAGES // RANKS]
        views = [mine.flatten(0, 1)] if calls == 1 else list(mine)
        outputs = [model(view) for view in views]
        loss = criterion(torch.cat(outputs), teacher(mine[:2].flatten(0, 1)), 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    state = {}
    for name, value in model.state_dict().items():
        value = value.full_tensor() if hasattr(value, "full_tensor") else value
        state[name.removeprefix("module.")] = value.detach().clone()
    return state


def every_wrapper(rank: int | None) -> dict[str, dict[str, Tensor]]:
    warnings.simplefilter("ignore")  # of views that FSDP2 sees returned
    if rank is None:
        return {str(calls): trained(lambda head: head, None, calls) for calls in (1, VIEWS)}
    return {f"{name} {calls}": trained(wrap, rank, calls) for name, wrap in WRAPPERS.items() for calls in (1, VIEWS)}


class Several(nn.Module):
    """Two heads of one shape, whose outputs lie among other things."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = head_of(), head_of()
        nn.init.normal_(self.other.last_layer.weight_v)

    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"step": 3, "one": self.one(x), "rest": ["text", None, self.other(x), self.one(2 * x)]}


def several_outputs(rank: int | None) -> dict[str, str]:
    """Rows of one head can be joined, those of the two cannot, whatever their places in the output are."""
    said = {}
    for name in [] if rank is None else ["find_unused_parameters", "static_graph"]:
        option: dict[str, Any] = {name: True}
        model = nn.parallel.DistributedDataParallel(Several(), **option)
        first, second = model(torch.ones(2, IN, dtype=torch.float64)), model(torch.ones(2, IN, dtype=torch.float64))
        same = torch.cat([first["one"], second["one"], first["rest"][3], second["rest"][3]])
        other = torch.cat([first["rest"][2], second["rest"][2]])
        try:
            torch.cat([first["one"], first["rest"][2]])
            said[name] = "joined rows of two heads"
        except ValueError as error:
            said[name] = f"{tuple(same.shape)} {tuple(other.shape)} {error}"
    return said


def what_fsdp1_says(rank: int | None) -> dict[str, str]:
    """Of a head that is a unit of its own below another: FSDP1 frees its parameters as soon as its forward returns."""
    said = {}
    for strategy in [] if rank is None else [ShardingStrategy.FULL_SHARD, ShardingStrategy.SHARD_GRAD_OP]:
        options: dict[str, Any] = {"device_id": torch.device("cpu"), "sharding_strategy": strategy}
        unit = FullyShardedDataParallel(head_of(), use_orig_params=True, **options)
        below = nn.Sequential(nn.Linear(IN, IN, dtype=torch.float64), unit)
        model = FullyShardedDataParallel(below, use_orig_params=True, **options)
        criterion = DINOLoss(K, VIEWS, 0.04, 0.04, 0, 10).double()
        x = torch.randn(VIEWS * 2, IN, dtype=torch.float64)
        try:
            criterion(model(x), head_of()(x[:4]), 0).backward()
            said[strategy.name] = "trained"
        except RuntimeError as error:
            said[strategy.name] = str(error)
    return said


def rank_of(rank: int | None) -> int | None:
    return rank


CASES = (every_wrapper, several_outputs, what_fsdp1_says)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return run_cases(tmp_path_factory.mktemp("ranks"), CASES, rank_of)


@pytest.mark.parametrize("calls", [1, VIEWS], ids=["one call", "a call for each view"])
@pytest.mark.parametrize("name", WRAPPERS)
def test_training_through_a_wrapper_equals_training_without(name: str, calls: int, runs: Any) -> None:
    expected = runs.alone["every_wrapper"][str(calls)]
    for rank in runs.ranks:
        got = rank["every_wrapper"][f"{name} {calls}"]
        assert got.keys() == expected.keys()
        for key, value in expected.items():
            error = float((got[key] - value).norm() / value.norm())
            assert error <= BUDGET, f"{key}: relative error {error:.1e}, budget {BUDGET}"


def test_the_two_ways_of_calling_agree(runs: Any) -> None:
    one, many = (runs.alone["every_wrapper"][str(calls)] for calls in (1, VIEWS))
    assert all(torch.allclose(one[key], many[key], rtol=1e-10) for key in one)


def test_what_fsdp1_has_freed_is_an_error_that_says_what_to_do(runs: Any) -> None:
    for rank in runs.ranks:
        said = rank["what_fsdp1_says"]
        assert said["SHARD_GRAD_OP"] == "trained"
        assert re.search("memory of prototypes .* has been freed.*FSDP1.*SHARD_GRAD_OP", said["FULL_SHARD"]), said[
            "FULL_SHARD"
        ]


def test_outputs_among_others_are_told_apart(runs: Any) -> None:
    for rank in runs.ranks:
        for said in rank["several_outputs"].values():
            assert said.startswith(f"(8, {K}) (4, {K}) torch.cat of PrototypeLogits with different prototypes")
