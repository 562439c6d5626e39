"""Losses with a state, the library's and the drop-ins', over a few steps against the published formulas on stored logits.

Legend: B images, V student crops, G = 2 of them global, N patches, K prototypes, D bottleneck dim.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.fuzz.cases import Case
from tests.fuzz.inputs import DTYPES, Source
from tests.fuzz.statements import prototypes as statement_of
from tests.fuzz.statements.dino import PublishedDINOLoss, PublishedDINOvMFLoss
from tests.fuzz.statements.dinov2 import PublishedPatchLoss, PublishedV2Loss, PublishedV3Loss
from tests.fuzz.statements.ibot import PublishedIBOTLoss, PublishedIBOTvMFLoss
from tests.fuzz.statements.lightly import PublishedLightlyLoss, PublishedLightlyPatchLoss
from tests.fuzz.statements.solo import PublishedSoloLoss
from tests.fuzz.subjects.subject import Subject, choices_of
from vmf_kernels import (
    DINOLoss,
    DINOvMFLoss,
    IBOTLoss,
    IBOTPatchLoss,
    IBOTvMFLoss,
    IBOTvMFPatchLoss,
    PrototypeLogits,
    Prototypes,
)
from vmf_kernels.compat import dinov2, dinov3, lightly, solo

GLOBAL, PATCHES = 2, 4
EPOCHS, WARM_UP = 3, 2
STUDENT_TAU = 0.1
ROUNDINGS = 64.0  # of the largest logit, for the norm of a whole tensor
Values = dict[str, Tensor]


class Batch(NamedTuple):
    """Features of one step."""

    crops: Tensor  # [V * B, D] of the student, view-major
    views: Tensor  # [G * B, D] of the teacher
    patches: Tensor  # [G * B, N, D] of the student
    targets: Tensor  # [G * B, N, D] of the teacher
    masks: Tensor  # [G * B, N]


class Heads(NamedTuple):
    """Both networks' prototypes."""

    student: Prototypes
    teacher: Prototypes


class Side(NamedTuple):
    """How one of the two sides makes its loss, its logits and its calls."""

    make: Callable[[Case], Any]
    call: Callable[[Any, Callable[[Tensor], Any], Callable[[Tensor], Any], Batch, int, Heads], Tensor]


@dataclass(frozen=True)
class Pair:
    """A loss of the library and the published one."""

    ours: Side
    theirs: Side
    centers: tuple[str, ...] = ("center",)
    kinds: tuple[str, ...] = ("weight_norm", "linear", "normalized")
    stored: tuple[str, ...] = ("unstored", "stored")


def temperatures(case: Case) -> tuple[float, float, int, int]:
    """Teacher temperatures, of which every step has its own, their epochs, and epochs."""
    return case.teacher_temperature / 2, case.teacher_temperature, WARM_UP, EPOCHS


def dino_call(loss: Any, s: Any, t: Any, batch: Batch, step: int, heads: Heads) -> Tensor:
    return loss(s(batch.crops), t(batch.views), step)  # type: ignore[no-any-return]


def norms_of(stored: Prototypes) -> Tensor:
    return statement_of.effective(stored.weight, stored.magnitude, stored.kind)[1]


def vmf_call(loss: Any, s: Any, t: Any, batch: Batch, step: int, heads: Heads) -> Tensor:
    student, teacher = s(batch.crops), t(batch.views)
    if isinstance(loss, PublishedDINOvMFLoss):
        return loss(student, teacher, step, norms_of(heads.student), norms_of(heads.teacher))  # type: ignore[no-any-return]
    named = (
        {}
        if isinstance(student, PrototypeLogits)
        else dict(zip(("student_prototypes", "teacher_prototypes"), heads, strict=True))
    )
    return loss(student, teacher, step, **named)  # type: ignore[no-any-return]


def solo_call(loss: Any, s: Any, t: Any, batch: Batch, step: int, heads: Heads) -> Tensor:
    loss.epoch = step
    two = batch.crops[: len(batch.views)]
    return loss(s(two), t(batch.views))  # type: ignore[no-any-return]


def ibot_call(loss: Any, s: Any, t: Any, batch: Batch, step: int, heads: Heads) -> Tensor:
    if isinstance(loss, PublishedIBOTvMFLoss):
        student, teacher = norms_of(heads.student), norms_of(heads.teacher)
        loss.set_norms((student, student), (teacher, teacher), heads.student.dim)
    crops, local = batch.crops[: len(batch.views)], batch.crops[len(batch.views) :]
    masks = [mask.unflatten(1, (2, -1)) for mask in batch.masks.chunk(GLOBAL)]
    outputs = (s(crops), s(batch.patches)), (t(batch.views), t(batch.targets))
    return loss(*outputs, s(local) if len(local) else None, masks, step)["loss"]  # type: ignore[no-any-return]


