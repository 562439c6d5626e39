"""Cases of the library's loss modules: steps of two networks that learn, with the centre moving.

Legend: G / L global / local crops, B images, N patches of an image, K prototypes, D embedding dim.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bench.bits.inputs import Networks, draw_rows, gradients
from bench.bits.operators import BACKENDS, DTYPES
from bench.bits.record import Case
from vmf_kernels import (
    DINOLoss,
    DINOvMFLoss,
    IBOTLoss,
    IBOTPatchLoss,
    IBOTvMFLoss,
    IBOTvMFPatchLoss,
)

RULES: dict[str, dict[str, Any]] = {
    "logit": {"centering": "logit"},
    "log_probability": {"centering": "probability", "center_average": "log_probability"},
    "probability": {"centering": "probability", "center_average": "probability"},
    "sinkhorn_knopp": {"centering": "sinkhorn_knopp"},
}
STARTS, UPDATES, FORMS = ("zero", "first_batch"), ("forward", "manual"), ("unstored", "stored")
IMAGES = (5, 3, 7, 1)  # of the steps
GLOBAL, LOCAL, PATCHES = 2, 3, 9
COUNT, PATCH_COUNT, DIM = 257, 131, 24
SCHEDULE = (0.04, 0.07, 2, 6)  # warm-up temperature, temperature, epochs of warm-up, epochs
PLAIN_LOSSES: tuple[type[nn.Module], ...] = (DINOLoss, IBOTLoss, IBOTPatchLoss)
VMF_LOSSES: tuple[type[nn.Module], ...] = (DINOvMFLoss, IBOTvMFLoss, IBOTvMFPatchLoss)
Step = Callable[[nn.Module, int], tuple[Tensor, dict[str, Tensor], Any]]  # (loss, leaves, more results) of an epoch


def cases() -> Iterator[Case]:
    """All of this file."""
    for loss, rule, start, update in itertools.product((*PLAIN_LOSSES, *VMF_LOSSES), RULES, STARTS, UPDATES):
        if rule == "sinkhorn_knopp" and (start, update) != (STARTS[0], UPDATES[0]):
            continue  # it keeps no centre
        options = {**RULES[rule], "center_start": start, "center_update": update}
        for form in FORMS:
            if takes(loss, form):
                run = partial(train, loss, options, form)
                yield Case(f"{loss.__name__}/{rule}/{start}/{update}/{form}", _covers(loss), run)
    for loss, backend, name in itertools.product((*PLAIN_LOSSES, *VMF_LOSSES), BACKENDS, DTYPES):
        if (backend, name) != ("native", "fp64"):
            run = partial(train, loss, {"backend": backend}, "unstored", dtype=DTYPES[name])
            yield Case(f"{loss.__name__}/{backend}/{name}", _covers(loss), run)
    for loss, name in itertools.product((*PLAIN_LOSSES, DINOvMFLoss), ("fp64", "bf16")):
        yield Case(
            f"{loss.__name__}/stored/{name}", _covers(loss), partial(train, loss, {}, "stored", dtype=DTYPES[name])
        )
    for loss, kind in itertools.product((*PLAIN_LOSSES, *VMF_LOSSES), ("linear", "normalized", "weight_norm")):
        if (loss in PLAIN_LOSSES) or kind != "normalized":  # which has no precision
            run = partial(train, loss, {}, "unstored", kind=kind)
            yield Case(f"{loss.__name__}/prototypes/{kind}", _covers(loss), run)
    for loss in (IBOTLoss, IBOTPatchLoss, IBOTvMFLoss, IBOTvMFPatchLoss):
        run = partial(train, loss, {"center_tokens": "masked", "center_start": "first_batch"}, "unstored")
        yield Case(f"{loss.__name__}/centre of masked patches", _covers(loss), run)
    for loss in (DINOLoss, DINOvMFLoss):
        run = partial(train, loss, {"backend": "triton"}, "unstored", count=19, steps=3)
        yield Case(f"{loss.__name__}/triton", _covers(loss), run)


def takes(loss: type[nn.Module], form: str) -> bool:
    """Whether a loss accepts stored logits; of the vMF losses, only the one of class tokens does."""
    return form == "unstored" or loss not in (IBOTvMFLoss, IBOTvMFPatchLoss)


def train(
    kind_of_loss: type[nn.Module],
    options: dict[str, Any],
    form: str,
    *,
    kind: str = "weight_norm",
    dtype: torch.dtype = torch.float32,
    count: int = COUNT,
    steps: int = len(IMAGES),
) -> dict[str, Any]:
    """Every step's loss, gradients, statistics and state; the networks learn between steps."""
    networks = {"cls": Networks(kind, count, DIM, dtype), "patch": Networks(kind, PATCH_COUNT, DIM, dtype)}
    loss, step = LOSSES[kind_of_loss](options, networks, form)
    found: dict[str, Any] = {}
    for epoch in range(steps):
        value, leaves, more = step(loss, epoch)
        records = {"loss": value, **gradients(value, leaves), "more": more, "statistics": loss.statistics}
        for name, network in networks.items():
            network.learn({key.removeprefix(f"{name}_"): part for key, part in records.items() if name in key})
        if options.get("center_update") == "manual" and epoch % 2:
            loss.update_center()  # type: ignore[operator]
        found[f"step {epoch}"] = {**records, "state": dict(loss.state_dict())}
    return found


