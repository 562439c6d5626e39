"""``prototype_cross_entropy``, ``matched_prototype_cross_entropy`` and ``target_cross_entropy`` of unstored logits.

Legend: S / T student / teacher rows, B images, K prototypes.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from tests.backends.native_calls import products_of
from tests.fuzz.budget import not_finite_faults
from tests.fuzz.cases import CHOICES, Case
from tests.fuzz.inputs import Source, is_finite
from tests.fuzz.statements import prototypes as statement_of
from tests.fuzz.statements.cross_entropy import push_and_pull, statistics
from tests.fuzz.subjects.subject import Subject, choices_of
from vmf_kernels import (
    CrossEntropy,
    PrototypeLogits,
    Prototypes,
    TeacherTargets,
    matched_prototype_cross_entropy,
    target_cross_entropy,
)
from vmf_kernels.backends.native import module
from vmf_kernels.prototypes import accumulation_dtype
from vmf_kernels.testing import (
    FP64_BUDGET,
    GRADIENTS,
    Outcome,
    Problem,
    assert_within_budget,
    dense_outcome,
    library_outcome,
    rounding_sizes,
)

AGREEMENT = 1e-11  # of the sizes that roundings are relative to: fp64's own, written in two ways
ROUNDINGS = 2.0  # of every logit: in base 2, or of sums in two parts
IN_PARTS = ("reference", "streaming", "triton")  # by (3) to (5): sums that may cancel, not one over G
BACKENDS = ("reference", "streaming", *(["native"] if module.native() is not None else []), "auto")
FIELDS = (
    "images", "teacher_views", "student_views", "prototypes", "dim", "teacher_dim", "kind", "dtype", "stored",
    "student_temperature", "teacher_temperature", "rows", "norms", "bias", "pairs", "weights", "layout", "upstream", "learns",
    "again",
)  # fmt: skip
LEARNS = {"all": GRADIENTS, "rows": GRADIENTS[:1], "prototypes": GRADIENTS[1:], "nothing": ()}


def problem_of(case: Case) -> Problem:
    """The case's arguments by name."""
    source = Source.of(case)
    student, teacher = source.prototypes(case.dim), source.prototypes(case.teacher_dim or case.dim)
    return Problem(
        source.rows(case.images * case.student_views, student.weight),
        student,
        source.rows(case.images * case.teacher_views, teacher.weight),
        teacher,
        pair_weights=source.pair_weights(),
        student_temperature=case.student_temperature,
        teacher_temperature=case.teacher_temperature,
        teacher_bias=source.bias(),
        image_weights=source.image_weights(),
    )


def statement(problem: Problem) -> Outcome:
    """Everything that the library promises of a problem in fp64, from the formulas alone."""
    features, stored = problem.student_leaves()
    of_student = stored.weight, stored.magnitude, stored.kind
    teacher = problem.teacher_prototypes
    of_teacher = teacher.weight, teacher.magnitude, teacher.kind
    l_SK = statement_of.logits(features, *of_student, problem.student_temperature)
    bias = None if problem.teacher_bias is None else problem.teacher_bias.double()
    l_TK = statement_of.logits(problem.teacher_features, *of_teacher, problem.teacher_temperature, bias)
    values = statistics(l_SK, l_TK, problem.pair_weights, problem.image_weights)
    leaves = dict(zip(GRADIENTS, (features, stored.weight, stored.magnitude), strict=True))
    wanted = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    gradients = torch.autograd.grad(values["loss"], list(wanted.values()))
    return {name: value.detach() for name, value in values.items()} | dict(zip(wanted, gradients, strict=True))


def faults(case: Case) -> list[str]:
    """Whether results are within the budget, the budget's truth is that of the formulas, and bits are those promised."""
    if case.function == "matched_prototype_cross_entropy":
        weights = case.weights if case.weights != "none" else "uniform"
        case = replace(case, teacher_views=1, student_views=1, pairs="ones", weights=weights)
    problem = problem_of(case)
    if _unsupported(case, problem):
        return []
    got = _outcome(case, problem)
    return [*_value_faults(case, problem, got), *_bit_faults(case, problem, got)]


def _unsupported(case: Case, problem: Problem) -> bool:
    wide = torch.float64 in (
        tensor.dtype
        for tensor in (
            problem.student_features,
            problem.teacher_features,
            problem.student_prototypes.weight,
            problem.teacher_prototypes.weight,
        )
    )
    return (case.backend == "native" and wide) or (case.backend == "triton" and (wide or case.teacher_dim != 0))