def patch_call(loss: Any, s: Any, t: Any, batch: Batch, step: int, heads: Heads) -> Tensor:
    if not isinstance(loss, PublishedIBOTLoss):
        return loss(s(batch.patches), t(batch.targets), batch.masks, loss.temperature[step])  # type: ignore[no-any-return]
    if isinstance(loss, PublishedIBOTvMFLoss):
        student, teacher = norms_of(heads.student), norms_of(heads.teacher)
        loss.set_norms((student, student), (teacher, teacher), heads.student.dim)
    masks = [mask.unflatten(1, (2, -1)) for mask in batch.masks.chunk(GLOBAL)]
    outputs = (s(batch.crops[: len(batch.views)]), s(batch.patches)), (t(batch.views), t(batch.targets))
    loss.center.zero_()  # of class tokens, which this loss does not have
    return loss(*outputs, None, masks, step)["patch"]  # type: ignore[no-any-return]


def with_temperatures(loss: Any, case: Case) -> Any:
    """The loss with a temperature for each step, which its caller passes."""
    first, last, warm_up, epochs = temperatures(case)
    loss.temperature = [first] + [last] * (epochs - 1)
    assert warm_up == WARM_UP == 2
    return loss


def v2_call(loss: Any, s: Any, t: Any, batch: Batch, step: int, heads: Heads) -> Tensor:
    views = t(batch.views)
    targets = loss.softmax_center_teacher(views, loss.temperature[step])
    loss.update_center(views)
    crops = len(batch.crops) // (len(batch.views) // GLOBAL)
    return loss(list(s(batch.crops).chunk(crops)), targets.view(GLOBAL, -1, views.shape[-1]))  # type: ignore[no-any-return]


def v2_sinkhorn_call(loss: Any, s: Any, t: Any, batch: Batch, step: int, heads: Heads) -> Tensor:
    targets = loss.sinkhorn_knopp_teacher(t(batch.views), loss.temperature[step])
    return loss([s(batch.crops[: len(batch.views)])], [targets])  # type: ignore[no-any-return]


def v3_call(loss: Any, s: Any, t: Any, batch: Batch, step: int, heads: Heads) -> Tensor:
    views = t(batch.views)
    targets = loss.softmax_center_teacher(views, loss.temperature[step])
    loss.update_center(views)
    images = len(batch.views) // GLOBAL
    student = s(batch.crops).unflatten(0, (-1, images))
    return loss(student, targets.unflatten(0, (GLOBAL, images)), ignore_diagonal=True)  # type: ignore[no-any-return]


def v2_patch_call(loss: Any, s: Any, t: Any, batch: Batch, step: int, heads: Heads) -> Tensor:
    teacher = t(batch.targets[batch.masks]).unsqueeze(0)
    targets = loss.softmax_center_teacher(teacher, loss.temperature[step])
    loss.update_center(teacher)
    return loss.forward_masked(s(batch.patches[batch.masks]), targets.squeeze(0), batch.masks)  # type: ignore[no-any-return]


def lightly_call(loss: Any, s: Any, t: Any, batch: Batch, step: int, heads: Heads) -> Tensor:
    crops = len(batch.crops) // (len(batch.views) // GLOBAL)
    views = list(t(batch.views).chunk(GLOBAL)), list(s(batch.crops).chunk(crops))
    return loss(*views, epoch=step)  # type: ignore[no-any-return]


def lightly_patch_call(loss: Any, s: Any, t: Any, batch: Batch, step: int, heads: Heads) -> Tensor:
    outputs = t(batch.targets[batch.masks]), s(batch.patches[batch.masks])
    return loss(*outputs, batch.masks.unflatten(1, (2, -1)), loss.temperature[step])  # type: ignore[no-any-return]


def _started(loss: Any, case: Case) -> Any:
    loss.init_weights()  # its centre is NaN before
    return with_temperatures(loss, case)


def _vmf_options(case: Case) -> dict[str, str]:
    return (
        {"centering": "logit"}
        if case.bias == "one"
        else {"center_average": "probability" if case.bias == "huge" else "log_probability"}
    )


def _dino(case: Case) -> tuple[int, int, float, float, int, int]:
    return case.prototypes, GLOBAL + case.topk - 1, *temperatures(case)


