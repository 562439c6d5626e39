"""Cases on two gloo ranks: centres, Sinkhorn-Knopp, KoLeo, and prototypes that are split over ranks.

Legend: B images, K prototypes, D embedding dim.
"""

from __future__ import annotations

import itertools
import json
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed import ProcessGroup
from torch.multiprocessing.spawn import spawn

from bench.bits.inputs import Networks, draw, draw_prototypes, draw_rows, gradients, leaves_of
from bench.bits.losses import DIM, GLOBAL, LOCAL, RULES, SCHEDULE, draw_masks
from bench.bits.operators import BACKENDS, Problem, Setting
from bench.bits.record import Case, Results, run_cases
from vmf_kernels import (
    DINOLoss,
    DINOvMFLoss,
    DistributedKoLeoLoss,
    IBOTPatchLoss,
    PrototypeKoLeoLoss,
    PrototypeLogits,
    Prototypes,
    SinkhornKnopp,
    prototype_usage,
)
from vmf_kernels.compat import dinov2, dinov3, lightly

RANKS = 2
COUNT, BLOCKS = 257, (150, 107)  # prototypes of all ranks, and of each
IMAGES = ((5, 3), (2, 7), (4, 1))  # of each rank, by step
FORMS = ("unstored", "stored")


def run_on_ranks(threads: int) -> Results:
    """All cases of this file, under their names with the rank's number."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(_run_rank, (folder, threads), nprocs=RANKS)
        parts = [Results(*json.loads((Path(folder) / f"{rank}.json").read_text())) for rank in range(RANKS)]
    whole = Results({}, {})
    for rank, part in enumerate(parts):
        whole.cases.update({f"{name}/rank {rank}": records for name, records in part.cases.items()})
        whole.skipped.update({f"{name}/rank {rank}": reason for name, reason in part.skipped.items()})
    return whole


def cases() -> Iterator[Case]:
    """All of this file; run by every rank, from the same seed."""
    for (rule, options), form in itertools.product(RULES.items(), FORMS):
        run = partial(_rows_apart, partial(DINOLoss, COUNT, GLOBAL + LOCAL, *SCHEDULE, **options), form)
        yield Case(f"ranks/DINOLoss/{rule}/{form}", ("DINOLoss",), run)
    vmf = partial(DINOvMFLoss, COUNT, GLOBAL + LOCAL, *SCHEDULE, center_start="first_batch")
    yield Case("ranks/DINOvMFLoss", ("DINOvMFLoss",), partial(_rows_apart, vmf, "unstored"))
    for rule, tokens in itertools.product(RULES, ("all", "masked")):
        run = partial(_patches_apart, {**RULES[rule], "center_tokens": tokens})
        yield Case(f"ranks/IBOTPatchLoss/{rule}/{tokens}", ("IBOTPatchLoss",), run)
    for rows in ((13, 22), (1, 7), (0, 9)):
        run = partial(_spread, DistributedKoLeoLoss, rows)
        yield Case(f"ranks/DistributedKoLeoLoss/{rows}", ("DistributedKoLeoLoss",), run)
    topk = partial(dinov3.KoLeoLossDistributed, topk=2)
    yield Case("ranks/dinov3.KoLeoLossDistributed", ("dinov3.KoLeoLossDistributed",), partial(_spread, topk, (9, 9)))
    yield Case("ranks/PrototypeKoLeoLoss", ("PrototypeKoLeoLoss",), _spread_prototypes)
    for backend, kind in itertools.product(BACKENDS, ("linear", "weight_norm_vmf")):
        run = partial(_prototypes_apart, backend, kind)
        yield Case(f"ranks/prototype_group/{kind}/{backend}", ("prototype_cross_entropy", "prototype_usage"), run)
    for rule, options in RULES.items():
        yield Case(f"ranks/prototype_group/DINOvMFLoss/{rule}", ("DINOvMFLoss",), partial(_loss_of_blocks, options))
    yield Case("ranks/SinkhornKnopp/no rows on one", ("SinkhornKnopp",), _balanced)
    for name, make in DROP_INS.items():
        yield Case(f"ranks/{name}", (name,), partial(_centers_apart, make))


def _run_rank(rank: int, folder: str, threads: int) -> None:
    torch.set_num_threads(threads)
    warnings.filterwarnings("ignore", message=".*barrier.*")
    store = f"file://{folder}/store"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS)
    results = run_cases(cases())
    (Path(folder) / f"{rank}.json").write_text(json.dumps(results))
    distributed.destroy_process_group()


def _own(sizes: Sequence[int]) -> slice:
    """Which of all rows or prototypes are this rank's, where each has so many."""
    rank = distributed.get_rank()
    return slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))


def _everyone() -> ProcessGroup:
    group = distributed.group.WORLD
    assert group is not None, "ranks run in a process group"
    return group


def _rows_apart(make: Callable[[], Any], form: str) -> dict[str, Any]:
    """Steps in which ranks have different images; all draw the same, and each takes its own."""
    networks, loss, found = Networks("weight_norm", COUNT, DIM), make(), {}
    for epoch, images in enumerate(IMAGES):
        students = draw_rows(GLOBAL + LOCAL, sum(images), DIM)
        teachers = draw_rows(GLOBAL, sum(images), DIM)[:, _own(images)].flatten(0, 1)
        outputs = networks.outputs(form, students[:, _own(images)].flatten(0, 1), teachers)
        value = loss(*outputs, epoch)
        slopes = gradients(value, {"features": students, **networks.leaves()})
        networks.learn(slopes)
        found[f"step {epoch}"] = {"loss": value, **slopes, "state": dict(loss.state_dict())}
    return found