def draw_masks(images: int, patches: int = PATCHES) -> Tensor:
    """[C, N] bool, uneven; of the first image nothing is masked."""
    masks = torch.rand(images, patches) < torch.linspace(0.1, 0.9, images)[:, None]
    masks[0] = False
    return masks


def prefixed(name: str, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Leaves of one of several networks."""
    return {f"{name}_{key}": leaf for key, leaf in leaves.items()}


def _covers(loss: type[nn.Module]) -> tuple[str, ...]:
    return (loss.__name__, "AssignmentStatistics", "PrototypeLogits")


def _class_tokens(
    make: type[nn.Module], options: dict[str, Any], networks: dict[str, Networks], form: str
) -> tuple[nn.Module, Step]:
    network = networks["cls"]
    loss = make(network.student.count, GLOBAL + LOCAL, *SCHEDULE, center_momentum=0.8, **options)

    def step(loss: nn.Module, epoch: int) -> tuple[Tensor, dict[str, Tensor], Any]:
        images = IMAGES[epoch]
        student = draw_rows((GLOBAL + LOCAL) * images, DIM, dtype=network.dtype)
        outputs = network.outputs(form, student, draw_rows(GLOBAL * images, DIM, dtype=network.dtype))
        given = {}
        if make is DINOvMFLoss and form == "stored":
            given = {"student_prototypes": network.student, "teacher_prototypes": network.teacher}
        value = loss(*outputs, epoch, **given)
        return value, prefixed("cls", {"features": student, **network.leaves()}), None

    return loss, step


def _patches(
    make: type[nn.Module], options: dict[str, Any], networks: dict[str, Networks], form: str
) -> tuple[nn.Module, Step]:
    network = networks["patch"]
    loss = make(network.student.count, center_momentum=0.8, **options)

    def step(loss: nn.Module, epoch: int) -> tuple[Tensor, dict[str, Tensor], Any]:
        crops = GLOBAL * IMAGES[epoch]
        student = draw_rows(crops, PATCHES, DIM, dtype=network.dtype)
        outputs = network.outputs(form, student, draw_rows(crops, PATCHES, DIM, dtype=network.dtype))
        value = loss(*outputs, draw_masks(crops), 0.04 + 0.01 * epoch)
        return value, prefixed("patch", {"features": student, **network.leaves()}), None

    return loss, step


def _both(
    make: type[nn.Module], options: dict[str, Any], networks: dict[str, Networks], form: str
) -> tuple[nn.Module, Step]:
    counts = (networks["cls"].student.count, networks["patch"].student.count)
    warm_up, temperature, *epochs = SCHEDULE
    temperatures = (warm_up, temperature, 0.05, 0.06)
    loss = make(*counts, GLOBAL, LOCAL, *temperatures, *epochs, lambda2=0.7, mim_start_epoch=1, **options)

    def step(loss: nn.Module, epoch: int) -> tuple[Tensor, dict[str, Tensor], Any]:
        images, dtype = IMAGES[epoch], networks["cls"].dtype
        rows = {
            "cls": draw_rows(GLOBAL * images, DIM, dtype=dtype),
            "local": draw_rows(LOCAL * images, DIM, dtype=dtype),
            "patch": draw_rows(GLOBAL * images, PATCHES, DIM, dtype=dtype),
        }
        teachers = {name: draw_rows(*rows[name].shape, dtype=dtype) for name in networks}
        cls, patch = (networks[name].outputs(form, rows[name], teachers[name]) for name in networks)
        local, _ = networks["cls"].outputs(form, rows["local"], teachers["cls"])
        masks = draw_masks(GLOBAL * images).chunk(GLOBAL)
        values = loss((cls[0], patch[0]), (cls[1], patch[1]), local, masks, epoch)
        leaves = {f"{name}_features": leaf for name, leaf in rows.items()}
        for name, network in networks.items():
            leaves |= prefixed(name, network.leaves())
        return values["loss"], leaves, {**values, "statistics of patches": loss.patch_statistics}

    return loss, step


LOSSES: dict[type[nn.Module], Callable[..., tuple[nn.Module, Step]]] = {
    DINOLoss: partial(_class_tokens, DINOLoss),
    DINOvMFLoss: partial(_class_tokens, DINOvMFLoss),
    IBOTPatchLoss: partial(_patches, IBOTPatchLoss),
    IBOTvMFPatchLoss: partial(_patches, IBOTvMFPatchLoss),
    IBOTLoss: partial(_both, IBOTLoss),
    IBOTvMFLoss: partial(_both, IBOTvMFLoss),
}
