"""Training steps of iBOT, the library's and the published code's, on the same numbers.

Legend: G global crops, L local crops, B images, N patches, K / K2 prototypes of class tokens / patches, D bottleneck dim.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tests.fuzz.statements.ibot import PublishedIBOTHead, PublishedIBOTvMFLoss
from tests.measure import worst_error
from vmf_kernels.compat.ibot import iBOTHead

GLOBAL, LOCAL, IMAGES, SIDE, STEPS = 2, 2, 3, 3, 5
PATCHES = SIDE * SIDE
IN_DIM, DIM = 12, 24
PROTOTYPES = (131, 97)  # of class tokens, of patches
TEMPERATURES = (0.04, 0.07, 0.05, 0.08, 3)  # of class tokens, of patches, and epochs of warm-up: every step has its own
MASKED = (0.0, 0.4, 0.8)  # share of masked patches; one image of each crop has none

Record = dict[str, Tensor]
Step = Callable[[Any, Any, "Batch", int], dict[str, Tensor]]


class Batch(NamedTuple):
    """Tokens of the backbones."""

    crops: Tensor  # [G * B, 1 + N, C] masked, as the student sees them
    local: Tensor | None  # [L * B, 1 + 4, C]
    views: Tensor  # [G * B, 1 + N, C] as the teacher sees them
    masks: list[Tensor]  # G of [B, H, W]


def schedule(prototypes: tuple[int, int] = PROTOTYPES, local: int = LOCAL) -> tuple[Any, ...]:
    """The arguments without a default, by position."""
    return (*prototypes, GLOBAL, local, *TEMPERATURES, STEPS)


def make_batch(step: int, dtype: torch.dtype = torch.float32, local: int = LOCAL, images: int = IMAGES) -> Batch:
    random = torch.Generator().manual_seed(step)

    def tokens(*shape: int) -> Tensor:
        return torch.randn(*shape, IN_DIM, generator=random, dtype=torch.float64).to(dtype)

    shares = torch.tensor(MASKED)
    masks = []
    for _ in range(GLOBAL):
        of_image = shares[(torch.randperm(images, generator=random) + step) % len(shares)]
        masks.append(torch.rand(images, SIDE, SIDE, generator=random) < of_image[:, None, None])
    crops = tokens(GLOBAL * images, 1 + PATCHES).requires_grad_()
    of_local = tokens(local * images, 5).requires_grad_() if local else None
    return Batch(crops, of_local, crops.detach() + 0.3 * tokens(GLOBAL * images, 1 + PATCHES), masks)


def heads(
    dtype: torch.dtype = torch.float32,
    *,
    prototypes: tuple[int, int] = PROTOTYPES,
    shared: bool = False,
    shared_teacher: bool | None = None,
    frozen_norm: bool = False,
    dim: int = DIM,
) -> tuple[iBOTHead, iBOTHead]:
    """A student and a teacher near it, norms between 0.5 and 1.5 with either sign unless frozen."""
    options: dict[str, Any] = {"patch_out_dim": prototypes[1], "nlayers": 2, "hidden_dim": 16, "bottleneck_dim": dim}
    student = iBOTHead(IN_DIM, prototypes[0], norm_last_layer=frozen_norm, shared_head=shared, **options).double()
    with torch.no_grad():
        student.mlp[0].weight.mul_(8)  # type: ignore[index]
        if not frozen_norm:
            for layer in dict.fromkeys((student.last_layer, student.last_layer2)):  # one or two, in this order
                layer.weight_g.copy_((0.5 + torch.rand_like(layer.weight_g)) * torch.randn_like(layer.weight_g).sign())
    if shared_teacher is None or shared_teacher == shared:
        teacher = copy.deepcopy(student)
    else:
        teacher = iBOTHead(IN_DIM, prototypes[0], shared_head=shared_teacher, **options).double()
        teacher.load_state_dict(student.state_dict(), strict=False)
    teacher.requires_grad_(False)
    with torch.no_grad():
        for name, parameter in teacher.named_parameters():
            if not (frozen_norm and name.endswith("weight_g")):
                parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
    return student.to(dtype), teacher.to(dtype)


def twin_of(head: iBOTHead) -> PublishedIBOTHead:
    """The published head with the parameters of ours, in fp64."""
    counts = head.last_layer.weight_g.shape[0], head.last_layer2.weight_g.shape[0]
    twin = PublishedIBOTHead(
        IN_DIM,
        counts[0],
        patch_out_dim=counts[1],
        nlayers=2,
        hidden_dim=16,
        bottleneck_dim=DIM,
        shared_head=head.last_layer2 is head.last_layer,
    ).double()
    twin.load_state_dict(head.state_dict())
    for mine, other in zip(twin.parameters(), head.parameters(), strict=True):
        mine.requires_grad_(other.requires_grad)
    return twin


def train(student: nn.Module, teacher: nn.Module, loss: nn.Module, step: Step, batches: list[Batch]) -> Record:
    """Steps of momentum SGD, the teacher following; every loss, gradient and centre by step."""
    optimizer = torch.optim.SGD(student.parameters(), lr=0.003, momentum=0.5)
    record: Record = {}
    for i, batch in enumerate(batches):
        optimizer.zero_grad()
        losses = step(student, teacher, batch, i)
        losses["loss"].backward()
        measured = {name: value.detach() for name, value in losses.items()}
        measured |= {"crops": batch.crops.grad} if batch.crops.grad is not None else {}
        measured |= {"local": batch.local.grad} if batch.local is not None and batch.local.grad is not None else {}
        measured |= {name: getattr(loss, name).clone() for name in ("center", "center2") if has(loss, name)}
        measured |= {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
        record |= {f"step {i} {name}": tensor for name, tensor in measured.items()}
        optimizer.step()
        follow_by_name(teacher, student, 0.9)
    return record


def has(loss: nn.Module, name: str) -> bool:
    """Whether the loss keeps this centre."""
    return name in loss.state_dict()


@torch.no_grad()
def follow_by_name(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """The teacher's parameters as running means of the student's of the same name, as published."""
    of_student = dict(student.named_parameters())
    for name, slow in teacher.named_parameters():
        if name in of_student:
            slow.mul_(momentum).add_(of_student[name].detach(), alpha=1 - momentum)


def our_step(loss: Any, output: str = "unstored") -> Step:
    """Ours, on logits that are not stored or on stored ones, called as the published trainer calls its own."""

    def stored(logits: Any) -> Any:
        if isinstance(logits, tuple):
            return tuple(stored(part) for part in logits)
        return logits.materialize()

    def step(student: Any, teacher: Any, batch: Batch, epoch: int) -> dict[str, Tensor]:
        given = stored if output == "stored" else lambda logits: logits
        local = None if batch.local is None else given(student(batch.local)[0])
        return loss(given(student(batch.crops)), given(teacher(batch.views)), local, batch.masks, epoch)  # type: ignore[no-any-return]

    return step


def published_step(loss: Any) -> Step:
    """The published one, with the norms for the vMF loss."""

    def step(student: Any, teacher: Any, batch: Batch, epoch: int) -> dict[str, Tensor]:
        if isinstance(loss, PublishedIBOTvMFLoss):
            norms = [
                tuple(layer.weight_g[:, 0].abs() for layer in (head.last_layer, head.last_layer2))
                for head in (student, teacher)
            ]
            loss.set_norms(norms[0], norms[1], DIM)
        local = None if batch.local is None else student(batch.local)[0]
        return loss(student(batch.crops), teacher(batch.views), local, batch.masks, epoch)  # type: ignore[no-any-return]

    return step


def error_over_steps(
    ours: Any,
    published: Any,
    output: str = "unstored",
    dtype: torch.dtype = torch.float64,
    local: int = LOCAL,
    **head_options: Any,
) -> tuple[float, str]:
    """The worst relative error of any tensor in five steps; the published side runs in fp64 on the same numbers."""
    student, teacher = heads(dtype, **head_options)
    twins = twin_of(student), twin_of(teacher).requires_grad_(False)
    expected = train(*twins, published.double(), published_step(published), batches(torch.float64, local, dtype))
    got = train(student, teacher, ours.to(dtype), our_step(ours, output), batches(dtype, local, dtype))
    return worst_error(got, expected)


def batches(dtype: torch.dtype, local: int = LOCAL, rounded_to: torch.dtype = torch.float64) -> list[Batch]:
    """One for each step, of numbers that ``rounded_to`` can hold."""
    made = [make_batch(step, rounded_to, local) for step in range(STEPS)]

    def cast(x: Tensor) -> Tensor:
        return x.detach().to(dtype).requires_grad_(x.requires_grad)

    return [Batch(cast(b.crops), None if b.local is None else cast(b.local), cast(b.views), b.masks) for b in made]
