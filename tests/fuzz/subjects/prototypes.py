"""Prototypes and the density's normaliser: ``log_vmf_constant``, ``Prototypes`` and its constructors, ``multi_crop_weights``.

Legend: K prototypes, D embedding dim.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tests.fuzz import budget
from tests.fuzz.cases import Case
from tests.fuzz.inputs import DTYPES, Source, is_finite
from tests.fuzz.statements import prototypes as statement_of
from tests.fuzz.statements.vmf import LogNormalizer, mean_resultant_length
from tests.fuzz.subjects.subject import Subject, choices_of
from vmf_kernels import (
    Prototypes,
    linear_prototypes,
    log_vmf_constant,
    multi_crop_weights,
    normalized_prototypes,
    vmf_mean_resultant_length,
    vmf_prototypes,
    weight_norm_prototypes,
    weight_norm_vmf_prototypes,
)

RELATIVE = {
    "fp64": 2e-12,
    "fp32": 5e-7,
    "fp32 below 64": 2e-6,
}  # as documented, but that the statement is as exact as fp64
KAPPA = (1e-6, 1e6)  # the range for which errors are documented


def normalizer_faults(case: Case) -> list[str]:
    """Both functions and the slope of the first, over the documented range."""
    source = Source.of(case)
    low, high = (torch.tensor(bound, dtype=torch.float64).log10() for bound in KAPPA)
    kappa = (10 ** (low + (high - low) * source.uniform(case.prototypes))).to(DTYPES[case.dtype])
    kappa = torch.cat([kappa.clamp(*KAPPA), kappa.new_zeros(1)]).requires_grad_()
    exact = kappa.detach().double()
    value, length = log_vmf_constant(kappa, case.dim), vmf_mean_resultant_length(kappa.detach(), case.dim)
    (slope,) = torch.autograd.grad(value.sum(), kappa)
    truth = LogNormalizer.apply(exact, case.dim)  # type: ignore[no-untyped-call]
    ratio = mean_resultant_length(exact, case.dim)
    allowed = RELATIVE[case.dtype if case.dtype == "fp64" or case.dim >= 64 else "fp32 below 64"]
    found = []
    for name, got, expected in (("value", value, truth), ("length", length, ratio), ("slope", slope, -ratio)):
        error = ((got.detach().double() - expected).abs() / expected.abs().clamp(min=1e-30)).max().item()
        if not error <= allowed:
            found.append(f"{name}: relative error {error:.2e}, budget {allowed:.1e}")
    return found


def stored_faults(case: Case) -> list[str]:
    """What a head's prototypes are, with the gradients of each at what is stored."""
    stored = Source.of(case).prototypes(case.dim)
    made = _made(stored)
    if made.kind != stored.kind:
        return [f"kind is {made.kind}, expected {stored.kind}"]
    tau = case.student_temperature
    functions: dict[str, tuple[Callable[[Prototypes], Tensor], Callable[[Tensor, Tensor | None], Tensor]]] = {
        "weight": (lambda p: p.effective_weight(), lambda w, g: statement_of.effective(w, g, stored.kind)[0]),
        "norms": (lambda p: p.norms(), lambda w, g: statement_of.effective(w, g, stored.kind)[1]),
    }
    if stored.has_normalizer:
        functions["normalizer"] = (
            lambda p: p.log_normalizer(tau),
            lambda w, g: LogNormalizer.apply(  # type: ignore[no-untyped-call]
                (statement_of.effective(w, g, stored.kind)[1] / tau).double(), case.dim
            ).to(w.dtype),
        )
    return [f"{name}: {f}" for name, pair in functions.items() for f in _faults_of(case, stored, *pair)]


def _made(stored: Prototypes) -> Prototypes:
    """The same by the public constructor of its kind."""
    if stored.magnitude is None:
        makers = {"linear": linear_prototypes, "normalized": normalized_prototypes, "linear_vmf": vmf_prototypes}
        return makers[stored.kind](stored.weight)
    make = {"weight_norm": weight_norm_prototypes, "weight_norm_vmf": weight_norm_vmf_prototypes}[stored.kind]
    return make(stored.magnitude, stored.weight)


def _faults_of(
    case: Case,
    stored: Prototypes,
    ours: Callable[[Prototypes], Tensor],
    formula: Callable[[Tensor, Tensor | None], Tensor],
) -> list[str]:
    """Faults of one property and of the gradient of a weighted sum of it."""
    given = stored.weight, stored.magnitude
    if not is_finite(*given):
        return []
    wide = torch.float64 if stored.weight.dtype == torch.float64 else torch.float32

    def outcome(dtype: torch.dtype, compute: Callable[[Tensor, Tensor | None], Tensor]) -> dict[str, Tensor]:
        leaves = [None if t is None else t.detach().to(dtype).requires_grad_() for t in given]
        assert leaves[0] is not None
        value = compute(leaves[0], leaves[1])
        weights = torch.randn(value.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(case.seed + 1))
        wanted = [leaf for leaf in leaves if leaf is not None]
        total = (value * weights.to(value.dtype)).sum() + 0 * sum(leaf.sum() for leaf in wanted)
        gradients = torch.autograd.grad(total, wanted, allow_unused=True)
        filled = [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(wanted, gradients, strict=True)]
        return dict(zip(("value", "gradient", "magnitude gradient"), [value.detach(), *filled], strict=False))

    got = outcome(stored.weight.dtype, lambda w, g: ours(Prototypes(w, g, stored.kind)))
    truth = outcome(torch.float64, formula)
    plain = outcome(wide, formula)
    dense = {name: value.to(got[name].dtype) for name, value in plain.items()}
    length = statement_of.effective(given[0].double(), None, "linear")[1]
    row = 4 + 1 / torch.where(length > 0, length, 1.0).amin()  # a direction's derivative is of the size of 1 / length
    sizes = {name: row * (value.abs() + value.abs().amax()) for name, value in truth.items() if value.numel()}
    return budget.faults(got, truth, dense, sizes, finite_inputs=True)


def crop_faults(case: Case) -> list[str]:
    """``multi_crop_weights``: the mean over the pairs of different views, counted."""
    teacher, student = case.teacher_views, case.student_views
    pairs = [(g, v) for g in range(teacher) for v in range(student) if g != v]
    if not pairs:
        try:
            multi_crop_weights(teacher, student)
        except ValueError:
            return []
        return ["no pair is left, but nothing is raised"]
    got = multi_crop_weights(teacher, student)
    wrong = [p for p in ((g, v) for g in range(teacher) for v in range(student)) if got[p] != (p in pairs) / len(pairs)]
    return [f"weights of {wrong} are wrong"] if wrong else []


SUBJECTS = {
    "log_vmf_constant": Subject(normalizer_faults, choices_of("prototypes", "dim", dtype=("fp32", "fp64"))),
    "Prototypes": Subject(
        stored_faults,
        choices_of("prototypes", "dim", "kind", "norms", "layout", "student_temperature", dtype=("fp32", "fp64")),
    ),
    "multi_crop_weights": Subject(crop_faults, choices_of("teacher_views", "student_views")),
}