def _outcome(case: Case, problem: Problem) -> Outcome:
    """What the function gives, with gradients for what is to learn: for the rest, those of a call in which all learn."""
    whole = library_outcome(problem, case.backend) if case.function == "prototype_cross_entropy" else {}
    if whole and case.learns == "all" and case.upstream == 1.0:
        return whole
    features, stored = problem.student_leaves()
    leaves = dict(zip(GRADIENTS, (features, stored.weight, stored.magnitude), strict=True))
    for name, leaf in leaves.items():
        if leaf is not None:
            leaf.requires_grad_(name in LEARNS[case.learns])
    loss, of = call(case, problem, features, stored)
    wanted = {name: leaf for name, leaf in leaves.items() if leaf is not None and leaf.requires_grad}
    result = {"loss": loss.detach()} | vars(of)
    if wanted:
        upstream = loss.new_tensor(case.upstream)
        result |= dict(zip(wanted, torch.autograd.grad(loss, list(wanted.values()), upstream), strict=True))
    elif loss.requires_grad:
        raise AssertionError("the loss requires a gradient although nothing learns")
    return result


def call(case: Case, problem: Problem, features: torch.Tensor, stored: Prototypes) -> CrossEntropy:
    """One call of the case's function."""
    if case.function == "prototype_cross_entropy":
        return problem.cross_entropy(features, stored, case.backend)
    if case.function == "matched_prototype_cross_entropy":
        assert problem.image_weights is not None
        return matched_prototype_cross_entropy(
            features,
            stored,
            problem.teacher_features,
            problem.teacher_prototypes,
            problem.image_weights,
            student_temperature=problem.student_temperature,
            teacher_temperature=problem.teacher_temperature,
            teacher_bias=problem.teacher_bias,
            backend=case.backend,
        )
    teacher = PrototypeLogits(problem.teacher_features, problem.teacher_prototypes)
    return target_cross_entropy(
        PrototypeLogits(features, stored),
        TeacherTargets(teacher, problem.teacher_temperature, problem.teacher_bias),
        problem.pair_weights,
        student_temperature=problem.student_temperature,
        image_weights=problem.image_weights,
        backend=case.backend,
    )


def _value_faults(case: Case, problem: Problem, got: Outcome) -> list[str]:
    given = (
        problem.student_features,
        problem.teacher_features,
        problem.teacher_bias,
        *(t for p in (problem.student_prototypes, problem.teacher_prototypes) for t in (p.weight, p.magnitude)),
    )
    dense = dense_outcome(problem)
    if not all(bool(value.isfinite().all()) for value in dense.values()):
        # without a pair the library reads nothing, and what the dense formula then gives depends on how it is written
        return (
            []
            if is_finite(*given) or not case.images
            else not_finite_faults(got, {n: v for n, v in dense.items() if n in got})
        )
    exact = problem.to(torch.float64)
    found = _disagreement(exact) if case.images else []
    products = _products(case, problem)
    dense = dense_outcome(problem, products)
    scaled = _unscaled(case, got)
    missing = {name: value for name, value in dense.items() if name not in scaled}  # of what does not learn
    try:
        assert_within_budget(
            {name: scaled.get(name, value) for name, value in dense.items()},
            problem,
            products,
            logit_roundings=ROUNDINGS * _growth(case),
            dense=dense | _in_parts(problem, dense) if case.backend in IN_PARTS and products is None else dense,
        )
    except AssertionError as error:
        found.append(str(error))
    wrong = missing.keys() - set(GRADIENTS)
    return [*found, *(f"{name} is missing" for name in wrong)]


def _products(case: Case, problem: Problem) -> torch.dtype | None:
    """Dtype of a backend's products, where it is narrower than that of the sums."""
    if case.backend == "triton":
        return None if case.dtype == "fp32" else problem.student_features.dtype
    if case.backend in ("native", "auto") and module.native() is not None:
        return products_of(problem, module.instruction_sets()[-1])
    return None


def _growth(case: Case) -> float:
    """How many roundings a sum over the rows takes, in a few partial sums: those of equal terms all fall to one side."""
    return 1 + case.images * max(case.teacher_views, case.student_views) / 8


