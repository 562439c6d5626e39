"""What is taken from a teacher's batch: ``prototype_usage``, ``TeacherTargets``, ``SinkhornKnopp`` and both centres.

Each of stored logits and of logits that are not stored.

Legend: R rows, K prototypes.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.fuzz import budget
from tests.fuzz.cases import Case
from tests.fuzz.inputs import Source, is_finite
from tests.fuzz.statements import prototypes as statement_of
from tests.fuzz.statements.centers import moved_center
from tests.fuzz.statements.sinkhorn import sinkhorn_knopp_of_any_size
from tests.fuzz.subjects.prototype_loss import BACKENDS
from tests.fuzz.subjects.subject import Subject, choices_of
from vmf_kernels import (
    LogitCenter,
    ProbabilityCenter,
    PrototypeLogits,
    Prototypes,
    SinkhornKnopp,
    TeacherTargets,
    prototype_usage,
)
from vmf_kernels.prototypes import accumulation_dtype

Values = dict[str, Tensor]
MOMENTA = (0.9, 0.0, 0.5)  # by ``topk``


class Batch(NamedTuple):
    """A teacher's rows, and the bias in which its targets have more than its normaliser."""

    rows: Tensor  # [R, D]
    stored: Prototypes
    bias: Tensor | None  # [K]

    @classmethod
    def of(cls, case: Case, source: Source) -> Batch:
        stored = source.prototypes(case.dim)
        return cls(source.rows(case.images * case.teacher_views, stored.weight), stored, source.bias())

    def to(self, dtype: torch.dtype) -> Batch:
        stored = self.stored
        magnitude = None if stored.magnitude is None else stored.magnitude.to(dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        return Batch(self.rows.to(dtype), Prototypes(stored.weight.to(dtype), magnitude, stored.kind), bias)

    def raw(self) -> Tensor:
        """[R, K] logits, not over temperature, without the normaliser."""
        kind = self.stored.kind.removesuffix("_vmf")
        return statement_of.logits(self.rows, self.stored.weight, self.stored.magnitude, kind, 1.0)

    def scaled(self, temperature: float, bias: Tensor | None = None) -> Tensor:
        """[R, K] nats, with the normaliser."""
        stored = self.stored
        return statement_of.logits(self.rows, stored.weight, stored.magnitude, stored.kind, temperature, bias)

    def normalizer(self, temperature: float) -> Tensor | None:
        """[K] nats, what stored logits lack."""
        if not self.stored.has_normalizer:
            return None
        return self._replace(rows=torch.zeros_like(self.rows[:1])).scaled(temperature)[0] if len(self.rows) else None

    def sizes(self, temperature: float, bias: Tensor | None = None) -> Tensor:
        """[R, K] of the logits' terms."""
        zero = self._replace(rows=torch.zeros_like(self.rows))
        own = zero.scaled(temperature, bias).abs()
        w, _ = statement_of.effective(self.stored.weight, self.stored.magnitude, self.stored.kind)
        return (own + self.rows.abs() @ w.abs().T / temperature).nan_to_num(posinf=0.0)

    def finite(self) -> bool:
        return is_finite(self.rows, self.stored.weight, self.stored.magnitude, self.bias)


def _judged(case: Case, batch: Batch, got: Values, formula: Any, sizes: Values, *, loose: float = 1.0) -> list[str]:
    """Faults against ``formula(batch)`` in fp64, with its result in the dtype of the sums as the measure."""
    dtype = accumulation_dtype(batch.rows.dtype)
    truth, dense = formula(batch.to(torch.float64)), formula(batch.to(dtype))
    growth = loose * (1 + len(batch.rows) / 8)
    scaled = {name: growth * size for name, size in sizes.items()}
    dense = {name: value.to(got[name].dtype) for name, value in dense.items()}
    return budget.faults(got, truth, dense, scaled, finite_inputs=batch.finite())


def usage_faults(case: Case) -> list[str]:
    """``prototype_usage``."""
    batch, tau = Batch.of(case, Source.of(case)), case.teacher_temperature
    if _unsupported(case, batch):
        return []
    if not len(batch.rows):
        return _raises(lambda: prototype_usage(batch.rows, batch.stored, tau, batch.bias, backend=case.backend))
    got = {"usage": prototype_usage(batch.rows, batch.stored, tau, batch.bias, backend=case.backend)}
    exact = batch.to(torch.float64)
    q, s = exact.scaled(tau, exact.bias).softmax(dim=1), exact.sizes(tau, exact.bias)
    size = 2 * (q * (1 + s + (q * s).sum(dim=1, keepdim=True))).mean(dim=0)
    return _judged(
        case, batch, got, lambda b: {"usage": b.scaled(tau, b.bias).softmax(dim=1).mean(dim=0)}, {"usage": size}
    )


def target_faults(case: Case) -> list[str]:
    """``TeacherTargets.materialize`` and ``PrototypeLogits.materialize``."""
    batch, tau = Batch.of(case, Source.of(case)), case.teacher_temperature
    logits = PrototypeLogits(batch.rows, batch.stored)
    got = {"targets": TeacherTargets(logits, tau, batch.bias).materialize()}
    exact = batch.to(torch.float64)
    q, s = exact.scaled(tau, exact.bias).softmax(dim=1), exact.sizes(tau, exact.bias)
    size = 2 * q * (1 + s + (q * s).sum(dim=1, keepdim=True))
    return _judged(case, batch, got, lambda b: {"targets": b.scaled(tau, b.bias).softmax(dim=1)}, {"targets": size})


def sinkhorn_faults(case: Case) -> list[str]:
    """``SinkhornKnopp``: the targets that its bias gives, for ``topk`` iterations."""
    batch, tau = Batch.of(case, Source.of(case)), case.teacher_temperature
    infinite = not batch.finite() and case.rows != "nan" and case.norms != "nan"
    # of a prototype that is infinitely far from every row the plan has 0 / 0; here it gets nothing, which is no fault
    if _unsupported(case, batch) or not len(batch.rows) or infinite:
        return []
    rule = SinkhornKnopp(case.topk, backend=case.backend or "auto")
    exact = batch.to(torch.float64)
    if case.option == "stored":
        logits = PrototypeLogits(batch.rows, batch.stored).materialize()
        normalizer = exact.normalizer(tau)
        u = rule(logits, tau, normalizer).double()
        scaled = logits.double() / tau if normalizer is None else logits.double() / tau + normalizer
    else:
        u, scaled = rule(PrototypeLogits(batch.rows, batch.stored), tau).double(), exact.scaled(tau)
    got = {"targets": (scaled + u).softmax(dim=1).to(accumulation_dtype(batch.rows.dtype))}
    s = exact.sizes(tau).amax() + exact.scaled(tau).abs().amax()
    q = sinkhorn_knopp_of_any_size(exact.scaled(tau), case.topk)
    size = 4 * case.topk * q * (1 + s)
    rounded = (
        1.0 if case.option != "stored" else torch.finfo(batch.rows.dtype).eps / torch.finfo(got["targets"].dtype).eps
    )

    def formula(b: Batch) -> Values:
        return {"targets": sinkhorn_knopp_of_any_size(b.scaled(tau), case.topk)}

    return _judged(case, batch, got, formula, {"targets": size}, loose=rounded)


def center_faults(case: Case) -> list[str]:
    """``LogitCenter`` and ``ProbabilityCenter`` over batches that differ in their rows."""
    source, tau, momentum = Source.of(case), case.teacher_temperature, MOMENTA[case.topk - 1]
    batches = [Batch.of(case, source) for _ in range(case.steps)]
    if any(_unsupported(case, b) for b in batches) or not len(batches[0].rows):
        return []
    wide = accumulation_dtype(batches[0].rows.dtype)
    if case.option == "logit":
        center: LogitCenter | ProbabilityCenter = LogitCenter(case.prototypes, momentum).to(wide)
    else:
        center = ProbabilityCenter(case.prototypes, momentum, average=case.option, backend=case.backend or "auto").to(
            wide
        )
    start = center.center.detach().double().clone()
    for batch in batches:
        center.update(PrototypeLogits(batch.rows, batch.stored), tau)

    def formula(_: Batch, dtype: torch.dtype) -> Values:
        value = start.to(dtype)
        for batch in batches:
            b = batch.to(dtype)
            value = moved_center(value, case.option, b.raw(), b.scaled(tau), momentum)
        return {"center": value}

    exact = [batch.to(torch.float64) for batch in batches]
    if case.option == "logit":
        size = sum((b.sizes(1.0).mean(dim=0, keepdim=True) for b in exact), start.abs())
    else:
        size = sum((2 * (1 + b.sizes(tau).amax() + math.log(len(b.rows))) for b in exact), start.abs())
    if not all(b.finite() for b in batches):
        # a batch that is not finite is left out, as documented; with the last one finite the centre must be
        return [] if center.center.isfinite().all() else ["the centre is not finite"]
    return _judged(case, batches[0], {"center": center.center}, lambda b: formula(b, b.rows.dtype), {"center": size})


def _unsupported(case: Case, batch: Batch) -> bool:
    return case.backend == "native" and torch.float64 in (batch.rows.dtype, batch.stored.weight.dtype)


def _raises(call: Any) -> list[str]:
    try:
        call()
    except ValueError:
        return []
    return ["0 rows raise nothing"]


_FIELDS = (
    "images", "teacher_views", "prototypes", "dim", "kind", "dtype", "stored", "teacher_temperature", "rows", "norms", "layout",
)  # fmt: skip
_ITERATIONS = (1, 2, 3)
SUBJECTS = {
    "prototype_usage": Subject(usage_faults, choices_of(*_FIELDS, "bias"), BACKENDS),
    "TeacherTargets": Subject(target_faults, choices_of(*_FIELDS, "bias")),
    "SinkhornKnopp": Subject(
        sinkhorn_faults, choices_of(*_FIELDS, option=("unstored", "stored"), topk=_ITERATIONS), BACKENDS
    ),
    "centers": Subject(
        center_faults,
        choices_of(*_FIELDS, option=("logit", "log_probability", "probability"), topk=_ITERATIONS, steps=_ITERATIONS),
        BACKENDS,
    ),
}
