"""Two gloo ranks against one process that sees all rows: centres, losses, gradients, and gradient accumulation.

Every case runs three times with the same code, once a rank and once alone; ``Share`` says which images are whose. All cases
share one spawn of the ranks.

Legend: B images, K prototypes, D bottleneck dim.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from tests.fuzz.statements.dino import follow
from tests.measure import relative_error, worst_error
from tests.on_ranks import RANKS, Runs, run_cases
from vmf_kernels import (
    DINOHead,
    DINOLoss,
    DINOvMFLoss,
    LogitCenter,
    ProbabilityCenter,
    PrototypeLogits,
    SinkhornKnopp,
    vmf_prototypes,
)
from vmf_kernels.centering.running_mean import RunningMean

PROTOTYPES, DIM, IN_DIM, CROPS = 301, 24, 12, 4
BUDGET = 1e-5  # relative, in norm
TAU = 0.05
SPLITS = {"equal": (4, 4), "unequal": (6, 2), "first-only": (8, 0), "second-only": (0, 8)}
CENTERS = ("logit", "log_probability", "probability")
LOSSES: dict[str, type[DINOLoss]] = {"dino": DINOLoss, "vmf": DINOvMFLoss}
OUTPUTS = ("unstored", "stored")
DDP_OPTIONS = ("find_unused_parameters", "static_graph")  # both make DDP look for tensors in a module's output
Results = dict[str, Tensor]


class Share(NamedTuple):
    """Which rows one process has: those of its rank, or all of them when it is alone."""

    rank: int | None

    def rows(self, split: tuple[int, ...]) -> slice:
        """This process's slice of ``sum(split)`` rows dealt out to the ranks in order."""
        if self.rank is None:
            return slice(0, sum(split))
        return slice(sum(split[: self.rank]), sum(split[: self.rank + 1]))

    def images(self, crops: Tensor) -> Tensor:
        """This process's images of [crops, B, ...], flattened view-major."""
        return crops.flatten(0, 1) if self.rank is None else crops[:, self.rank :: RANKS].flatten(0, 1)


def make_center(kind: str, start: str = "zero") -> RunningMean:
    if kind == "logit":
        return LogitCenter(PROTOTYPES, start=start)
    return ProbabilityCenter(PROTOTYPES, average=kind, start=start)


def teacher_batches() -> list[PrototypeLogits]:
    """Two batches of eight rows, with norms at which probabilities underflow in fp32."""
    torch.manual_seed(1)
    prototypes = vmf_prototypes(torch.randn(PROTOTYPES, DIM) * (15 / DIM**0.5))
    return [PrototypeLogits(nn.functional.normalize(torch.randn(8, DIM), dim=1), prototypes) for _ in range(2)]


def as_given(logits: PrototypeLogits, output: str) -> PrototypeLogits | Tensor:
    return logits if output == "unstored" else logits.materialize()


def center_cases(share: Share) -> Results:
    """Centres after two batches dealt out to the ranks, from both starts."""
    results = {}
    for kind, output, (name, split), start in itertools.product(
        CENTERS, OUTPUTS, SPLITS.items(), ("zero", "first_batch")
    ):
        center = make_center(kind, start)
        for logits in teacher_batches():
            mine = as_given(logits[share.rows(split)], output)
            center.begin(mine, TAU)
            center.update(mine, TAU)
        results[f"{kind} {output} {name} {start}"] = center.center
    return results


def micro_batch_cases(share: Share) -> Results:
    """Centres after two micro-batches, the second of which leaves rank 1 without rows, moved at once."""
    results = {}
    for kind, output in itertools.product(CENTERS, OUTPUTS):
        center = make_center(kind)
        for logits, split in zip(teacher_batches(), (SPLITS["unequal"], SPLITS["first-only"]), strict=True):
            center.accumulate(as_given(logits[share.rows(split)], output), TAU)
        center.apply_pending()
        results[f"{kind} {output}"] = center.center
    return results


def bad_batch_cases(share: Share) -> Results:
    """How far centres move by a batch whose last row, on rank 1 only, is not finite."""
    results = {}
    for kind, output, value in itertools.product(CENTERS, OUTPUTS, (math.nan, math.inf, -math.inf)):
        center, (good, bad) = make_center(kind), teacher_batches()
        rows = share.rows(SPLITS["equal"])
        center.update(as_given(good[rows], output), TAU)
        before = center.center.clone()
        bad.features[-1, 0] = value
        center.update(as_given(bad[rows], output), TAU)
        results[f"{kind} {output} {value}"] = center.center - before
    return results


def networks() -> tuple[DINOHead, DINOHead]:
    torch.manual_seed(2)
    student = DINOHead(IN_DIM, PROTOTYPES, norm_last_layer=False, nlayers=2, hidden_dim=16, bottleneck_dim=DIM)
    with torch.no_grad():
        student.mlp[0].weight.mul_(20)  # type: ignore[index]
        student.last_layer.weight_g.uniform_(0.5, 1.5)
    return student, copy.deepcopy(student).requires_grad_(False)