PAIRS = {
    "DINOLoss": Pair(
        Side(lambda c: DINOLoss(*_dino(c)), dino_call),
        Side(lambda c: PublishedDINOLoss(*_dino(c)), dino_call),
    ),
    "DINOvMFLoss": Pair(
        Side(lambda c: DINOvMFLoss(*_dino(c), **_vmf_options(c)), vmf_call),  # type: ignore[arg-type]
        Side(lambda c: PublishedDINOvMFLoss(*_dino(c), dim=c.dim, **_vmf_options(c)), vmf_call),
        kinds=("weight_norm", "linear"),
    ),
    "IBOTLoss": Pair(
        Side(lambda c: IBOTLoss(*_ibot(c)), ibot_call),
        Side(lambda c: PublishedIBOTLoss(*_ibot(c)), ibot_call),
        ("center", "center2"),
    ),
    "IBOTvMFLoss": Pair(
        Side(lambda c: IBOTvMFLoss(*_ibot(c)), ibot_call),
        Side(lambda c: PublishedIBOTvMFLoss(*_ibot(c)), ibot_call),
        ("center", "center2"),
        ("weight_norm", "linear"),
        ("unstored",),
    ),
    "IBOTPatchLoss": Pair(
        Side(lambda c: with_temperatures(IBOTPatchLoss(c.prototypes), c), patch_call),
        Side(lambda c: PublishedIBOTLoss(*_ibot(replace(c, topk=1))), patch_call),
        (),
    ),
    "IBOTvMFPatchLoss": Pair(
        Side(lambda c: with_temperatures(IBOTvMFPatchLoss(c.prototypes), c), patch_call),
        Side(lambda c: PublishedIBOTvMFLoss(*_ibot(replace(c, topk=1))), patch_call),
        (),
        ("weight_norm", "linear"),
        ("unstored",),
    ),
    "compat.solo.DINOLoss": Pair(
        Side(lambda c: solo.DINOLoss(c.prototypes, *temperatures(c)), solo_call),
        Side(lambda c: PublishedSoloLoss(c.prototypes, *temperatures(c)), solo_call),
    ),
    "compat.lightly.DINOLoss": Pair(
        Side(lambda c: lightly.DINOLoss(c.prototypes, *temperatures(c)[:3]), lightly_call),
        Side(lambda c: PublishedLightlyLoss(c.prototypes, *temperatures(c)[:3]), lightly_call),
    ),
    "compat.lightly.IBOTPatchLoss": Pair(
        Side(lambda c: with_temperatures(lightly.IBOTPatchLoss(c.prototypes), c), lightly_patch_call),
        Side(lambda c: with_temperatures(PublishedLightlyPatchLoss(c.prototypes), c), lightly_patch_call),
        (),
    ),
    "compat.dinov2.DINOLoss": Pair(
        Side(lambda c: with_temperatures(dinov2.DINOLoss(c.prototypes), c), v2_call),
        Side(lambda c: with_temperatures(PublishedV2Loss(c.prototypes), c), v2_call),
    ),
    "compat.dinov2.DINOLoss with Sinkhorn": Pair(
        Side(lambda c: with_temperatures(dinov2.DINOLoss(c.prototypes), c), v2_sinkhorn_call),
        Side(lambda c: with_temperatures(PublishedV2Loss(c.prototypes), c), v2_sinkhorn_call),
        (),
    ),
    "compat.dinov2.iBOTPatchLoss": Pair(
        Side(lambda c: with_temperatures(dinov2.iBOTPatchLoss(c.prototypes), c), v2_patch_call),
        Side(lambda c: with_temperatures(PublishedPatchLoss(c.prototypes), c), v2_patch_call),
    ),
    "compat.dinov3.DINOLoss": Pair(
        Side(lambda c: _started(dinov3.DINOLoss(c.prototypes), c), v3_call),
        Side(lambda c: with_temperatures(PublishedV3Loss(c.prototypes), c), v3_call),
    ),
}


def _ibot(case: Case) -> tuple[Any, ...]:
    first, last, warm_up, epochs = temperatures(case)
    return (case.prototypes, case.prototypes, GLOBAL, case.topk - 1, first, last, first, last, warm_up, epochs)


def batches_of(case: Case, source: Source, weight: Tensor) -> list[Batch]:
    """Features near prototypes or not, and masks, of which the first image of a crop has none."""
    batches, crops, dtype = [], GLOBAL + case.topk - 1, DTYPES[case.dtype]
    for _ in range(case.steps):
        rows = [source.rows(n * case.images, weight) for n in (crops, GLOBAL, GLOBAL * PATCHES, GLOBAL * PATCHES)]
        masks = source.uniform(GLOBAL * case.images, PATCHES) < 0.5
        masks[0] = False
        if not masks.any():
            masks[-1, 0] = True
        patches = [r.unflatten(0, (GLOBAL * case.images, PATCHES)) for r in rows[2:]]
        crops_of, views, student, teacher = (t.to(dtype) for t in (*rows[:2], *patches))
        batches.append(Batch(crops_of, views, student, teacher, masks))
    return batches


