"""Cases of the cross-entropies and of ``prototype_usage``.

Legend: S / T student / teacher rows, G / V their views, B images, K prototypes, D embedding dim.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.bits.inputs import KINDS, draw, draw_prototypes, draw_rows, gradients, leaves_of, without_magnitude_column
from bench.bits.record import Case
from vmf_kernels import (
    CrossEntropy,
    PrototypeLogits,
    Prototypes,
    TeacherTargets,
    logit_cross_entropy,
    matched_prototype_cross_entropy,
    multi_crop_weights,
    prototype_cross_entropy,
    prototype_usage,
    target_cross_entropy,
)

BACKENDS = ("reference", "streaming", "native", "auto")
DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16}
RESULTS = ("CrossEntropy", "AssignmentStatistics", "Prototypes")  # what every cross-entropy here goes through
SMALL = {"count": 37, "images": 3, "views": (2, 3)}  # for Triton's interpreter


@dataclass(frozen=True)
class Setting:
    """A problem of ``prototype_cross_entropy``."""

    kind: str = "weight_norm_vmf"
    dtype: torch.dtype = torch.float32
    count: int = 257
    dim: int = 24
    images: int = 7
    views: tuple[int, int] = (2, 5)  # of teacher and student
    stored_dtype: torch.dtype | None = None  # of the prototypes, where it is another one
    teacher_dim: int | None = None  # where it is another one
    weigh_images: bool = False
    teacher_bias: bool = True


SETTINGS = {
    "pairs of single rows": Setting(images=1, views=(9, 13)),
    "weights of images": Setting(weigh_images=True, images=11),
    "two dims": Setting(teacher_dim=40),
    "two dims, linear": Setting(kind="linear", teacher_dim=16, dim=33),
    "many prototypes": Setting(count=4099, dim=64),
    "more prototypes than a projection takes": Setting(kind="weight_norm", count=8197, dim=16, images=3),
    "many rows": Setting(images=131, dim=16),
    "many views of one image": Setting(images=1, views=(211, 613), dim=16, teacher_bias=False),
    "no images": Setting(images=0),
    "one prototype": Setting(count=1, dim=2),
    "fp16": Setting(dtype=torch.float16),
    "bf16 rows of fp32 prototypes": Setting(dtype=torch.bfloat16, stored_dtype=torch.float32),
    "fp32 rows of bf16 prototypes": Setting(stored_dtype=torch.bfloat16, kind="weight_norm"),
    "without a bias": Setting(kind="normalized", teacher_bias=False),
}


@dataclass(frozen=True)
class Problem:
    """The tensors of a setting."""

    student: Tensor  # [S, D]
    student_prototypes: Prototypes
    teacher: Tensor  # [T, D]
    teacher_prototypes: Prototypes
    pair_weights: Tensor  # [G, V]
    teacher_bias: Tensor | None  # [K]
    image_weights: Tensor | None  # [B]

    @classmethod
    def of(cls, setting: Setting) -> Problem:
        """Drawn from the current seed."""
        dtype, stored_dtype = setting.dtype, setting.stored_dtype or setting.dtype
        (teacher_views, views), teacher_dim = setting.views, setting.teacher_dim or setting.dim
        bias = draw(setting.count, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        if setting.count > 1:
            bias[setting.count // 5] = -torch.inf
        weights = torch.rand(setting.images, dtype=torch.float64)
        weights[:1] = 0
        return cls(
            draw_rows(views * setting.images, setting.dim, dtype=dtype),
            draw_prototypes(setting.kind, setting.count, setting.dim, stored_dtype),
            draw_rows(teacher_views * setting.images, teacher_dim, dtype=dtype).detach(),
            draw_prototypes(setting.kind, setting.count, teacher_dim, stored_dtype).detach(),
            _pair_weights(setting.views) / max(setting.images, 1),
            bias if setting.teacher_bias else None,
            weights if setting.weigh_images else None,
        )

    def leaves(self) -> dict[str, Tensor]:
        """What gets a gradient."""
        return {"features": self.student, **leaves_of(self.student_prototypes)}

    def loss(self, **options: Any) -> CrossEntropy:
        """``prototype_cross_entropy``."""
        sides = self.student, self.student_prototypes, self.teacher, self.teacher_prototypes
        options |= {"teacher_bias": self.teacher_bias, "image_weights": self.image_weights}
        return prototype_cross_entropy(*sides, self.pair_weights, **options)


def cases() -> Iterator[Case]:
    """All of this file."""
    names = (*RESULTS, "prototype_cross_entropy", "multi_crop_weights")
    for (kind, maker), backend, (name, dtype) in itertools.product(KINDS.items(), BACKENDS, DTYPES.items()):
        if (backend, name) != ("native", "fp64"):  # which it does not take
            run = partial(_evaluate, Setting(kind=kind, dtype=dtype), backend)
            yield Case(f"prototype_cross_entropy/{kind}/{backend}/{name}", (*names, maker), run)
    for (name, setting), backend in itertools.product(SETTINGS.items(), BACKENDS[:3]):
        yield Case(f"prototype_cross_entropy/{name}/{backend}", names, partial(_evaluate, setting, backend))
    for kind, maker in KINDS.items():
        run = partial(_evaluate, Setting(kind=kind, **SMALL), "triton")  # type: ignore[arg-type]
        yield Case(f"prototype_cross_entropy/{kind}/triton", (*names, maker), run)
    for (name, way), backend in itertools.product(WAYS.items(), ("streaming", "native")):
        yield Case(f"prototype_cross_entropy/{name}/{backend}", names, partial(way, backend))
    for (kind, maker), backend in itertools.product(KINDS.items(), (*BACKENDS, "triton")):
        setting = Setting(kind=kind, **(SMALL if backend == "triton" else {}))  # type: ignore[arg-type]
        yield Case(f"prototype_usage/{kind}/{backend}", ("prototype_usage", maker), partial(_usage, setting, backend))
        covers = (*RESULTS, "matched_prototype_cross_entropy", maker)
        yield Case(f"matched/{kind}/{backend}", covers, partial(_matched, setting, backend))
    yield from _dense_cases()


def _dense_cases() -> Iterator[Case]:
    covers: tuple[str, ...] = ("CrossEntropy", "AssignmentStatistics", "logit_cross_entropy")
    for (name, dtype), biased in itertools.product(DTYPES.items(), (True, False)):
        run = partial(_dense, Setting(dtype=dtype, weigh_images=biased), "torch", biased=biased)
        yield Case(f"logit_cross_entropy/{'biased' if biased else 'plain'}/{name}", covers, run)
    many = Setting(count=4099, images=80)
    yield Case("logit_cross_entropy/many images", covers, partial(_dense, many, "auto", biased=True))
    alone = Setting(images=1, views=(9, 13))
    yield Case("logit_cross_entropy/single rows", covers, partial(_dense, alone, "auto", biased=False))
    small = Setting(**SMALL)  # type: ignore[arg-type]
    yield Case("logit_cross_entropy/triton", covers, partial(_dense, small, "triton", biased=True))
    covers = ("CrossEntropy", "AssignmentStatistics", "TeacherTargets", "target_cross_entropy")
    for (name, run), (dtype_name, dtype) in itertools.product(TARGETS.items(), DTYPES.items()):
        yield Case(f"target_cross_entropy/{name}/{dtype_name}", covers, partial(run, Setting(dtype=dtype)))


def _pair_weights(views: tuple[int, int]) -> Tensor:
    return torch.ones(views) if views == (1, 1) else multi_crop_weights(*views)


def _evaluate(setting: Setting, backend: str) -> dict[str, Any]:
    problem = Problem.of(setting)
    temperatures = {"student_temperature": 0.1, "teacher_temperature": torch.tensor(0.05)}
    result = problem.loss(backend=backend, **temperatures)
    return {"result": result, **gradients(result.loss, problem.leaves(), torch.full_like(result.loss, 0.7))}


def _twice(backend: str) -> dict[str, Any]:
    """A second backward pass, which computes the gradients again."""
    problem = Problem.of(Setting())
    loss = problem.loss(backend=backend).loss
    leaves = list(problem.leaves().values())
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    return {"first": first, "second": torch.autograd.grad(3 * loss, leaves)}


def _features_alone(backend: str) -> dict[str, Any]:
    problem = Problem.of(Setting())
    result = replace(problem, student_prototypes=problem.student_prototypes.detach()).loss(backend=backend)
    return {"result": result, **gradients(result.loss, {"features": problem.student})}


def _prototypes_alone(backend: str) -> dict[str, Any]:
    problem = Problem.of(Setting(kind="linear_vmf"))
    result = replace(problem, student=problem.student.detach()).loss(backend=backend)
    return {"result": result, **gradients(result.loss, leaves_of(problem.student_prototypes))}


def _no_gradient(backend: str) -> Any:
    with torch.no_grad():
        return Problem.of(Setting()).loss(backend=backend, student_temperature=0.07)


def _strided(backend: str) -> dict[str, Any]:
    """Rows and prototypes that are not contiguous, and magnitudes [K]."""
    problem = Problem.of(Setting())
    wide = draw(problem.student.shape[1], problem.student.shape[0] * 2).requires_grad_()
    prototypes = without_magnitude_column(problem.student_prototypes)
    moved = replace(problem, student=wide.T[::2], student_prototypes=prototypes, teacher=problem.teacher.T.clone().T)
    result = moved.loss(backend=backend)
    return {"result": result, **gradients(result.loss, {"wide": wide, **leaves_of(prototypes)})}


def _under_autocast(backend: str) -> dict[str, Any]:
    problem = Problem.of(Setting())
    with torch.autocast("cpu", torch.bfloat16):
        result = problem.loss(backend=backend)
    return {"result": result, **gradients(result.loss, problem.leaves())}


def _function_gradient(backend: str) -> Any:
    """By ``torch.func.grad``."""
    problem = Problem.of(Setting())
    detached = replace(problem, student_prototypes=problem.student_prototypes.detach())
    return torch.func.grad(lambda rows: replace(detached, student=rows).loss(backend=backend).loss)(
        problem.student.detach()
    )


def _usage(setting: Setting, backend: str) -> Any:
    problem = Problem.of(setting)
    return prototype_usage(
        problem.teacher, problem.teacher_prototypes, 0.05, problem.teacher_bias, backend=backend
    ), prototype_usage(problem.student, problem.student_prototypes, torch.tensor(0.1), backend=backend)


def _matched(setting: Setting, backend: str) -> dict[str, Any]:
    problem = Problem.of(replace(setting, images=29 if backend != "triton" else 5, views=(1, 1)))
    weights = torch.rand(problem.student.shape[0])
    result = matched_prototype_cross_entropy(
        problem.student,
        problem.student_prototypes,
        problem.teacher,
        problem.teacher_prototypes,
        weights,
        teacher_bias=problem.teacher_bias,
        backend=backend,
    )
    return {"result": result, **gradients(result.loss, problem.leaves())}


def _dense(setting: Setting, backend: str, *, biased: bool) -> dict[str, Any]:
    problem = Problem.of(setting)
    student = draw(problem.student.shape[0], setting.count, dtype=setting.dtype).requires_grad_()
    teacher = draw(problem.teacher.shape[0], setting.count, dtype=setting.dtype)
    bias = draw(setting.count).requires_grad_()
    result = logit_cross_entropy(
        student,
        teacher,
        problem.pair_weights,
        student_bias=bias if biased else None,
        teacher_bias=problem.teacher_bias if biased else None,
        image_weights=problem.image_weights,
        backend=backend,
    )
    leaves = {"student": student, "bias": bias} if biased else {"student": student}
    return {"result": result, **gradients(result.loss, leaves, torch.full_like(result.loss, 0.7))}


def _unstored_targets(setting: Setting) -> dict[str, Any]:
    problem = Problem.of(setting)
    targets = TeacherTargets(PrototypeLogits(problem.teacher, problem.teacher_prototypes), 0.05, problem.teacher_bias)
    student = PrototypeLogits(problem.student, problem.student_prototypes)
    result = target_cross_entropy(student, targets, problem.pair_weights, image_weights=problem.image_weights)
    return {"result": result, "q": targets.materialize(), **gradients(result.loss, problem.leaves())}


def _stored_targets(setting: Setting) -> dict[str, Any]:
    problem = Problem.of(setting)
    student = draw(problem.student.shape[0], setting.count, dtype=setting.dtype).requires_grad_()
    teacher = draw(problem.teacher.shape[0], setting.count, dtype=setting.dtype)
    targets = TeacherTargets(teacher, torch.tensor(0.05), problem.teacher_bias)
    result = target_cross_entropy(student, targets, problem.pair_weights, student_bias=draw(setting.count))
    return {"result": result, "q": targets.materialize(), **gradients(result.loss, {"student": student})}


def _stored_probabilities(setting: Setting, views: tuple[int, int], images: int) -> dict[str, Any]:
    """Of which one row is padding, and another does not sum to 1."""
    teacher_views, student_views = views
    student = draw(student_views * images, setting.count, dtype=setting.dtype).requires_grad_()
    q = draw(teacher_views * images, setting.count, dtype=torch.float32).softmax(dim=1)
    q[0], q[1, ::3] = 0, 0
    weights = torch.rand(*views)
    image_weights = torch.rand(images) if images > 1 else None
    result = target_cross_entropy(student, q, weights, image_weights=image_weights)
    return {"result": result, **gradients(result.loss, {"student": student})}


WAYS: dict[str, Callable[[str], Any]] = {
    "differentiated twice": _twice,
    "gradient of features alone": _features_alone,
    "gradient of prototypes alone": _prototypes_alone,
    "no gradient": _no_gradient,
    "strided": _strided,
    "under autocast": _under_autocast,
    "torch.func.grad": _function_gradient,
}
TARGETS: dict[str, Callable[[Setting], Any]] = {
    "unstored": _unstored_targets,
    "stored logits": _stored_targets,
    "probabilities of one view": partial(_stored_probabilities, views=(1, 3), images=7),
    "probabilities of three views": partial(_stored_probabilities, views=(3, 5), images=7),
    "probabilities of single rows": partial(_stored_probabilities, views=(5, 3), images=1),
}