def _in_parts(problem: Problem, dense: Outcome) -> Outcome:
    """The dense formula with the push from the normaliser summed apart from the pull to the targets, in loss and gradients."""
    dtype = accumulation_dtype(problem.student_features.dtype)
    wide = problem.to(dtype)
    features, stored = wide.student_leaves()
    teacher, of_student = (
        wide.teacher_prototypes,
        (stored.weight, stored.magnitude, stored.kind, wide.student_temperature),
    )
    l_SK = statement_of.logits(features, *of_student)
    of_teacher = teacher.weight, teacher.magnitude, teacher.kind, wide.teacher_temperature
    q_TK = statement_of.logits(wide.teacher_features, *of_teacher, wide.teacher_bias).softmax(dim=1)
    weights = wide.pair_weights.to(dtype), None if wide.image_weights is None else wide.image_weights.to(dtype)
    parts = push_and_pull(l_SK, q_TK, *weights)
    wanted = [leaf for leaf in (features, stored.weight, stored.magnitude) if leaf is not None]
    up, down = (torch.autograd.grad(part, wanted, retain_graph=True) for part in parts)
    given = (problem.student_features, problem.student_prototypes.weight, problem.student_prototypes.magnitude)
    names = [(name, tensor.dtype) for name, tensor in zip(GRADIENTS, given, strict=True) if tensor is not None]
    result = {name: (push - pull).to(kept) for (name, kept), push, pull in zip(names, up, down, strict=True)}
    # the pull as in (3), by the mean prototype of each row's targets
    mass = weights[0].sum() * (len(features) / weights[0].shape[1] if weights[1] is None else weights[1].sum())
    bias_K = statement_of.logits(torch.zeros_like(features[:1]), *of_student)
    biased = (dense["usage"] * bias_K).sum() * mass
    result["loss"] = (parts[0] - (down[0] * features).sum() - biased).detach()
    result["kl"] = dense["kl"] + (result["loss"] - dense["loss"]) / (mass if mass > 0 else 1)
    return result


def _unscaled(case: Case, got: Outcome) -> Outcome:
    """Gradients for an incoming gradient of 1; not of an incoming 0, which leaves zeros."""
    if case.upstream == 1.0:
        return got
    kept = {name: value for name, value in got.items() if name not in GRADIENTS}
    if case.upstream == 0.0:
        wrong = [name for name in got.keys() & set(GRADIENTS) if got[name].any()]
        assert not wrong, f"{wrong} are not 0 for an incoming gradient of 0"
        return kept
    for name in got.keys() & set(GRADIENTS):
        # 16-bit gradients may leave their range when they are scaled, or have too few digits near 0
        if got[name].dtype not in (torch.bfloat16, torch.float16):
            kept[name] = got[name] / case.upstream
    return kept


def _disagreement(exact: Problem) -> list[str]:
    """Where the budget's truth is not that of the formulas."""
    truth, plain, sizes, found = statement(exact), dense_outcome(exact), rounding_sizes(exact), []
    floors = _largest_gradients(exact)
    for name, value in truth.items():
        if value.numel():
            off, allowed = (plain[name] - value).abs().max().item(), AGREEMENT * sizes[name].abs().max().item()
            allowed += FP64_BUDGET * floors.get(name, 0.0)
            if not off <= allowed:
                found.append(f"{name}: the budget's truth is off by {off:.1e}, allowed {allowed:.1e}")
    return found


def _largest_gradients(exact: Problem) -> dict[str, float]:
    """Bounds of what gradients are sums of, before a projection off the prototypes' directions may cancel them."""
    stored = exact.student_prototypes
    weight, norm = statement_of.effective(stored.weight, stored.magnitude, stored.kind)
    length = torch.linalg.vector_norm(stored.weight, dim=1)
    gain = float((norm / torch.where(length > 0, length, torch.inf)).max())
    mass = exact.pair_weights.sum() * (
        len(exact.student_features) if exact.image_weights is None else exact.image_weights.sum()
    )
    each = float(mass) / exact.student_temperature
    row = float(exact.student_features.norm(dim=1).max()) if len(exact.student_features) else 0.0
    return {
        "feature_gradient": each * float(weight.abs().max()),
        "weight_gradient": each * row * gain,
        "magnitude_gradient": each * row,
    }


def _bit_faults(case: Case, problem: Problem, got: Outcome) -> list[str]:
    """Names of values whose bits a second call changes, with as many threads, or for "native" with others."""
    if case.again == "no" or (case.again == "threads" and case.backend != "native"):
        return []
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3 if case.again == "threads" else threads)
        other = _outcome(case, problem)
    finally:
        torch.set_num_threads(threads)
    differ = [name for name in got if not torch.equal(got[name].nan_to_num(nan=7.0), other[name].nan_to_num(nan=7.0))]
    return [f"the bits of {', '.join(differ)} differ ({case.again})"] if differ else []


_CHOICES = choices_of(*FIELDS)
SUBJECTS = {
    "prototype_cross_entropy": Subject(faults, _CHOICES, BACKENDS),
    "matched_prototype_cross_entropy": Subject(
        faults, {n: c for n, c in _CHOICES.items() if n not in ("teacher_views", "student_views", "pairs")}, BACKENDS
    ),
    "target_cross_entropy": Subject(faults, _CHOICES | {"option": ("unstored",)}, BACKENDS),
}
assert CHOICES.keys() >= set(FIELDS)