def record(side: Side, loss: Any, case: Case, dtype: torch.dtype, output: str) -> Values:
    """Loss, gradients and centres of every step; the prototypes stay."""
    source = Source.of(case)
    given = source.prototypes(case.dim), source.prototypes(case.dim)
    batches = batches_of(case, source, given[0].weight)
    values: Values = {}
    for i, batch in enumerate(batches):
        leaves = [t if t.dtype == torch.bool else t.to(dtype).detach().requires_grad_() for t in batch]
        heads = Heads(*(_cast(p, dtype) for p in given))
        own = [t for t in (heads.student.weight, heads.student.magnitude) if t is not None]

        def logits(rows: Tensor, stored: Prototypes) -> Any:
            if output == "unstored":
                return PrototypeLogits(rows, stored)
            flat = statement_of.logits(rows.reshape(-1, case.dim), stored.weight, stored.magnitude, stored.kind, 1.0)
            return flat.unflatten(0, rows.shape[:-1]) if rows.ndim > 2 else flat

        value = side.call(
            loss,
            partial(logits, stored=heads.student),
            partial(logits, stored=heads.teacher),
            Batch(*leaves),
            i,
            heads,
        )
        wanted = [leaves[0], leaves[2], *own]
        gradients = torch.autograd.grad(value, wanted, allow_unused=True)
        names = ("crops", "patches", "weight", "magnitude")
        values |= {
            f"{i} {n}": torch.zeros_like(w) if g is None else g
            for n, w, g in zip(names, wanted, gradients, strict=False)
        }
        values[f"{i} loss"] = value.detach()
    return values


def _cast(stored: Prototypes, dtype: torch.dtype) -> Prototypes:
    magnitude = None if stored.magnitude is None else stored.magnitude.to(dtype).detach().requires_grad_()
    return Prototypes(stored.weight.to(dtype).detach().requires_grad_(), magnitude, stored.kind)


def faults(case: Case) -> list[str]:
    """Errors of whole tensors relative to their norm, against twice those of the published formula in the same dtype."""
    pair, dtype = PAIRS[case.function], DTYPES[case.dtype]
    if case.kind not in pair.kinds or case.option not in pair.stored:
        return []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of frozen norms
        ours, theirs, plain = (side.make(case) for side in (pair.ours, pair.theirs, pair.theirs))
        got = record(pair.ours, ours.to(dtype), case, dtype, case.option)
        truth = record(pair.theirs, theirs.to(torch.float64), case, torch.float64, "stored")
        dense = record(pair.theirs, plain.to(dtype), case, dtype, "stored")
    for name in pair.centers:
        last = [
            side.get_buffer(name) if name in dict(side.named_buffers()) else getattr(side, name)
            for side in (ours, theirs, plain)
        ]
        got[name], truth[name], dense[name] = (t.detach().reshape(-1) for t in last)
    # gradients are of the size of rows and prototypes over the temperature, however they cancel
    source = Source.of(case)
    stored = source.prototypes(case.dim)
    longest = float(
        norms_of(
            Prototypes(
                stored.weight.double(), None if stored.magnitude is None else stored.magnitude.double(), stored.kind
            )
        ).max()
    )
    largest_row = max(
        float(b[i].double().norm(dim=-1).max()) for b in batches_of(case, source, stored.weight) for i in range(4)
    )
    size = 1 + longest * largest_row / min(STUDENT_TAU, case.teacher_temperature / 2)
    found = []
    for name, exact in truth.items():
        if not exact.isfinite().all():  # exp of the published Sinkhorn-Knopp overflows, which ours does not
            continue
        error = float((got[name].double() - exact).norm())
        floor = size * 1e-2 if exact.ndim else 1.0  # a loss near 0 is the difference of a log-sum-exp and a logit
        measure = float((dense[name].double() - exact).norm()) if dense[name].isfinite().all() else 0.0
        eps = 1e-14 if dtype == torch.float64 else torch.finfo(torch.float32).eps
        allowed = 2 * measure + ROUNDINGS * eps * size * (float(exact.norm()) + floor)
        if not error <= allowed:
            found.append(f"{name.lstrip('0123456789 ')}: error {error:.2e}, budget {allowed:.2e} ({name})")
    return found


_FIELDS = choices_of(
    images=(1, 2, 3, 5),
    prototypes=(2, 3, 7, 17, 33, 129, 300),
    dim=(2, 3, 5, 8, 16, 31, 64),
    teacher_temperature=(1.0, 0.1, 0.04, 0.07),
    rows=("unit", "unit", "free", "at_prototypes", "identical", "some_zero"),
    norms=("unit", "unit", "free", "duplicates", "some_zero"),
    layout=("contiguous", "contiguous", "transposed", "sliced"),
    dtype=("fp32", "fp64"),
    topk=(1, 2, 4),
    steps=(1, 2, 3),
)
SUBJECTS = {
    name: Subject(
        faults,
        _FIELDS
        | {"kind": pair.kinds, "option": pair.stored}
        | ({"bias": ("none", "one", "huge")} if name == "DINOvMFLoss" else {}),
    )
    for name, pair in PAIRS.items()
}
