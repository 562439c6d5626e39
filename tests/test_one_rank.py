"""A process group of one rank changes nothing, in any bit: centres, Sinkhorn-Knopp, KoLeo and the losses.

Every case runs without a process group, and then again with a gloo group of one, which is the default group alone, or given as
that of the rows or of the prototypes too.

Legend: B images, N patches, K prototypes, D embedding dim.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed import HashStore
from torch.nn import functional

from vmf_kernels import (
    DINOLoss,
    DINOvMFLoss,
    DistributedKoLeoLoss,
    IBOTLoss,
    KoLeoLoss,
    LogitCenter,
    ProbabilityCenter,
    PrototypeKoLeoLoss,
    PrototypeLogits,
    SinkhornKnopp,
    weight_norm_prototypes,
)
from vmf_kernels.centering.running_mean import RunningMean
from vmf_kernels.compat import dinov2, lightly
from vmf_kernels.ranks import count_ranks

PROTOTYPES, DIM, IMAGES, PATCHES, STEPS, TAU = 41, 8, 3, 4, 2, 0.05
GLOBAL, CROPS = 2, 3
GIVEN = ("default", "rows", "prototypes")  # how a case learns of the group
Results = dict[str, Tensor]
Groups = dict[str, Any]  # keywords of a loss or a centre


def logits(seed: int, *shape: int, student: bool = False) -> PrototypeLogits:
    """Unit rows and prototypes of free norm; the student's are leaves."""
    random = torch.Generator().manual_seed(seed)
    rows = functional.normalize(torch.randn(*shape, DIM, generator=random), dim=-1)
    random.manual_seed(17 + student)
    magnitude = 0.5 + torch.rand(PROTOTYPES, 1, generator=random)
    weight = torch.randn(PROTOTYPES, DIM, generator=random)
    for leaf in (rows, magnitude, weight):
        leaf.requires_grad_(student)
    return PrototypeLogits(rows, weight_norm_prototypes(magnitude, weight))


def with_gradients(loss: Tensor, *students: PrototypeLogits) -> Results:
    """The loss, and its gradients to what the students are made of."""
    leaves = [
        leaf
        for each in students
        for leaf in (each.features, each.prototypes.weight, each.prototypes.magnitude)
        if leaf is not None
    ]
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    found = {f"gradient {i}": gradient for i, gradient in enumerate(gradients) if gradient is not None}
    assert found, "no gradient to compare"
    return {"loss": loss.detach()} | found


def by_step(one: Callable[[int], Results]) -> Results:
    return {f"{step} {name}": tensor.clone() for step in range(STEPS) for name, tensor in one(step).items()}


def of_center(make: Callable[..., RunningMean], groups: Groups) -> Results:
    center = make(PROTOTYPES, start="first_batch", **groups)

    def one(step: int) -> Results:
        bias = center.target_bias(logits(step, 7), TAU)
        center.update(logits(step, 7), TAU)
        return {"bias": bias, "center": center.center}

    return by_step(one)


def of_sinkhorn(groups: Groups) -> Results:
    return by_step(lambda step: {"bias": SinkhornKnopp(3, **groups).target_bias(logits(step, 7), TAU)})


def of_features(make: Callable[..., torch.nn.Module], **options: Any) -> Results:
    """KoLeo of rows, and the gradient."""

    def one(step: int) -> Results:
        features = logits(step, 2 * IMAGES, student=True).features
        loss = make(**options)(features)
        return {"loss": loss.detach(), "gradient": torch.autograd.grad(loss, features)[0]}

    return by_step(one)


def of_prototypes(groups: Groups) -> Results:
    """KoLeo of prototypes, and the gradient."""
    prototypes = logits(0, 1, student=True).prototypes
    loss = PrototypeKoLeoLoss(group=groups.get("prototype_group"))(prototypes)
    return {"loss": loss.detach(), "gradient": torch.autograd.grad(loss, prototypes.weight)[0]}


def of_dino(make: Callable[..., Any], groups: Groups) -> Results:
    loss = make(PROTOTYPES, CROPS, 0.04, 0.07, STEPS, STEPS, **groups)

    def one(step: int) -> Results:
        student = logits(step, CROPS * IMAGES, student=True)
        found = with_gradients(loss(student, logits(step + 5, GLOBAL * IMAGES), step), student)
        return {**found, **of_statistics(loss.statistics), **loss.state_dict()}

    return by_step(one)


def of_ibot(masked: int, groups: Groups) -> Results:
    """With so many masked tokens of each image."""
    loss = IBOTLoss(PROTOTYPES, PROTOTYPES, GLOBAL, 0, 0.04, 0.07, 0.05, 0.08, STEPS, STEPS, **groups)
    masks = [(torch.arange(PATCHES) < masked).expand(IMAGES, PATCHES)] * GLOBAL
    rows = GLOBAL * IMAGES

    def one(step: int) -> Results:
        students = logits(step, rows, student=True), logits(step + 1, rows, PATCHES, student=True)
        teachers = logits(step + 5, rows), logits(step + 6, rows, PATCHES)
        losses = loss(students, teachers, None, masks, step)
        assert bool(losses["patch"] != 0) == (masked > 0)
        found = with_gradients(losses["loss"], *students) | {name: value.detach() for name, value in losses.items()}
        return found | of_statistics(loss.statistics) | loss.state_dict()

    return by_step(one)


