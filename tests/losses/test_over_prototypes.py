"""The losses where two gloo ranks share the prototypes out: three batches each, equal to one process with all of them.

Both ranks have the same rows, and unequal blocks of both heads' prototypes. Every case runs with the same code on the ranks and
alone; all share one spawn.

Legend: B images, N patches, K prototypes, D embedding dim.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import functional

from tests.backends.prototype_ranks import Place, as_one, results_in, start_rank
from tests.measure import relative_error, worst_error
from tests.on_ranks import start_ranks
from vmf_kernels import (
    DINOLoss,
    DINOvMFLoss,
    IBOTLoss,
    IBOTvMFLoss,
    PrototypeLogits,
    Prototypes,
    weight_norm_prototypes,
)

RANKS = 2
CLASSES, PATCHES = (13, 27), (21, 5)  # prototypes of each rank: of class tokens, of patches
DIM, IMAGES, SIDE, STEPS = 8, 3, 2, 3
GLOBAL, LOCAL = 2, 1
CROPS = GLOBAL + LOCAL
TEMPERATURES = (0.04, 0.07, 3, STEPS)  # first, last, epochs of warm-up: every call has its own
PATCH_TEMPERATURES = (0.04, 0.07, 0.05, 0.08, 3, STEPS)
BUDGET = 1e-10  # relative, in norm, of fp64
LOSSES: dict[str, Any] = {"dino": DINOLoss, "dino-vmf": DINOvMFLoss, "ibot": IBOTLoss, "ibot-vmf": IBOTvMFLoss}
RULES = ("logit", "probability", "sinkhorn_knopp")
CASES = list(itertools.product(LOSSES, RULES))
# what a rank has of its own prototypes only
OF_PROTOTYPES = ("weight", "magnitude", "weight2", "magnitude2", "center", "center2", "usage", "usage2")
Results = dict[str, Tensor]


class Places(NamedTuple):
    """Which prototypes of either head a process has; all of them and no group when it is alone."""

    classes: Place = Place()
    patches: Place = Place()

    @classmethod
    def of(cls, rank: int, group: ProcessGroup | None) -> Places:
        return cls(Place.of(rank, CLASSES, group), Place.of(rank, PATCHES, group))

    def counts(self) -> tuple[int, int]:
        """Prototypes of either head that this process has."""
        return len(range(sum(CLASSES))[self.classes.block]), len(range(sum(PATCHES))[self.patches.block])


class Head(NamedTuple):
    """This process's prototypes of both networks; the student's are leaves."""

    student: Prototypes
    teacher: Prototypes

    @classmethod
    def of(cls, place: Place, count: int) -> Head:
        """Norms between 0.5 and 1.5 times 4, where the normaliser is far from 0; the teacher's are near the student's."""
        random = torch.Generator().manual_seed(count)
        direction = torch.randn(count, DIM, generator=random, dtype=torch.float64)
        magnitude = 4 * (0.5 + torch.rand(count, 1, generator=random, dtype=torch.float64))
        moved = direction + 0.3 * torch.randn(count, DIM, generator=random, dtype=torch.float64)
        student, teacher = (place.prototypes(weight_norm_prototypes(magnitude, each)) for each in (direction, moved))
        assert student.magnitude is not None
        student.weight.requires_grad_(), student.magnitude.requires_grad_()
        return cls(student, teacher)

    def leaves(self, suffix: str) -> Results:
        assert self.student.magnitude is not None
        return {f"weight{suffix}": self.student.weight, f"magnitude{suffix}": self.student.magnitude}


class Rows(NamedTuple):
    """Unit features of one call, the same in every process; the student's are leaves."""

    student: Tensor  # [G * B, D]
    local: Tensor  # [L * B, D]
    student_patches: Tensor  # [G * B, N, D]
    teacher: Tensor  # [G * B, D]
    teacher_patches: Tensor  # [G * B, N, D]
    masks: list[Tensor]  # G of [B, H, W]

    @classmethod
    def of(cls, step: int) -> Rows:
        random = torch.Generator().manual_seed(step)

        def unit(*shape: int) -> Tensor:
            return functional.normalize(torch.randn(*shape, DIM, generator=random, dtype=torch.float64), dim=-1)

        whole, patches = (GLOBAL * IMAGES,), (GLOBAL * IMAGES, SIDE * SIDE)
        masks = [torch.rand(IMAGES, SIDE, SIDE, generator=random) < 0.5 for _ in range(GLOBAL)]
        student, local, student_patches = (unit(*s).requires_grad_() for s in (whole, (LOCAL * IMAGES,), patches))
        return cls(student, local, student_patches, unit(*whole), unit(*patches), masks)

    def leaves(self) -> Results:
        return {"student": self.student, "local": self.local, "patches": self.student_patches}


