"""``logit_cross_entropy``, and ``target_cross_entropy`` of stored logits and of stored probabilities.

Legend: S / T student / teacher rows, G / V their views, B images, K prototypes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tests.fuzz import budget
from tests.fuzz.cases import Case
from tests.fuzz.inputs import Source, is_finite
from tests.fuzz.statements.cross_entropy import plain_loss, statistics
from tests.fuzz.subjects.subject import Subject, choices_of
from vmf_kernels import CrossEntropy, TeacherTargets, logit_cross_entropy, target_cross_entropy
from vmf_kernels.prototypes import accumulation_dtype

LEAVES = ("student", "student_bias")
Values = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Given:
    """The arguments of a call."""

    case: Case
    student: Tensor  # [S, K]
    student_bias: Tensor | None  # [K]
    teacher: Tensor  # [T, K] logits, or probabilities of any row sums
    teacher_bias: Tensor | None
    pair_weights: Tensor  # [G, V]
    image_weights: Tensor | None  # [B]

    @classmethod
    def of(cls, case: Case) -> Given:
        source = Source.of(case)
        student = source.logits(case.images * case.student_views)
        teacher = source.logits(case.images * case.teacher_views)
        if case.option == "probabilities":
            wide = teacher.double() / case.teacher_temperature
            teacher = source.stored(wide.softmax(dim=1) * (0.5 + source.uniform(len(wide), 1)), case.dtype)
        bias = source.bias()
        return cls(
            case,
            student,
            None if bias is None or case.learns == "rows" else source.stored(source.normal(case.prototypes), "fp32"),
            teacher,
            None if case.option == "probabilities" else bias,
            source.pair_weights(),
            source.image_weights(),
        )

    def to(self, dtype: torch.dtype) -> Given:
        """Every tensor converted."""
        named = {name: t.to(dtype) for name, t in vars(self).items() if isinstance(t, Tensor)}
        return replace(self, **named)  # type: ignore[arg-type]

    def logits(self) -> tuple[Tensor, Tensor]:
        """Both networks' logits over temperature, plus their biases."""
        student = self.student / self.case.student_temperature
        student = student if self.student_bias is None else student + self.student_bias
        if self.case.option == "probabilities":
            return student, self.teacher.log()
        teacher = self.teacher / self.case.teacher_temperature
        return student, teacher if self.teacher_bias is None else teacher + self.teacher_bias

    def finite(self) -> bool:
        return is_finite(self.student, self.student_bias, self.teacher, self.teacher_bias)


def outcome(given: Given, compute: Callable[[Given], Values]) -> Values:
    """What is computed, and the gradients of its loss at the student's logits and bias."""
    leaves = {n: t.detach().requires_grad_() for n in LEAVES if (t := getattr(given, n)) is not None}
    values = compute(replace(given, **leaves))
    upstream = values["loss"].new_tensor(given.case.upstream)
    gradients = torch.autograd.grad(values["loss"], list(leaves.values()), upstream)
    return {n: v.detach() for n, v in values.items()} | dict(zip(leaves, gradients, strict=True))


def by_formula(given: Given) -> Values:
    """In the dtype of the sums."""
    wide = given.to(accumulation_dtype(given.student.dtype))
    student, teacher = wide.logits()
    if given.case.option == "probabilities":
        return {"loss": plain_loss(student, wide.teacher, wide.pair_weights, wide.image_weights)}
    return statistics(student, teacher, wide.pair_weights, wide.image_weights)


def by_library(given: Given) -> Values:
    case = given.case
    result = _called(given)
    named = {"loss": result.loss}
    return named if case.option == "probabilities" else named | vars(result.statistics)


def _called(given: Given) -> CrossEntropy:
    case = given.case
    named = {
        "student_temperature": case.student_temperature,
        "student_bias": given.student_bias,
        "image_weights": given.image_weights,
        "backend": case.backend,
    }
    if case.function == "target_cross_entropy of stored":
        targets = given.teacher
        if case.option == "logits":
            targets = TeacherTargets(given.teacher, case.teacher_temperature, given.teacher_bias)  # type: ignore[assignment]
        return target_cross_entropy(given.student, targets, given.pair_weights, **named)  # type: ignore[arg-type]
    return logit_cross_entropy(
        given.student,
        given.teacher,
        given.pair_weights,
        teacher_temperature=case.teacher_temperature,
        teacher_bias=given.teacher_bias,
        **named,  # type: ignore[arg-type]
    )