def loss_of(loss: DINOLoss, student: Any, teacher: Any, output: str) -> Tensor:
    if output == "unstored":
        return loss(student, teacher, 0)  # type: ignore[no-any-return]
    norms = {}
    if isinstance(loss, DINOvMFLoss):
        norms = {"student_prototypes": student.prototypes, "teacher_prototypes": teacher.prototypes}
    return loss(student.materialize(), teacher.materialize(), 0, **norms)  # type: ignore[no-any-return]


def train(share: Share, loss: DINOLoss, output: str, micro_batches: int = 1, **ddp: Any) -> Results:
    """Three steps of a head under DDP (plain when alone): losses, gradients and centres by step."""
    student, teacher = networks()
    model: Any = student if share.rank is None else nn.parallel.DistributedDataParallel(student, **ddp)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05)
    results: Results = {}
    for step in range(3):
        optimizer.zero_grad()
        crops = torch.randn(CROPS, 8, IN_DIM, generator=torch.Generator().manual_seed(step))
        total = torch.zeros(())
        parts = crops.chunk(micro_batches, dim=1)
        for i, part in enumerate(parts):
            later = share.rank is not None and i + 1 < len(parts)
            with model.no_sync() if later else contextlib.nullcontext():
                out, views = model(share.images(part)), teacher(share.images(part[:2] + 0.1))
                value = loss_of(loss, out, views, output) / len(parts)
                value.backward()
            total += value.detach()
        loss.update_center()
        gradients = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
        named = {"loss": total, "center": loss.center.clone(), **gradients}
        results |= {f"step {step} {name}": tensor for name, tensor in named.items()}
        optimizer.step()
        follow(teacher, student, 0.9)
    return results


def make_loss(method: str, update: str = "forward") -> DINOLoss:
    return LOSSES[method](PROTOTYPES, CROPS, TAU, TAU, 0, 1, center_update=update)


def training_cases(share: Share) -> dict[str, Results]:
    """DDP with whole batches, and with two micro-batches a step, the centre moved by hand."""
    results = {}
    for method, output in itertools.product(LOSSES, OUTPUTS):
        results[f"{method} {output} whole"] = train(share, make_loss(method), output)
        results[f"{method} {output} manual"] = train(share, make_loss(method, "manual"), output, micro_batches=2)
        results[f"{method} {output} forward"] = train(share, make_loss(method), output, micro_batches=2)
        for option in DDP_OPTIONS:
            results[f"{method} {output} {option}"] = train(share, make_loss(method), output, **{option: True})
    return results


def rank_without_rows_case(share: Share) -> Results:
    """A loss without DDP where rank 1 has no image: its collectives must still run."""
    student, teacher = networks()
    crops = torch.randn(CROPS, 3, IN_DIM, generator=torch.Generator().manual_seed(9))
    mine = crops[:, :0] if share.rank == 1 else crops
    results = {}
    for method, output in itertools.product(LOSSES, OUTPUTS):
        loss = make_loss(method)
        value = loss_of(loss, student(mine.flatten(0, 1)), teacher(mine[:2].flatten(0, 1)), output)
        results[f"{method} {output} loss"], results[f"{method} {output} center"] = value.detach(), loss.center
    return results


def copy_case(share: Share) -> Results:
    """Centres and dual vectors by modules with process groups and by their deep copies, which share them."""
    group = None if share.rank is None else torch.distributed.group.WORLD
    rows = torch.randn(8, 10, generator=torch.Generator().manual_seed(4))[share.rows(SPLITS["unequal"])]
    results = {}
    for kind in ("logit", "probability"):
        center = LogitCenter(10, row_group=group) if kind == "logit" else ProbabilityCenter(10, row_group=group)
        for name, each in (("copy", copy.deepcopy(center)), ("original", center)):
            each.update(rows, TAU)
            results[f"{kind} {name}"] = each.center[0]
    sinkhorn = SinkhornKnopp(row_group=group)
    for name, rule in (("copy", copy.deepcopy(sinkhorn)), ("original", sinkhorn)):
        results[f"sinkhorn {name}"] = rule.target_bias(rows, TAU)
    blocks = LogitCenter(10, prototype_group=group), SinkhornKnopp(prototype_group=group)
    for module in blocks:
        assert copy.deepcopy(module).prototype_group is group
    return results


