"""The drop-ins for DINOv2 and DINOv3 on two gloo ranks with unequal numbers of masked patches, down to none on one of them.

Every case runs on both ranks, which share one spawn; what is expected comes from the published formulas on all rows.

Legend: M masked patches, B images, K prototypes, D bottleneck dim.
"""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tests.fuzz.statements.dinov2 import (
    PublishedKoLeoLoss,
    PublishedPatchLoss,
    PublishedV2Loss,
    mean_over_ranks_of_means,
)
from tests.measure import relative_error
from tests.on_ranks import start_ranks
from vmf_kernels import PrototypeLogits, linear_prototypes
from vmf_kernels.compat import dinov2, dinov3
from vmf_kernels.unstored.teacher_targets import TeacherTargets

RANKS = 2
PROTOTYPES, DIM, ROWS = 51, 8, 8
BUDGET = 1e-10  # relative, in norm, fp64
SEEN = 1e6  # a broken formula must be off by so many budgets
TAU = 0.05
SPLITS = {"equal": (4, 4), "unequal": (5, 3), "first-only": (8, 0), "second-only": (0, 8)}
MODULES = {"v2": dinov2, "v3": dinov3}
OUTPUTS = ["unstored", "stored"]
Results = dict[str, Tensor]


def logits(seed: int) -> PrototypeLogits:
    """[8, K] of all ranks."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(PROTOTYPES, DIM, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    features = torch.randn(ROWS, DIM, generator=generator, dtype=torch.float64)
    return PrototypeLogits(functional.normalize(features, dim=1), linear_prototypes(weight.requires_grad_()))


def rows_of(rank: int, split: tuple[int, ...]) -> slice:
    return slice(sum(split[:rank]), sum(split[: rank + 1]))


def masks_of(masked: int) -> Tensor:
    """[2, 8] masks of two images with so many masked patches, two thirds of them in the first."""
    masks = torch.zeros(2, ROWS, dtype=torch.bool)
    masks[0, : masked - masked // 3] = True
    masks[1, : masked // 3] = True
    return masks


def made(loss: Any) -> Any:
    instance = loss(PROTOTYPES)
    if hasattr(instance, "init_weights"):
        instance.init_weights()
    return instance.double()


def values_of(targets: TeacherTargets | Tensor) -> Tensor:
    return targets if isinstance(targets, Tensor) else targets.materialize()


def loss_case(module: ModuleType, output: str, rank: int, split: tuple[int, ...]) -> Results:
    """Centres, Sinkhorn targets, and the patches' loss with its gradient at the prototypes."""
    mine, student = rows_of(rank, split), logits(1)
    teacher_rows, student_rows = (
        part[mine] if output == "unstored" else part[mine].materialize() for part in (logits(2), student)
    )
    cls, patches, count = made(module.DINOLoss), made(module.iBOTPatchLoss), torch.tensor([split[rank]])
    cls.update_center(teacher_rows)
    patches.update_center(teacher_rows.unsqueeze(0))
    targets = patches.sinkhorn_knopp_teacher(teacher_rows, TAU, count)
    loss = patches.forward_masked(student_rows, targets, masks_of(split[rank]), split[rank])
    loss.backward()
    assert student.prototypes.weight.grad is not None
    return {
        "cls center": cls.state_dict()["center"],
        "patch center": patches.state_dict()["center"],
        "cls targets": values_of(cls.sinkhorn_knopp_teacher(teacher_rows, TAU)),
        "targets": values_of(targets),
        "count": count,
        "loss": loss.detach(),
        "gradient": student.prototypes.weight.grad,
    }


def koleo_case(rank: int, split: tuple[int, ...], topk: int, size: int | None) -> Results:
    """The loss of this rank's rows, and what all ranks' losses give them."""
    x = logits(3).features[rows_of(rank, split)].clone().requires_grad_()
    loss = dinov3.KoLeoLossDistributed(topk, size)(x)
    loss.backward()
    assert x.grad is not None
    return {"loss": loss.detach(), "gradient": x.grad}


def shared_out_case(rank: int, module: ModuleType) -> Results:
    """Each rank holds half the prototypes and all rows: losses, gradients and centres of both."""
    own = slice(0, 26) if rank == 0 else slice(26, PROTOTYPES)
    student, teacher = logits(1), logits(2).detach()
    parts = [
        PrototypeLogits(part.features, linear_prototypes(part.prototypes.weight[own])) for part in (student, teacher)
    ]
    group, masks = torch.distributed.group.WORLD, masks_of(ROWS)
    cls, patches = (
        loss(own.stop - own.start, prototype_group=group) for loss in (module.DINOLoss, module.iBOTPatchLoss)
    )
    results = {}
    for name, loss in (("cls", cls), ("patch", patches)):
        if hasattr(loss, "init_weights"):
            loss.init_weights()
        loss.double().update_center(parts[1])
        results[f"{name} center"] = loss.state_dict()["center"].flatten()
        targets = loss.sinkhorn_knopp_teacher(parts[1], TAU, *([torch.tensor([ROWS])] if name == "patch" else []))
        value = loss.forward_masked(parts[0], targets, masks) if name == "patch" else None
        if value is None:
            value = loss([parts[0]], [targets]) if module is dinov2 else loss(parts[0][None], targets[None])
        (gradient,) = torch.autograd.grad(value, student.prototypes.weight)
        results |= {f"{name} loss": value.detach(), f"{name} gradient": gradient[own]}
    return results


