"""dinov2's loop under ``FullyShardedDataParallel`` (FSDP1), changed as the README says, on two gloo ranks against one process.

Legend: B images, K prototypes, D bottleneck dim.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from torch.distributed.fsdp._runtime_utils import _reshard

from tests.measure import worst_error
from tests.on_ranks import RANKS, Runs, run_cases
from vmf_kernels.compat import dinov2

IN_DIM, K, IMAGES, STEPS, TAU, MOMENTUM = 12, 61, 8, 2, 0.05, 0.9
BUDGET = 1e-10  # relative, in norm, of fp64
SEEN = 1e-4  # what a mistake would be off by
# strategy, and whether both modules are inside a third one, as those of dinov2 are not
LAYOUTS = [("SHARD_GRAD_OP", False), ("FULL_SHARD", False), ("SHARD_GRAD_OP", True)]
REFUSED = [("SHARD_GRAD_OP", False), ("FULL_SHARD", True)]
README = (Path(dinov2.__file__).parent / "README.md").read_text()


def wrapped(network: nn.ModuleDict, strategy: str, inside: bool) -> Any:
    wrap = functools.partial(
        FullyShardedDataParallel,
        sharding_strategy=ShardingStrategy[strategy],
        device_id=torch.device("cpu"),
        use_orig_params=True,
    )
    network = nn.ModuleDict({name: wrap(module) for name, module in network.items()})
    return wrap(nn.Sequential(*network.values())) if inside else nn.Sequential(*network.values())


def reshard_fsdp_model(module: nn.Module) -> None:
    """As dinov2's, with the README's change."""
    for unit in FullyShardedDataParallel.fsdp_modules(module):
        if unit._handle is not None:
            _reshard(unit, unit._handle, True)


def train(
    rank: int | None, strategy: str, inside: bool, *, before: bool = False, summoned: bool = False
) -> dict[str, Tensor]:
    """Losses and centres by step, and the teacher's output at the end.

    Args:
        rank: of this process, or None alone.
        strategy, inside: as ``LAYOUTS``.
        before: reshard where the published loop does.
        summoned: gather the teacher's parameters for the loss.
    """
    torch.manual_seed(0)
    head = dinov2.DINOHead(IN_DIM, K, nlayers=2, hidden_dim=16, bottleneck_dim=8)
    pair = nn.ModuleDict({"backbone": nn.Linear(IN_DIM, IN_DIM), "dino_head": head}).double()
    with torch.no_grad():
        for parameter in head.mlp.parameters():
            parameter.mul_(20)
    twin = copy.deepcopy(pair).requires_grad_(False)
    nets = [
        wrapped(net, strategy, inside) if rank is not None else nn.Sequential(*net.values()) for net in (pair, twin)
    ]
    student, teacher = nets
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05)
    dino_loss = dinov2.DINOLoss(K).double()
    images = torch.randn(STEPS, IMAGES, IN_DIM, dtype=torch.float64)
    record: dict[str, Tensor] = {}
    for step in range(STEPS):
        x = images[step] if rank is None else images[step, rank::RANKS]
        output = teacher(x)
        targets = dino_loss.softmax_center_teacher(output, TAU)
        dino_loss.update_center(output)
        if before:
            reshard_fsdp_model(teacher)
        logits = student(x.flip(1))
        with FullyShardedDataParallel.summon_full_params(teacher) if summoned else contextlib.nullcontext():
            loss = dino_loss([logits], [targets])
        loss.backward()
        reshard_fsdp_model(teacher)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            lists = [local_parameters(net) for net in (teacher, student)]
            torch._foreach_mul_(lists[0], MOMENTUM)
            torch._foreach_add_(lists[0], lists[1], alpha=1 - MOMENTUM)
        record |= {f"{step} loss": mean_over_ranks(loss.detach(), rank), f"{step} center": dino_loss.center.clone()}
    with torch.no_grad():
        record |= {name: net(images[0])[:].materialize() for name, net in (("student", student), ("teacher", teacher))}
    return record


def local_parameters(module: nn.Module) -> list[Tensor]:
    """This rank's shards, as dinov2 collects them; all parameters where nothing is sharded."""
    units = FullyShardedDataParallel.fsdp_modules(module)
    return [parameter for unit in units for parameter in unit.params] if units else [*module.parameters()]


def mean_over_ranks(value: Tensor, rank: int | None) -> Tensor:
    if rank is not None:
        torch.distributed.all_reduce(value)
        value /= RANKS
    return value


def all_layouts(rank: int | None) -> dict[str, Any]:
    if rank is None:
        return {"alone": train(None, *LAYOUTS[0])}
    results: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for strategy, inside in LAYOUTS:
            results[f"{strategy} {inside}"] = train(rank, strategy, inside)
        results["summoned"] = train(rank, *LAYOUTS[0], before=True, summoned=True)
        for strategy, inside in REFUSED:
            try:
                train(rank, strategy, inside, before=not inside)
            except RuntimeError as error:
                results[f"{strategy} {inside} refused"] = str(error)
    return results


def same(rank: int | None) -> int | None:
    return rank


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return run_cases(tmp_path_factory.mktemp("ranks"), [all_layouts], same)


@pytest.mark.parametrize(("strategy", "inside"), LAYOUTS)
def test_sharded_training_is_that_of_one_process(runs: Runs, strategy: str, inside: bool) -> None:
    for of_rank in runs.ranks:
        error, where = worst_error(of_rank["all_layouts"][f"{strategy} {inside}"], runs.alone["all_layouts"]["alone"])
        assert error <= BUDGET, f"{where}: relative error {error:.1e}, budget {BUDGET:.0e}"


def test_a_teacher_that_is_gathered_again_for_the_loss_will_do(runs: Runs) -> None:
    for of_rank in runs.ranks:
        error, where = worst_error(of_rank["all_layouts"]["summoned"], runs.alone["all_layouts"]["alone"])
        assert error <= BUDGET, f"{where}: relative error {error:.1e}, budget {BUDGET:.0e}"


def test_other_images_would_be_seen(runs: Runs) -> None:
    """Negative control."""
    record = dict(runs.alone["all_layouts"]["alone"])
    other = record | {"teacher": record["student"]}
    assert worst_error(other, record)[0] > SEEN


@pytest.mark.parametrize(("strategy", "inside"), REFUSED)
def test_freed_prototypes_are_refused_with_advice_for_fsdp1(runs: Runs, strategy: str, inside: bool) -> None:
    for of_rank in runs.ranks:
        said = of_rank["all_layouts"][f"{strategy} {inside} refused"]
        assert re.search(
            r"has been freed.*resharded after the loss.*FullyShardedDataParallel \(FSDP1\) a head wrapped by itself.*"
            r"SHARD_GRAD_OP, or FSDP.summon_full_params\(teacher_head\)",
            said,
        ), said


def test_the_readme_s_diff_names_what_this_torch_has() -> None:
    assert "_reshard(x, x._handle, True)" in README
    assert list(_reshard.__code__.co_varnames[:3]) == ["state", "handle", "free_unsharded_flat_param"]