CASES: tuple[Callable[[Share], Any], ...] = (
    center_cases,
    micro_batch_cases,
    bad_batch_cases,
    training_cases,
    rank_without_rows_case,
    copy_case,
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return run_cases(tmp_path_factory.mktemp("ranks"), CASES, Share)


@pytest.mark.parametrize("start", ["zero", "first_batch"])
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("kind", CENTERS)
def test_center_equals_that_of_all_rows(runs: Runs, kind: str, output: str, split: str, start: str) -> None:
    name = f"{kind} {output} {split} {start}"
    expected = runs.alone["center_cases"][name]
    for rank in runs.ranks:
        error = relative_error(rank["center_cases"][name], expected)
        assert error <= BUDGET, f"relative error {error:.2e}, budget {BUDGET:.0e}"
    assert torch.equal(*(rank["center_cases"][name] for rank in runs.ranks)), "the ranks disagree"


@pytest.mark.parametrize("kind", CENTERS)
def test_mean_over_ranks_of_means_differs_from_the_center_of_all_rows(kind: str) -> None:
    """Negative control: with unequal rows the average of per-rank centres is another one."""
    centers = [make_center(kind) for _ in range(RANKS)]
    for rank, center in enumerate(centers):
        center.update(teacher_batches()[0][Share(rank).rows(SPLITS["unequal"])], TAU)
    whole = make_center(kind)
    whole.update(teacher_batches()[0], TAU)
    mean = torch.stack([center.center for center in centers]).mean(dim=0)
    error = relative_error(mean, whole.center)
    assert error > 100 * BUDGET, f"relative difference {error:.2e}"


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("kind", CENTERS)
def test_micro_batches_on_two_ranks_equal_one_big_batch(runs: Runs, kind: str, output: str) -> None:
    expected = big_center(kind, output)
    for results in (*runs.ranks, runs.alone):
        error = relative_error(results["micro_batch_cases"][f"{kind} {output}"], expected)
        assert error <= BUDGET, f"relative error {error:.2e}, budget {BUDGET:.0e}"


def big_center(kind: str, output: str) -> Tensor:
    """The centre after both batches as one."""
    first, second = teacher_batches()
    both = PrototypeLogits(torch.cat([first.features, second.features]), first.prototypes)
    center = make_center(kind)
    center.update(as_given(both, output), TAU)
    return center.center


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("kind", CENTERS)
def test_a_bad_row_on_one_rank_leaves_every_center(runs: Runs, kind: str, output: str, value: float) -> None:
    for results in (*runs.ranks, runs.alone):
        moved = results["bad_batch_cases"][f"{kind} {output} {value}"]
        assert moved.eq(0).all(), f"the centre moved by up to {moved.abs().max().item():.2e}"


def mean_of_losses(ranks: list[Results]) -> Results:
    """Rank 0's quantities with its losses replaced by the mean over ranks, as images are shared equally."""
    losses = {name: torch.stack([rank[name] for rank in ranks]).mean() for name in ranks[0] if name.endswith("loss")}
    return ranks[0] | losses


@pytest.mark.parametrize("update", ["whole", "manual", *DDP_OPTIONS])
@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("method", LOSSES)
def test_two_ranks_equal_one_with_both_batches(runs: Runs, method: str, output: str, update: str) -> None:
    ranks = [rank["training_cases"][f"{method} {output} {update}"] for rank in runs.ranks]
    expected = runs.alone["training_cases"][f"{method} {output} whole"]
    error, name = worst_error(mean_of_losses(ranks), expected)
    assert error <= BUDGET, f"{name}: relative error {error:.2e}, budget {BUDGET:.0e}"
    for name, tensor in ranks[0].items():
        assert name.endswith("loss") or torch.equal(tensor, ranks[1][name]), f"the ranks disagree on {name}"


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("method", LOSSES)
def test_manual_update_under_accumulation_equals_one_big_batch(runs: Runs, method: str, output: str) -> None:
    results = runs.alone["training_cases"]
    error, name = worst_error(results[f"{method} {output} manual"], results[f"{method} {output} whole"])
    assert error <= BUDGET, f"{name}: relative error {error:.2e}, budget {BUDGET:.0e}"


@pytest.mark.parametrize("method", LOSSES)
def test_update_in_forward_under_accumulation_is_another_run(runs: Runs, method: str) -> None:
    """Negative control: moving the centre with every micro-batch is not one big batch."""
    results = runs.alone["training_cases"]
    error, _ = worst_error(results[f"{method} unstored forward"], results[f"{method} unstored whole"])
    assert error > 100 * BUDGET, f"relative difference {error:.2e}"


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("method", LOSSES)
def test_a_rank_without_rows_keeps_up(runs: Runs, method: str, output: str) -> None:
    first, second = (rank["rank_without_rows_case"] for rank in runs.ranks)
    alone, name = runs.alone["rank_without_rows_case"], f"{method} {output}"
    torch.testing.assert_close(first[f"{name} loss"], alone[f"{name} loss"])
    assert second[f"{name} loss"] == 0
    for results in (first, second):
        error = relative_error(results[f"{name} center"], alone[f"{name} center"])
        assert error <= BUDGET, f"relative error {error:.2e}, budget {BUDGET:.0e}"


@pytest.mark.parametrize("rule", ["logit", "probability", "sinkhorn"])
def test_a_deep_copy_counts_rows_over_the_same_ranks(runs: Runs, rule: str) -> None:
    expected = runs.alone["copy_case"][f"{rule} original"]
    for rank in runs.ranks:
        for name in ("copy", "original"):
            torch.testing.assert_close(rank["copy_case"][f"{rule} {name}"], expected)
