"""Cases of the drop-ins' losses: steps with the centre moving, as their own training loops call them.

Legend: B images, C masked images, N patches of an image, M masked patches, K prototypes, D embedding dim.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from bench.bits import losses
from bench.bits.inputs import Networks, draw, draw_rows, gradients
from bench.bits.losses import DIM, FORMS, GLOBAL, IMAGES, LOCAL, RULES, SCHEDULE, STARTS, UPDATES, draw_masks
from bench.bits.operators import DTYPES
from bench.bits.record import Case
from vmf_kernels.compat import dino, dinov2, dinov3, ibot, lightly, solo

COUNT = 257
TEMPERATURES = (0.04, 0.05, 0.06, 0.07)  # of the steps
PUBLISHED: dict[str, tuple[ModuleType, str]] = {
    "dino.DINOLoss": (dino, "DINOLoss"),
    "dino.DINOvMFLoss": (dino, "DINOvMFLoss"),
    "ibot.iBOTLoss": (ibot, "iBOTLoss"),
    "ibot.IBOTvMFLoss": (ibot, "IBOTvMFLoss"),
}  # the library's own classes under published names
Step = Callable[[Any, Networks, str, int, str], tuple[Tensor, dict[str, Tensor], Any]]


def cases() -> Iterator[Case]:
    """All of this file."""
    for name, (module, attribute) in PUBLISHED.items():
        yield Case(f"{name}/unstored", (name,), partial(losses.train, getattr(module, attribute), {}, "unstored"))
    for module, rule, form, dtype in itertools.product((dinov2, dinov3), STEPS, FORMS, DTYPES):
        name = module.__name__.rpartition(".")[2]
        for loss, step in STEPS[rule].items():
            run = partial(_train, partial(_made, module, loss), step, form, rule, DTYPES[dtype])
            yield Case(f"{name}.{loss}/{rule}/{form}/{dtype}", (f"{name}.{loss}", "TeacherTargets"), run)
    for rule, form in itertools.product(("centred", "sinkhorn_knopp"), FORMS):
        run = partial(_train, partial(dinov2.iBOTPatchLoss, COUNT), _all_patches, form, rule, torch.float32)
        yield Case(f"dinov2.iBOTPatchLoss/all patches/{rule}/{form}", ("dinov2.iBOTPatchLoss",), run)
    yield Case("dinov3.DINOLoss/without the diagonal", ("dinov3.DINOLoss",), _without_diagonal)
    yield Case("dinov3.SinkhornKnoppTeacher", ("dinov3.SinkhornKnoppTeacher",), _sinkhorn_teacher)
    for rule, start, update, form in itertools.product(RULES, STARTS, UPDATES, FORMS):
        options = {**RULES[rule], "center_start": start, "center_update": update}
        for name, (make, step) in STREAMS.items():
            run = partial(_train, partial(make, **options), step, form, update, torch.float32)
            yield Case(f"{name}/{rule}/{start}/{update}/{form}", (name,), run)
    for form, dtype in itertools.product(FORMS, DTYPES):
        run = partial(_center, form, DTYPES[dtype])
        yield Case(f"lightly.RankMeanCenter/{form}/{dtype}", ("lightly.RankMeanCenter",), run)
    for (name, make), dtype in itertools.product(SPREADS.items(), DTYPES):
        covers = (".".join(name.split("/")[0].split(".")[:2]),)
        yield Case(f"{name}/{dtype}", covers, partial(_spread, make, DTYPES[dtype]))


def _made(module: ModuleType, loss: str) -> Any:
    """A loss of this drop-in, with its centre at 0."""
    made = getattr(module, loss)(COUNT, center_momentum=0.8)
    if module is dinov3:
        made.init_weights()
    return made


def _train(make: Callable[[], Any], step: Step, form: str, rule: str, dtype: torch.dtype) -> dict[str, Any]:
    """Every step's loss, gradients, statistics and state; the networks learn between steps."""
    networks, loss, found = Networks("weight_norm", COUNT, DIM, dtype), make(), {}
    for epoch in range(len(IMAGES)):
        value, leaves, more = step(loss, networks, form, epoch, rule)
        records = {"loss": value, **gradients(value, {**leaves, **networks.leaves()}), "more": more}
        networks.learn(records)
        if rule == "manual" and epoch % 2:
            loss.update_center()
        # a state dict applies the update that waits, which at other times the next targets have to do
        state = dict(loss.state_dict()) if epoch % 2 else None
        found[f"step {epoch}"] = {**records, "statistics": getattr(loss, "statistics", None), "state": state}
    return found