def spoilt_case(rank: int, module: ModuleType) -> Results:
    """Centres where the batch in the middle has bad logits to a prototype of rank 1 only, and without that batch."""
    own = slice(0, 26) if rank == 0 else slice(26, PROTOTYPES)
    results = {}
    for name, seeds in (("with", (1, 2, 3)), ("without", (1, 3))):
        loss = module.DINOLoss(own.stop - own.start, prototype_group=torch.distributed.group.WORLD)
        if hasattr(loss, "init_weights"):
            loss.init_weights()
        loss = copy.deepcopy(loss.double())
        for seed in seeds:
            rows = logits(seed).materialize().detach()[:, own].contiguous()
            if seed == 2 and rank == 1:
                rows[3, 4] = torch.inf
            loss.update_center(rows)
        results[name] = loss.state_dict()["center"].flatten()
    return results


KOLEO = {"all": (1, None), "three nearest": (3, None), "own group": (1, 4), "one group": (1, 8)}


def run_rank(rank: int, folder: str) -> None:
    """All cases on one rank; what they gave goes to a file."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    results = {
        f"{version} {output} {name}": loss_case(module, output, rank, split)
        for (version, module), output, (name, split) in itertools.product(MODULES.items(), OUTPUTS, SPLITS.items())
    }
    results |= {f"koleo {name}": koleo_case(rank, (4, 4), *options) for name, options in KOLEO.items()}
    results["koleo unequal"] = koleo_case(rank, SPLITS["unequal"], 1, None)
    results |= {f"shared out {version}": shared_out_case(rank, module) for version, module in MODULES.items()}
    results |= {f"spoilt {version}": spoilt_case(rank, module) for version, module in MODULES.items()}
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Results]]:
    folder = tmp_path_factory.mktemp("ranks")
    start_ranks(run_rank, (str(folder),), RANKS)
    return [torch.load(Path(folder, f"{rank}.pt"), weights_only=True) for rank in range(RANKS)]


def assert_close(got: Tensor, expected: Tensor) -> None:
    error = relative_error(got, expected)
    assert error <= BUDGET, f"relative error {error:.2e}, budget {BUDGET:.0e}"


CASES = pytest.mark.parametrize(
    ("version", "output", "name"),
    [pytest.param(*case, id="-".join(case)) for case in itertools.product(MODULES, OUTPUTS, SPLITS)],
)


@CASES
def test_centers_are_those_of_all_ranks(ranks: list[dict[str, Results]], version: str, output: str, name: str) -> None:
    """The class tokens' weighs rows alike, the patches' the ranks that have any."""
    teacher, split = logits(2).materialize().detach(), SPLITS[name]
    by_rank = [teacher[rows_of(rank, split)] for rank in range(RANKS)]
    for results in (rank[f"{version} {output} {name}"] for rank in ranks):
        assert_close(results["cls center"].flatten(), 0.1 * teacher.mean(dim=0))
        assert_close(results["patch center"].flatten(), 0.1 * mean_over_ranks_of_means(by_rank))


def test_the_two_means_differ_for_unequal_ranks() -> None:
    """Negative control: one in the place of the other would show."""
    teacher = logits(2).materialize().detach()
    by_rank = [teacher[rows_of(rank, SPLITS["unequal"])] for rank in range(RANKS)]
    error = relative_error(mean_over_ranks_of_means(by_rank), teacher.mean(dim=0))
    assert error > SEEN * BUDGET, f"relative difference {error:.2e}"


@CASES
def test_sinkhorn_targets_are_those_of_all_rows(
    ranks: list[dict[str, Results]], version: str, output: str, name: str
) -> None:
    whole = PublishedV2Loss(PROTOTYPES).sinkhorn_knopp_teacher(logits(2).materialize().detach(), TAU)
    for rank, results in enumerate(each[f"{version} {output} {name}"] for each in ranks):
        expected = whole[rows_of(rank, SPLITS[name])]
        assert results["count"].item() == SPLITS[name][rank], "the caller's tensor was written to"
        for targets in (results["targets"], results["cls targets"]):
            assert targets.shape == expected.shape
            assert_close(targets, expected)


def test_a_rank_s_own_plan_is_another() -> None:
    """Negative control: targets of one rank's rows alone would show."""
    teacher = logits(2).materialize().detach()
    whole, own = (PublishedV2Loss(PROTOTYPES).sinkhorn_knopp_teacher(part, TAU) for part in (teacher, teacher[:5]))
    error = relative_error(own, whole[:5])
    assert error > SEEN * BUDGET, f"relative difference {error:.2e}"