def make_loss(name: str, rule: str, places: Places) -> Any:
    """fp64, its centres with it."""
    classes, patches = places.counts()
    options = {"centering": rule, "prototype_group": places.classes.group}
    if name.startswith("dino"):
        return LOSSES[name](classes, CROPS, *TEMPERATURES, **options).double()
    return LOSSES[name](classes, patches, GLOBAL, LOCAL, *PATCH_TEMPERATURES, **options).double()


def call(loss: Any, rows: Rows, heads: tuple[Head, Head], epoch: int) -> Tensor:
    """[] the whole loss of one batch."""
    of_classes, of_patches = heads
    student, teacher = of_classes
    if isinstance(loss, DINOLoss):
        crops = torch.cat([rows.student, rows.local])
        return loss(PrototypeLogits(crops, student), PrototypeLogits(rows.teacher, teacher), epoch)  # type: ignore[no-any-return]
    students = PrototypeLogits(rows.student, student), PrototypeLogits(rows.student_patches, of_patches.student)
    teachers = PrototypeLogits(rows.teacher, teacher), PrototypeLogits(rows.teacher_patches, of_patches.teacher)
    values: Results = loss(students, teachers, PrototypeLogits(rows.local, student), rows.masks, epoch)
    return values["loss"]


def case_of(name: str, rule: str, places: Places) -> Results:
    """Losses, gradients, centres and statistics by call."""
    loss = make_loss(name, rule, places)
    heads = Head.of(places.classes, sum(CLASSES)), Head.of(places.patches, sum(PATCHES))
    record: Results = {}
    for step in range(STEPS):
        rows = Rows.of(step)
        value = call(loss, rows, heads, step)
        leaves = rows.leaves() | heads[0].leaves("") | heads[1].leaves("2")
        if isinstance(loss, DINOLoss):
            leaves = {key: leaf for key, leaf in leaves.items() if key != "patches" and not key.endswith("2")}
        gradients = torch.autograd.grad(value, list(leaves.values()))
        found = {"loss": value.detach()} | dict(zip(leaves, gradients, strict=True))
        found |= {key: center.flatten().clone() for key, center in loss.state_dict().items()}
        for suffix, stream in (("", loss.statistics), ("2", getattr(loss, "patch_statistics", None))):
            if stream is not None:
                found |= {f"usage{suffix}": stream.usage, f"mutual_information{suffix}": stream.mutual_information}
        record |= {f"{step} {key}": tensor for key, tensor in found.items()}
    return record


def run_rank(rank: int, folder: str) -> None:
    start_rank(rank, folder, RANKS)
    places = Places.of(rank, torch.distributed.group.WORLD)
    torch.save({f"{name} {rule}": case_of(name, rule, places) for name, rule in CASES}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Results]]:
    folder = tmp_path_factory.mktemp("ranks")
    start_ranks(run_rank, (str(folder),), RANKS)
    return results_in(Path(folder), RANKS)


def joined(ranks: Sequence[dict[str, Results]], case: str) -> Results:
    results = [rank[case] for rank in ranks]
    return as_one(results, [key for key in results[0] if key.split()[1] in OF_PROTOTYPES])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_over_prototypes_equals_that_of_one_process(
    ranks: list[dict[str, Results]], name: str, rule: str
) -> None:
    expected = case_of(name, rule, Places())
    error, quantity = worst_error(joined(ranks, f"{name} {rule}"), expected)
    assert error <= BUDGET, f"{quantity}: relative error {error:.1e}, budget {BUDGET:.0e}"
    centers = {"center", "center2"} if name.startswith("ibot") else {"center"}
    measured = {key.split()[1] for key in expected}
    assert measured & {"center", "center2"} == (set() if rule == "sinkhorn_knopp" else centers)
    assert all(tensor.any() for tensor in expected.values()), "a quantity is 0 throughout: its comparison says nothing"


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_of_own_prototypes_alone_is_another(name: str, rule: str) -> None:
    """Negative control: each rank's prototypes without the group."""
    expected = case_of(name, rule, Places())["0 loss"]
    for rank in range(RANKS):
        error = relative_error(case_of(name, rule, Places.of(rank, None))["0 loss"], expected)
        assert error > 1e-3, f"rank {rank}: relative difference {error:.1e}"