def _draw(networks: Networks, form: str, *shape: int) -> tuple[dict[str, Tensor], Any, Any]:
    """(leaves, student's logits, teacher's logits) of rows [..., D]."""
    student = draw_rows(*shape, DIM, dtype=networks.dtype)
    outputs = networks.outputs(form, student, draw_rows(*shape, DIM, dtype=networks.dtype))
    return {"features": student}, *outputs


def _stored(targets: Any) -> Tensor:
    return targets if isinstance(targets, Tensor) else targets.materialize()


def _class_tokens(loss: Any, networks: Networks, form: str, epoch: int, rule: str) -> Any:
    """DINOv2 and DINOv3: targets of the teacher's global crops for all crops."""
    images, tau = IMAGES[epoch], TEMPERATURES[epoch]
    leaves, student, teacher = _draw(networks, form, GLOBAL + LOCAL, images)
    teacher = teacher[:GLOBAL].flatten(0, 1)
    if rule == "sinkhorn_knopp":
        targets = loss.sinkhorn_knopp_teacher(teacher, tau)
    else:
        targets = loss.softmax_center_teacher(teacher, tau)
        loss.update_center(teacher)
    views = targets.unflatten(0, (GLOBAL, images))
    outputs = (list(student), list(views)) if isinstance(loss, dinov2.DINOLoss) else (student, views)
    value = loss(*outputs)
    return value, leaves, {"targets": _stored(targets), "waiting": loss.async_batch_center}


def _masked(loss: Any, networks: Networks, form: str, epoch: int, rule: str) -> Any:
    """DINOv2 and DINOv3: masked patches alone; none in the last step."""
    masks = draw_masks(GLOBAL * IMAGES[epoch]) & (epoch < len(IMAGES) - 1)
    count, tau = int(masks.sum()), torch.tensor(TEMPERATURES[epoch])
    leaves, student, teacher = _draw(networks, form, count)
    if rule == "sinkhorn_knopp":
        targets = loss.sinkhorn_knopp_teacher(teacher, tau, n_masked_patches_tensor=torch.tensor([count]))
    else:
        targets = loss.softmax_center_teacher(teacher.unsqueeze(0), tau).squeeze(0)
        loss.update_center(teacher.unsqueeze(0))
    value = loss.forward_masked(student, targets, masks, count)
    return value, leaves, {"targets": _stored(targets)}


def _all_patches(loss: Any, networks: Networks, form: str, epoch: int, rule: str) -> Any:
    masks = draw_masks(GLOBAL * IMAGES[epoch])
    leaves, student, teacher = _draw(networks, form, *masks.shape)
    if rule == "sinkhorn_knopp":
        targets = loss.sinkhorn_knopp_teacher(teacher, 0.05, n_masked_patches_tensor=masks.sum())
    else:
        targets = loss.softmax_center_teacher(teacher, 0.05)
        loss.update_center(teacher)
    return loss(student, targets, masks), leaves, {"targets": _stored(targets)}


STEPS: dict[str, dict[str, Step]] = {
    rule: {"DINOLoss": _class_tokens, "iBOTPatchLoss": _masked} for rule in ("centred", "sinkhorn_knopp")
}