def sizes(exact: Given) -> Values:
    """By how much each value changes per relative change of every logit, and of the two parts of each gradient."""
    (l_SK, l_TK), case = exact.logits(), exact.case
    images = len(l_SK) // exact.pair_weights.shape[1]
    by_image = l_SK.new_ones(images) if exact.image_weights is None else exact.image_weights
    pairs_TS = torch.kron(exact.pair_weights, torch.diag(by_image))
    p, mass_T1 = l_SK.softmax(dim=1), l_TK.logsumexp(dim=1, keepdim=True).exp()
    q = l_TK.softmax(dim=1)
    if case.option == "probabilities":
        pairs_TS = pairs_TS * mass_T1
    s_SK = _sizes_of(exact.student / case.student_temperature, exact.student_bias)
    s_TK = _sizes_of(
        l_TK if case.option == "probabilities" else exact.teacher / case.teacher_temperature, exact.teacher_bias
    )
    n_S, n_T = pairs_TS.sum(dim=0), pairs_TS.sum(dim=1)
    total = n_T.sum() if n_T.any() else n_T.new_ones(())
    student_S, teacher_T = (p * s_SK).sum(dim=1), (q * s_TK).sum(dim=1)
    push = n_S[:, None] * p * (1 + s_SK + student_S[:, None])
    pull = pairs_TS.T @ (q * (1 + s_TK + teacher_T[:, None]))
    drawn_TK = pairs_TS @ l_SK
    spread_TK = (drawn_TK - (q * drawn_TK).sum(dim=1, keepdim=True)).abs()
    own_S = student_S + l_SK.logsumexp(dim=1).abs()
    loss = n_S @ own_S + (pairs_TS * (q @ s_SK.T)).sum() + (q * (1 + s_TK) * spread_TK).sum()
    teacher_entropy = n_T @ (1 + teacher_T * (1 + s_TK.amax(dim=1)) + l_TK.logsumexp(dim=1).abs()) / total
    return {
        "loss": loss,
        "teacher_entropy": teacher_entropy,
        "student_entropy": n_S @ (1 + student_S * (1 + s_SK.amax(dim=1)) + own_S) / total,
        "kl": loss / total + teacher_entropy,
        "usage": n_T @ (q * (1 + s_TK + teacher_T[:, None])) / total,
        "student": (push + pull) * abs(case.upstream) / case.student_temperature,
        "student_bias": (push + pull).sum(dim=0) * abs(case.upstream),
    }


def _sizes_of(scaled: Tensor, bias: Tensor | None) -> Tensor:
    size = scaled.abs() if bias is None else scaled.abs() + bias.abs()
    return size.nan_to_num(posinf=0.0)  # -inf leaves a prototype out


def faults(case: Case) -> list[str]:
    """Whether loss, statistics and gradients are within the budget, and the bits of a second call the same."""
    given = Given.of(case)
    got, dense = outcome(given, by_library), outcome(given, by_formula)
    exact = given.to(torch.float64)
    truth, by = outcome(exact, by_formula), sizes(exact)
    # weights are rounded as well, and a sum over rows of equal terms rounds to one side
    growth = 2 + case.images * max(case.teacher_views, case.student_views) / 8
    found = budget.faults(
        got, truth, dense, {n: growth * by[n] for n in truth}, finite_inputs=given.finite() or not case.images
    )
    if case.again == "repeat":
        again = outcome(given, by_library)
        differ = [n for n in got if not torch.equal(got[n].nan_to_num(nan=7.0), again[n].nan_to_num(nan=7.0))]
        found += [f"the bits of {', '.join(differ)} differ"] if differ else []
    return found


_FIELDS = (
    "images", "teacher_views", "student_views", "prototypes", "dtype", "student_temperature", "teacher_temperature", "rows",
    "bias", "pairs", "weights", "layout", "upstream", "learns", "again",
)  # fmt: skip
SUBJECTS = {
    "logit_cross_entropy": Subject(faults, choices_of(*_FIELDS), ("torch", "auto")),
    "target_cross_entropy of stored": Subject(
        faults, choices_of(*_FIELDS, option=("logits", "probabilities")), ("streaming", "auto")
    ),
}