def _patches_apart(options: dict[str, Any]) -> dict[str, Any]:
    """Steps in the second of which one rank has no masked patch."""
    networks, loss, found = Networks("linear", COUNT, DIM), IBOTPatchLoss(COUNT, **options), {}
    for step, images in enumerate(IMAGES):
        masks = draw_masks(sum(images))
        masks[: images[0]] &= step != 1
        students, teachers = draw_rows(*masks.shape, DIM), draw_rows(*masks.shape, DIM)
        mine = _own(images)
        value = loss(*networks.outputs("unstored", students[mine], teachers[mine]), masks[mine], 0.05)
        slopes = gradients(value, {"features": students, **networks.leaves()})
        networks.learn(slopes)
        found[f"step {step}"] = {"loss": value, **slopes, "state": dict(loss.state_dict())}
    return found


def _spread(make: Callable[[], nn.Module], rows: tuple[int, int]) -> dict[str, Any]:
    features = draw(sum(rows), DIM)[_own(rows)].requires_grad_()
    loss = make()(features)
    return {"loss": loss, **gradients(loss, {"features": features})}


def _block(whole: Prototypes) -> Prototypes:
    """This rank's prototypes, leaves of their own."""
    parts: dict[str, Any] = {
        name: stored.detach()[_own(BLOCKS)].clone().requires_grad_() for name, stored in leaves_of(whole).items()
    }
    return replace(whole, **parts)


def _spread_prototypes() -> dict[str, Any]:
    prototypes = _block(draw_prototypes("weight_norm", COUNT, DIM))
    loss = PrototypeKoLeoLoss(group=_everyone())(prototypes)
    return {"loss": loss, **gradients(loss, leaves_of(prototypes))}


def _prototypes_apart(backend: str, kind: str) -> dict[str, Any]:
    whole = Problem.of(Setting(kind=kind, weigh_images=True))
    assert whole.teacher_bias is not None
    mine = replace(
        whole,
        student_prototypes=_block(whole.student_prototypes),
        teacher_prototypes=_block(whole.teacher_prototypes).detach(),
        teacher_bias=whole.teacher_bias[_own(BLOCKS)],
    )
    options: dict[str, Any] = {"backend": backend, "prototype_group": _everyone()}
    result = mine.loss(**options)
    usage = prototype_usage(mine.teacher, mine.teacher_prototypes, 0.05, mine.teacher_bias, **options)
    return {"result": result, "usage": usage, **gradients(result.loss, mine.leaves())}


def _loss_of_blocks(options: dict[str, Any]) -> dict[str, Any]:
    """Steps of a loss whose prototypes, and centre, are in two blocks."""
    student, teacher = (_block(draw_prototypes("weight_norm", COUNT, DIM)) for _ in range(2))
    make, found = partial(DINOvMFLoss, student.count, GLOBAL + LOCAL, *SCHEDULE), {}
    loss = make(prototype_group=_everyone(), **options)
    for epoch, (images, _) in enumerate(IMAGES):
        features, teachers = draw_rows((GLOBAL + LOCAL) * images, DIM), draw_rows(GLOBAL * images, DIM).detach()
        value = loss(PrototypeLogits(features, student), PrototypeLogits(teachers, teacher.detach()), epoch)
        slopes = gradients(value, {"features": features, **leaves_of(student)})
        found[f"step {epoch}"] = {"loss": value, **slopes, "statistics": loss.statistics}
        found[f"step {epoch}"]["state"] = dict(loss.state_dict())
    return found


def _balanced() -> dict[str, Any]:
    found, rows = {}, (0, 11)
    for form in FORMS:
        features, teacher = draw_rows(sum(rows), DIM)[_own(rows)], draw_prototypes("linear", COUNT, DIM)
        logits = PrototypeLogits(features, teacher).detach()
        found[form] = SinkhornKnopp()(logits if form == "unstored" else logits.materialize(), 0.05)
    return found


def _centers_apart(make: Callable[[], Any]) -> dict[str, Any]:
    """Steps of a drop-in's centre by rows that differ between ranks; in the last one rank has none."""
    networks, loss, found = Networks("weight_norm", COUNT, DIM), make(), {}
    for step, rows in enumerate((*IMAGES, (6, 0))):
        features = draw_rows(sum(rows), DIM).detach()[_own(rows)]
        _, teacher = networks.outputs(FORMS[step % 2], features, features)
        if isinstance(loss, lightly.RankMeanCenter):
            loss.update(teacher)
        else:
            loss.update_center(teacher)
            targets = loss.softmax_center_teacher(teacher, 0.05)
            found[f"targets {step}"] = targets if isinstance(targets, torch.Tensor) else targets.materialize()
        found[f"state {step}"] = dict(loss.state_dict())
    return found


def _started(loss: Any) -> Any:
    loss.init_weights()
    return loss


DROP_INS: dict[str, Callable[[], Any]] = {
    "dinov2.DINOLoss": partial(dinov2.DINOLoss, COUNT),
    "dinov2.iBOTPatchLoss": partial(dinov2.iBOTPatchLoss, COUNT),
    "dinov3.DINOLoss": lambda: _started(dinov3.DINOLoss(COUNT)),
    "dinov3.iBOTPatchLoss": lambda: _started(dinov3.iBOTPatchLoss(COUNT)),
    "lightly.RankMeanCenter": partial(lightly.RankMeanCenter, COUNT),
}
