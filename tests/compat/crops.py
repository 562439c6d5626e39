"""Batches, networks and the training loop of the tests of ``compat.dinov2`` and ``compat.dinov3``.

Legend: B images, L local crops, N patches, M masked patches, K prototypes, D bottleneck dim.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tests.fuzz.statements.dino import follow
from tests.measure import worst_error

IMAGES, LOCAL_CROPS, PATCHES = 3, 2, 5
IN_DIM, DIM, PROTOTYPES = 12, 24, 301
STEPS = 4
TEMPERATURES = (0.04, 0.05, 0.06, 0.07)
SIZES: dict[str, Any] = {"nlayers": 2, "hidden_dim": 16, "bottleneck_dim": DIM}
CENTERINGS = ["centering", "sinkhorn_knopp"]
OUTPUTS = ["unstored", "stored"]

Record = dict[str, Tensor]
Step = Callable[[nn.ModuleDict, nn.ModuleDict, nn.ModuleDict, "Batch", float], Record]


class Batch(NamedTuple):
    """What backbones give the heads, and the masks, in the shapes of the published data loader."""

    student_cls: Tensor  # [2B, in]
    student_local: Tensor  # [L B, in]
    student_patches: Tensor  # [2B, N, in]
    teacher_cls: Tensor  # [2B, in]
    teacher_patches: Tensor  # [2B, N, in]
    masks: Tensor  # [2B, N] bool
    mask_indices_list: Tensor  # [M]
    masks_weight: Tensor  # [M]
    n_masked_patches: Tensor  # [1]
    upperbound: int  # of M


def make_batch(seed: int, dtype: torch.dtype, masked: int | None = None) -> Batch:
    """One batch; the last crop has no masked patch. ``masked`` is how many of each other crop's are, random if None."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)  # fp32: the same numbers in every dtype

    masks = torch.rand(2 * IMAGES, PATCHES, generator=generator) < 0.5
    if masked is not None:
        masks = torch.arange(PATCHES).expand(2 * IMAGES, -1) < masked
    masks[-1] = False
    inputs = (randn(2 * IMAGES, IN_DIM), randn(LOCAL_CROPS * IMAGES, IN_DIM), randn(2 * IMAGES, PATCHES, IN_DIM))
    teacher_inputs = inputs[0] + 0.1, inputs[2] + 0.1
    weight = (1 / masks.sum(-1).double().clamp(min=1.0)).unsqueeze(-1).expand_as(masks)[masks]
    return Batch(
        inputs[0].to(dtype).requires_grad_(),
        inputs[1].to(dtype).requires_grad_(),
        inputs[2].to(dtype).requires_grad_(),
        teacher_inputs[0].to(dtype),
        teacher_inputs[1].to(dtype),
        masks,
        masks.flatten().nonzero().flatten(),
        weight.to(dtype),
        masks.sum().reshape(1),
        2 * IMAGES * PATCHES,
    )


def make_heads(
    head: Callable[..., nn.Module], names: list[str], dtype: torch.dtype
) -> tuple[nn.ModuleDict, nn.ModuleDict]:
    """A student and a teacher near it, prototypes of free norms; the same numbers in every dtype and kind of head."""
    torch.manual_seed(3)
    student = nn.ModuleDict({name: head(IN_DIM, PROTOTYPES, **SIZES) for name in names}).double()
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            spread = {"weight_g": 0.3, "bias": 0.1}.get(name.rsplit(".", maxsplit=1)[-1], 0.5)
            start = 1.0 if name.endswith("weight_g") else 0.0
            parameter.copy_(start + spread * torch.randn_like(parameter))
            if name.endswith("last_layer.weight"):
                parameter.mul_(0.4)
    teacher = copy.deepcopy(student).requires_grad_(False)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
    return student.to(dtype), teacher.to(dtype)


def train(
    networks: tuple[nn.ModuleDict, nn.ModuleDict], losses: nn.ModuleDict, step: Step, dtype: torch.dtype
) -> Record:
    """A few steps of momentum SGD, the teacher following; every loss, gradient and centre by step."""
    student, teacher = networks
    optimizer = torch.optim.SGD(student.parameters(), lr=0.02, momentum=0.5)
    record: Record = {}
    for i, temperature in enumerate(TEMPERATURES):
        batch = make_batch(i, dtype)
        optimizer.zero_grad()
        terms = step(student, teacher, losses, batch, temperature)
        terms["total"].backward()
        measured: dict[str, Any] = {name: value.detach() for name, value in terms.items()}
        measured |= {f"{name}.grad": parameter.grad for name, parameter in student.named_parameters()}
        measured |= {f"{name}.grad": getattr(batch, name).grad for name in Batch._fields if name.startswith("student")}
        measured |= {name: buffer.clone() for name, buffer in losses.named_buffers()}
        record |= {f"step {i} {name}": tensor for name, tensor in measured.items()}
        optimizer.step()
        follow(teacher, student, 0.9)
    return record


class Parts(NamedTuple):
    """A head and the losses of one side of a comparison."""

    head: Callable[..., nn.Module]
    losses: dict[str, Callable[..., nn.Module]]  # by their attribute in the published meta-architecture

    def make_losses(self, dtype: torch.dtype) -> nn.ModuleDict:
        counted = dict.fromkeys(("dino_loss", "ibot_patch_loss"), PROTOTYPES)
        losses = nn.ModuleDict({n: make(counted[n]) if n in counted else make() for n, make in self.losses.items()})
        for loss in losses.values():
            if hasattr(loss, "init_weights"):
                loss.init_weights()  # type: ignore[operator]
        return losses.to(dtype)


def error_over_steps(
    ours: Parts, published: Parts, step: Step, names: list[str], dtype: torch.dtype
) -> tuple[float, str]:
    """The worst relative error of any tensor in all steps; the published side runs in fp64 on the same numbers."""
    networks = make_heads(ours.head, names, dtype)
    twins = make_heads(published.head, names, torch.float64)
    for network, twin in zip(networks, twins, strict=True):
        twin.load_state_dict(network.state_dict())
    expected = train(twins, published.make_losses(torch.float64), step, torch.float64)
    got = train(networks, ours.make_losses(dtype), step, dtype)
    return worst_error(got, expected)