def of_dinov2(groups: Groups) -> Results:
    loss = dinov2.DINOLoss(PROTOTYPES, **groups)

    def one(step: int) -> Results:
        student, teacher = logits(step, IMAGES, student=True), logits(step + 5, IMAGES)
        values = []
        for targets in (loss.softmax_center_teacher(teacher, TAU), loss.sinkhorn_knopp_teacher(teacher, TAU)):
            values.append(loss([student], [targets]))
        loss.update_center(teacher)
        return with_gradients(torch.stack(values).sum(), student) | loss.state_dict()

    return by_step(one)


def of_dinov2_patches(groups: Groups) -> Results:
    loss = dinov2.iBOTPatchLoss(PROTOTYPES, **groups)
    masks = (torch.arange(PATCHES) < 2).expand(IMAGES, PATCHES)

    def one(step: int) -> Results:
        student, teacher = logits(step, 2 * IMAGES, student=True), logits(step + 5, 2 * IMAGES)
        count = torch.tensor([2 * IMAGES])
        sinkhorn = loss.sinkhorn_knopp_teacher(teacher, TAU, n_masked_patches_tensor=count)
        both = (loss.softmax_center_teacher(teacher, TAU), sinkhorn)
        value = torch.stack([loss.forward_masked(student, targets, masks) for targets in both]).sum()
        loss.update_center(teacher[None])
        return with_gradients(value, student) | loss.state_dict()

    return by_step(one)


def of_lightly(groups: Groups) -> Results:
    loss = lightly.DINOLoss(PROTOTYPES, **groups)

    def one(step: int) -> Results:
        students = [logits(step + i, IMAGES, student=True) for i in range(CROPS)]
        shared = [PrototypeLogits(each.features, students[0].prototypes) for each in students]
        teacher = logits(step + 5, GLOBAL * IMAGES)
        value = loss([teacher[:IMAGES], teacher[IMAGES:]], shared, epoch=step)
        return with_gradients(value, *shared) | of_statistics(loss.statistics) | loss.state_dict()

    return by_step(one)


def of_statistics(statistics: Any) -> Results:
    return {"usage": statistics.usage, "mutual_information": statistics.mutual_information}


def group_exists() -> bool:
    """Whether there is a process group."""
    return torch.distributed.is_initialized()


CASES: dict[str, Callable[[Groups], Results]] = {
    "logit center": functools.partial(of_center, LogitCenter),
    "probability center": functools.partial(of_center, functools.partial(ProbabilityCenter, average="probability")),
    "log-probability center": functools.partial(of_center, ProbabilityCenter),
    "sinkhorn": of_sinkhorn,
    "koleo": lambda groups: of_features(KoLeoLoss),
    "koleo over ranks": lambda groups: of_features(DistributedKoLeoLoss, group=groups.get("row_group")),
    "koleo of prototypes": of_prototypes,
    "dino": functools.partial(of_dino, DINOLoss),
    "dino-vmf": functools.partial(of_dino, DINOvMFLoss),
    "ibot": functools.partial(of_ibot, 2),
    "ibot, nothing masked": functools.partial(of_ibot, 0),
    "dinov2": of_dinov2,
    "dinov2 patches": of_dinov2_patches,
    "lightly": of_lightly,
}


@pytest.fixture(scope="module")
def alone() -> dict[str, Results]:
    """Results of every case without a process group."""
    assert not group_exists(), "another test left its process group behind"
    return {name: case({}) for name, case in CASES.items()}


@pytest.fixture(scope="module")
def one_rank(alone: dict[str, Results]) -> Iterator[dict[str, Groups]]:
    """A process group of this process, and the ways to give it; after the cases without."""
    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    world = torch.distributed.group.WORLD
    assert count_ranks(world) == 1
    yield {"default": {}, "rows": {"row_group": world}, "prototypes": {"prototype_group": world}}
    torch.distributed.destroy_process_group()


def unequal(one: Results, other: Results) -> list[str]:
    """Names of what differs in any bit."""
    assert one.keys() == other.keys(), f"got {sorted(one)}, expected {sorted(other)}"
    return [name for name in one if not torch.equal(one[name], other[name])]


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("name", CASES)
def test_one_rank_gives_the_bits_of_no_group(
    one_rank: dict[str, Groups], alone: dict[str, Results], name: str, given: str
) -> None:
    assert group_exists()
    differing = unequal(CASES[name](one_rank[given]), alone[name])
    assert not differing, f"{', '.join(differing)} differ from those without a process group"


@pytest.mark.parametrize("name", CASES)
def test_a_unit_in_the_last_place_would_show(alone: dict[str, Results], name: str) -> None:
    """Negative control: the results are finite, and one changed bit of any makes the comparison fail."""
    for quantity, tensor in alone[name].items():
        assert tensor.isfinite().all(), f"{quantity} is not finite"
        assert tensor.dtype.is_floating_point
        moved = alone[name] | {quantity: tensor.nextafter(torch.full_like(tensor, torch.inf))}
        assert unequal(moved, alone[name]) == [quantity]