@CASES
def test_patch_losses_and_gradients_equal_the_published_ones(
    ranks: list[dict[str, Results]], version: str, output: str, name: str
) -> None:
    """0 on a rank without masked patches."""
    for rank, results in enumerate(each[f"{version} {output} {name}"] for each in ranks):
        split, student = SPLITS[name], logits(1)
        mine, published = rows_of(rank, split), PublishedPatchLoss(PROTOTYPES).double()
        targets = published.sinkhorn_knopp_teacher(logits(2).materialize().detach(), TAU, torch.tensor([ROWS]))[mine]
        expected = published.forward_masked(student[mine].materialize(), targets, masks_of(split[rank]))
        expected.backward()
        if split[rank] == 0:
            assert results["loss"] == 0
            assert results["gradient"].eq(0).all()
        else:
            assert_close(results["loss"], expected)
            assert student.prototypes.weight.grad is not None
            assert_close(results["gradient"], student.prototypes.weight.grad)


@pytest.mark.parametrize("name", [*KOLEO, "unequal"])
def test_distributed_koleo_equals_the_published_formula(ranks: list[dict[str, Results]], name: str) -> None:
    split = SPLITS["unequal"] if name == "unequal" else SPLITS["equal"]
    topk, size = KOLEO.get(name, (1, None))
    x = logits(3).features.clone().requires_grad_()
    groups = x.split(size or ROWS)
    # with equal ranks, the sum over ranks of their means is the sum over groups, each as often as it has ranks
    expected = sum(PublishedKoLeoLoss(topk)(group) * (RANKS / len(groups)) for group in groups)
    assert isinstance(expected, Tensor)
    expected.backward()
    losses = [rank[f"koleo {name}"]["loss"] for rank in ranks]
    if name == "unequal":
        mean = sum(loss * rows for loss, rows in zip(losses, split, strict=True)) / ROWS
        assert_close(torch.as_tensor(mean), expected.detach() / RANKS)
        return
    assert_close(torch.stack(losses).sum(), expected.detach())
    assert x.grad is not None
    assert_close(torch.cat([rank[f"koleo {name}"]["gradient"] for rank in ranks]), x.grad)


def test_groups_of_ranks_are_another_loss() -> None:
    """Negative control: neighbours among fewer rows are farther away."""
    x = logits(3).features
    whole, halves = PublishedKoLeoLoss()(x), torch.stack([PublishedKoLeoLoss()(half) for half in x.chunk(2)]).mean()
    error = relative_error(halves, whole)
    assert error > SEEN * BUDGET, f"relative difference {error:.2e}"


@pytest.mark.parametrize("version", MODULES)
def test_prototypes_shared_out_over_ranks_give_the_loss_of_all(ranks: list[dict[str, Results]], version: str) -> None:
    student, teacher = logits(1), logits(2).materialize().detach()
    targets = PublishedV2Loss(PROTOTYPES).sinkhorn_knopp_teacher(teacher, TAU)
    expected = {
        "cls": PublishedV2Loss(PROTOTYPES)([student.materialize()], [targets]),
        "patch": PublishedPatchLoss(PROTOTYPES).forward_masked(student.materialize(), targets, masks_of(ROWS)),
    }
    results = [rank[f"shared out {version}"] for rank in ranks]
    for name, loss in expected.items():
        (gradient,) = torch.autograd.grad(loss, student.prototypes.weight)
        for result in results:
            assert_close(result[f"{name} loss"], loss)
        assert_close(torch.cat([result[f"{name} gradient"] for result in results]), gradient)
        assert_close(torch.cat([result[f"{name} center"] for result in results]), 0.1 * teacher.mean(dim=0))


@pytest.mark.parametrize("version", MODULES)
def test_a_batch_that_is_bad_on_one_rank_counts_as_none_on_all(ranks: list[dict[str, Results]], version: str) -> None:
    """In deep copies of the losses, which share their group."""
    expected = 0.1 * torch.cat([logits(seed).materialize().detach() for seed in (1, 3)]).mean(dim=0)
    for name in ("with", "without"):
        assert_close(torch.cat([rank[f"spoilt {version}"][name] for rank in ranks]), expected)


@pytest.mark.parametrize("version", MODULES)
def test_a_group_of_one_rank_changes_nothing(version: str, tmp_path: Path) -> None:
    everything = (0, (ROWS,))
    alone = [loss_case(MODULES[version], output, *everything) for output in OUTPUTS], koleo_case(*everything, 1, 8)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        one = [loss_case(MODULES[version], output, *everything) for output in OUTPUTS], koleo_case(*everything, 1, 8)
    finally:
        torch.distributed.destroy_process_group()
    for got, expected in zip([*one[0], one[1]], [*alone[0], alone[1]], strict=True):
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[name], expected[name]) for name in expected)