def _without_diagonal() -> dict[str, Any]:
    loss, networks = _made(dinov3, "DINOLoss"), Networks("linear", COUNT, DIM)
    leaves, student, teacher = _draw(networks, "unstored", GLOBAL, 7)
    targets = loss.softmax_center_teacher(teacher, 0.05, update_centers=False)
    value = loss(student, targets, ignore_diagonal=True)
    return {"loss": value, **gradients(value, {**leaves, **networks.leaves()}), "statistics": loss.statistics}


def _sinkhorn_teacher() -> dict[str, Any]:
    found, networks = {}, Networks("linear", COUNT, DIM)
    for form, rounds in itertools.product(FORMS, (1, 3)):
        _, _, teacher = _draw(networks, form, 23)
        targets = dinov3.SinkhornKnoppTeacher()(teacher, 0.06, torch.tensor([23]), n_iterations=rounds)
        found[f"{form} {rounds}"] = _stored(targets)
    return found


def _lightly_views(loss: Any, networks: Networks, form: str, epoch: int, rule: str) -> Any:
    leaves, student, teacher = _draw(networks, form, GLOBAL + LOCAL, IMAGES[epoch])
    value = loss(list(teacher[:GLOBAL]), list(student), epoch=epoch)
    return value, leaves, loss.teacher_temp_schedule


def _lightly_patches(loss: Any, networks: Networks, form: str, epoch: int, rule: str) -> Any:
    masks = draw_masks(GLOBAL * IMAGES[epoch])
    masks[-1, 0] = True  # a centre that starts with the first batch needs one
    leaves, student, teacher = _draw(networks, form, int(masks.sum()))
    return loss(teacher, student, masks.reshape(-1, 3, 3), TEMPERATURES[epoch]), leaves, None


def _solo_crops(loss: Any, networks: Networks, form: str, epoch: int, rule: str) -> Any:
    leaves, student, teacher = _draw(networks, form, GLOBAL * IMAGES[epoch])
    loss.epoch = epoch
    return loss(student, teacher), leaves, loss.teacher_temp_schedule


STREAMS: dict[str, tuple[Callable[..., Any], Step]] = {
    "lightly.DINOLoss": (
        partial(lightly.DINOLoss, COUNT, teacher_temp=0.07, warmup_teacher_temp_epochs=3),
        _lightly_views,
    ),
    "lightly.IBOTPatchLoss": (partial(lightly.IBOTPatchLoss, COUNT), _lightly_patches),
    "solo.DINOLoss": (partial(solo.DINOLoss, COUNT, *SCHEDULE), _solo_crops),
}


def _center(form: str, dtype: torch.dtype) -> dict[str, Any]:
    networks, center, found = Networks("weight_norm", COUNT, DIM, dtype), lightly.RankMeanCenter(COUNT, 0.8), {}
    for step, images in enumerate(IMAGES):
        center.update(_draw(networks, form, images)[2])
        found[f"step {step}"] = {"value": center.value, "bias": center.bias(0.05)}
    return found


SPREADS: dict[str, Callable[[], Any]] = {
    "dinov2.KoLeoLoss": dinov2.KoLeoLoss,
    "dinov3.KoLeoLoss": dinov3.KoLeoLoss,
    "dinov3.KoLeoLossDistributed": dinov3.KoLeoLossDistributed,
    "dinov3.KoLeoLossDistributed/topk": partial(dinov3.KoLeoLossDistributed, topk=3),
    "dinov3.KoLeoLossDistributed/groups": partial(dinov3.KoLeoLossDistributed, loss_group_size=23),
    "lightly.KoLeoLoss": lightly.KoLeoLoss,
    "lightly.KoLeoLoss/p 1": partial(lightly.KoLeoLoss, p=1),
}


def _spread(make: Callable[[], Any], dtype: torch.dtype) -> dict[str, Any]:
    features = draw(23, DIM, dtype=dtype).requires_grad_()
    loss = make()(features)
    return {"loss": loss, **gradients(loss, {"features": features})}
