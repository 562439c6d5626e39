"""The native backend against the fp64 truth, on every instruction set of the machine.

Legend: S / T student / teacher rows, G / V their views, B images, R rows of either, K prototypes, D embedding dim.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.backends.native_calls import HERE, Damage, check, check_log_sums, damaged, products_of
from tests.ops.test_prototype_cross_entropy import HARD, rows_apart, transposed
from vmf_kernels import Prototypes, linear_prototypes, prototype_usage
from vmf_kernels.backends.native import module, operator, scores
from vmf_kernels.ops.assignments import column_log_sum_exp, row_log_sum_exp
from vmf_kernels.prototypes import KINDS, LOWEST_BIAS
from vmf_kernels.testing import GRADIENTS, Outcome, Problem, assert_within_budget, library_outcome, random_problem

pytestmark = pytest.mark.skipif(module.native() is None, reason="vmf_kernels._native was not built")

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = {"fp32": FP32, "bf16": BF16, "fp16": FP16}
# images, (teacher views, student views), prototypes, dim: either side of vectors, tiles, blocks and parts, and none alike
SHAPES = {
    "B0-K127-D24": (0, (2, 3), 127, 24),
    "T1-S1-K1-D2": (1, (1, 1), 1, 2),
    "T63-S1-K127-D24": (1, (63, 1), 127, 24),
    "T1-S65-K1000-D256": (1, (1, 65), 1000, 256),
    "T63-S65-K4099-D24": (1, (63, 65), 4099, 24),
    "T65-S257-K1000-D384": (1, (65, 257), 1000, 384),
    "B32-G2-V10-K127-D256": (32, (2, 10), 127, 256),
    "B17-G2-V3-K1000-D100": (17, (2, 3), 1000, 100),
    "B257-G1-V1-K127-D2": (257, (1, 1), 127, 2),
    "B65-G1-V1-K4099-D100": (65, (1, 1), 4099, 100),
}


def problem_of(shape: str, dtype: torch.dtype) -> Problem:
    images, views, prototypes, dim = SHAPES[shape]
    return random_problem(images=images, views=views, prototypes=prototypes, dim=dim, dtype=dtype)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_matches_the_fp64_truth(shape: str, isa: str, uninitialised_memory_is_nan: None) -> None:
    check(problem_of(shape, FP32), isa)


@pytest.mark.parametrize(
    "isa", [name for name in module.WITH_BF16 if name in HERE] or module.WITH_BF16[:1], indirect=True
)
@pytest.mark.parametrize("shape", SHAPES)
def test_bf16_products_match_the_fp64_truth_at_every_shape(
    shape: str, isa: str, uninitialised_memory_is_nan: None
) -> None:
    check(problem_of(shape, BF16), isa)


def test_few_draws_of_single_rows_are_beyond_the_budget(isa: str) -> None:
    """Whose dense formula is a dot product in several short sums; one draw in twelve may be that formula's good luck."""
    beyond = []
    for seed in range(12):
        torch.manual_seed(seed)
        try:
            check(random_problem(views=(1, 1), prototypes=1000, dim=384, dtype=FP32), isa)
        except AssertionError as error:
            beyond.append(f"{seed}: {error}")
    assert len(beyond) <= 1, f"{len(beyond)} of 12 draws: {'; '.join(beyond)}"


@pytest.mark.parametrize(
    ("kind", "dtype", "views"),
    [
        *((kind, "fp32", (2, 4)) for kind in KINDS),
        *(("weight_norm_vmf", dtype, (1, 1)) for dtype in DTYPES),
        ("linear", "bf16", (2, 4)),
    ],
)
def test_every_kind_and_dtype_matches_the_fp64_truth(kind: str, dtype: str, views: tuple[int, int], isa: str) -> None:
    check(random_problem(images=7, views=views, prototypes=301, dim=40, kind=kind, dtype=DTYPES[dtype]), isa)


def in_dtypes(
    problem: Problem, students: torch.dtype, teachers: torch.dtype, ours: torch.dtype, theirs: torch.dtype
) -> Problem:
    """Student's and teacher's features, then their prototypes, each rounded to a dtype of its own."""
    student, teacher = problem.to(ours).student_prototypes, problem.to(theirs).teacher_prototypes
    problem = replace(problem, student_prototypes=student, teacher_prototypes=teacher)
    x_SD, x_TD = problem.student_features.to(students), problem.teacher_features.to(teachers)
    return replace(problem, student_features=x_SD, teacher_features=x_TD)


MIXTURES = {
    "bf16 prototypes": (FP32, FP32, BF16, BF16),
    "fp16 prototypes": (FP32, FP32, FP16, FP16),
    "bf16 features": (BF16, BF16, FP32, FP32),
    "fp16 features": (FP16, FP16, FP32, FP32),
    "bf16 features, fp16 prototypes": (BF16, BF16, FP16, FP16),
    "fp32 student, bf16 teacher": (FP32, BF16, FP32, BF16),
    "bf16 student, fp32 teacher": (BF16, FP32, BF16, FP32),
    "bf16 student, fp16 teacher": (BF16, FP16, FP16, BF16),
    "bf16 features, fp32 student, bf16 teacher": (BF16, BF16, FP32, BF16),
}


@pytest.mark.quick
@pytest.mark.parametrize("mixture", MIXTURES)
def test_dtypes_may_be_mixed(mixture: str, isa: str) -> None:
    problem = random_problem(images=5, views=(2, 6), prototypes=1000, dim=24, dtype=FP32)
    check(in_dtypes(problem, *MIXTURES[mixture]), isa)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])  # fp16 becomes fp32 before the module sees it
@pytest.mark.parametrize("name", HARD)
def test_hard_values_stay_within_the_budget(name: str, dtype: str, isa: str) -> None:
    kind, harden = HARD[name]
    problem = random_problem(images=13, views=(2, 5), prototypes=1000, dim=24, kind=kind, dtype=DTYPES[dtype])
    check(harden(problem), isa)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("layout", [rows_apart, transposed])
def test_strides_do_not_matter(layout: Callable[[Tensor], Tensor], dtype: str, isa: str) -> None:
    problem = random_problem(images=5, views=(2, 3), prototypes=301, dim=24, dtype=DTYPES[dtype])

    def relaid(prototypes: Prototypes) -> Prototypes:
        assert prototypes.magnitude is not None
        return replace(prototypes, weight=layout(prototypes.weight), magnitude=layout(prototypes.magnitude))

    strided = replace(
        problem,
        student_features=layout(problem.student_features),
        student_prototypes=relaid(problem.student_prototypes),
        teacher_features=layout(problem.teacher_features),
        teacher_prototypes=relaid(problem.teacher_prototypes),
        pair_weights=layout(problem.pair_weights),
    )
    assert not strided.student_prototypes.weight.is_contiguous()
    assert_within_budget(library_outcome(strided, "native"), problem, products_of(problem, isa))


@pytest.mark.parametrize(
    ("rows", "prototypes", "dim", "kind", "dtype"),
    [
        *((65, 1000, 24, kind, "fp32") for kind in KINDS),
        *((*size, "weight_norm_vmf", dtype) for size in ((1, 1, 2), (17, 4099, 100)) for dtype in DTYPES),
    ],
)
def test_usage_and_log_sums_match_the_dense_formula(
    rows: int, prototypes: int, dim: int, kind: str, dtype: str, isa: str, uninitialised_memory_is_nan: None
) -> None:
    problem = random_problem(views=(1, rows), prototypes=prototypes, dim=dim, kind=kind, dtype=DTYPES[dtype])
    assert problem.teacher_bias is not None
    check_log_sums(problem.student_features, problem.student_prototypes, problem.teacher_bias, isa)


@pytest.mark.parametrize("part", ["rows", "prototypes"])
def test_one_rounding_to_bf16_fails_the_budget_of_log_sums(
    part: str, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control of the one above."""
    problem = random_problem(views=(1, 65), prototypes=1000, dim=24, dtype=FP32)
    x, prototypes = problem.student_features, problem.student_prototypes
    assert problem.teacher_bias is not None
    fp32 = module.fp32

    def rounded_keys(*arguments: Any) -> Any:
        made = scores.native_keys(*arguments)
        return made._replace(weight=made.weight.bfloat16())

    if part == "prototypes":
        monkeypatch.setattr(operator, "native_keys", rounded_keys)
    else:
        monkeypatch.setattr(module, "fp32", lambda values: fp32(values).bfloat16().float())
    with pytest.raises(AssertionError, match=r"error .* nats, budget"):
        check_log_sums(x, prototypes, problem.teacher_bias, isa)


@pytest.mark.quick
def test_no_rows_give_no_row_sums_and_empty_column_sums(isa: str) -> None:
    none, prototypes = torch.empty(0, 4), linear_prototypes(torch.randn(5, 4))
    rows = row_log_sum_exp(none, prototypes, 0.1, backend="native")
    columns = column_log_sum_exp(none, prototypes, 0.1, rows, backend="native")
    assert (rows.shape, columns.tolist()) == ((0,), [-torch.inf] * 5)


@pytest.mark.parametrize("left_out", [slice(0, 2000), slice(2000, 4099), slice(0, 4098), slice(1, 4099)], ids=str)
def test_left_out_prototypes_weigh_nothing(left_out: slice, isa: str) -> None:
    """Whole parts of the prototypes, and all but one."""
    problem = random_problem(views=(9, 9), prototypes=4099, dim=24, dtype=FP32)
    x, all_of_them, bias = problem.teacher_features, problem.teacher_prototypes, problem.teacher_bias
    assert bias is not None
    assert all_of_them.magnitude is not None
    bias[left_out] = LOWEST_BIAS
    kept = torch.ones(4099, dtype=torch.bool)
    kept[left_out] = False
    fewer = Prototypes(all_of_them.weight[kept], all_of_them.magnitude[kept], all_of_them.kind)
    usage = prototype_usage(x, all_of_them, 0.04, bias, backend="native")
    expected = prototype_usage(x, fewer, 0.04, bias[kept], backend="native")
    assert not usage[left_out].any(), "a prototype that is left out is used"
    torch.testing.assert_close(usage[kept], expected, rtol=2e-5, atol=1e-8)
    rows, expected_rows = (
        row_log_sum_exp(x, p, 0.04, b, backend="native") for p, b in ((all_of_them, bias), (fewer, bias[kept]))
    )
    torch.testing.assert_close(rows, expected_rows, rtol=1e-5, atol=1e-5)


@pytest.mark.quick
@pytest.mark.parametrize("wanted", ["features", "prototypes", "neither", "no grad"])
@pytest.mark.parametrize("kind", ["linear", "weight_norm_vmf"])
def test_only_the_gradients_that_are_wanted_are_formed(kind: str, wanted: str, isa: str) -> None:
    problem = random_problem(images=3, views=(2, 3), prototypes=1000, dim=24, kind=kind, dtype=FP32)
    complete = library_outcome(problem, "native")
    features, prototypes = problem.student_leaves()
    features = features if wanted in ("features", "no grad") else features.detach()
    prototypes = prototypes if wanted in ("prototypes", "no grad") else prototypes.detach()
    asked: list[bool] = []

    def ask(name: str, arguments: dict[str, Any]) -> None:
        if name == "Gather":
            asked.append(arguments.get("weight_gradient") is not None)

    with damaged(ask), torch.set_grad_enabled(wanted != "no grad"):
        loss, statistics = problem.cross_entropy(features, prototypes, "native")
    assert asked == [wanted == "prototypes"], "the sums over rows for the prototypes' gradient are formed"
    assert torch.equal(loss.detach(), complete["loss"])
    assert torch.equal(statistics.usage, complete["usage"])
    leaves = {"features": (features,), "prototypes": (prototypes.weight, prototypes.magnitude)}.get(wanted)
    assert loss.requires_grad == (leaves is not None)
    names = GRADIENTS[:1] if wanted == "features" else GRADIENTS[1:]
    for leaf, name in zip(leaves or (), names, strict=False):
        if leaf is not None:
            (gradient,) = torch.autograd.grad(3 * loss, leaf, retain_graph=True)
            assert torch.equal(gradient, 3 * complete[name]), f"{name} differs from the one formed with the others"


def changed_quantities(one: Outcome, other: Outcome) -> list[str]:
    return [name for name in one if not torch.equal(one[name], other[name])]


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_any_number_of_threads_gives_the_same_bits(
    dtype: torch.dtype, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = random_problem(images=9, views=(2, 5), prototypes=4099, dim=100, dtype=dtype)
    room, give = {1: 0, 2: 0, 3: 0}, module.workspace

    def measured(bytes_needed: int) -> tuple[Tensor, int]:
        room[torch.get_num_threads()] += bytes_needed
        return give(bytes_needed)

    monkeypatch.setattr(module, "workspace", measured)
    outcomes = []
    for threads in room:
        torch.set_num_threads(threads)
        outcomes.append(library_outcome(problem, "native"))
    assert room[1] < room[2] < room[3], f"no thread has a workspace of its own: {room} bytes"
    for threads, outcome in zip(room, outcomes, strict=True):
        changed = changed_quantities(outcomes[0], outcome)
        assert not changed, f"{changed} with {threads} threads differ from those with one"


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_a_repeat_is_bitwise_equal(dtype: torch.dtype, isa: str) -> None:
    torch.set_num_threads(2)
    problem = random_problem(images=9, views=(2, 5), prototypes=4099, dim=24, dtype=dtype)
    first, second = (library_outcome(problem, "native") for _ in range(2))
    changed = changed_quantities(first, second)
    assert not changed, f"{changed} differ on repeat"


def test_another_order_of_the_images_changes_bits(isa: str) -> None:
    """Negative control of the two above: sums over rows in another order are not equal."""
    problem = random_problem(images=9, views=(2, 5), prototypes=4099, dim=24, dtype=FP32)
    assert problem.image_weights is not None
    other = replace(
        problem,
        student_features=problem.student_features.view(5, 9, 24).roll(1, 1).flatten(0, 1),
        teacher_features=problem.teacher_features.view(2, 9, 24).roll(1, 1).flatten(0, 1),
        image_weights=problem.image_weights.roll(1, 0),
    )
    assert "weight_gradient" in changed_quantities(library_outcome(problem, "native"), library_outcome(other, "native"))


def test_one_compiled_graph_equals_eager(isa: str) -> None:
    problem = random_problem(images=2, views=(2, 3), prototypes=40, dim=16, dtype=FP32)

    def loss(features: Tensor) -> Tensor:
        return problem.cross_entropy(features, problem.student_prototypes, "native").loss

    features = problem.student_features.clone().requires_grad_()
    torch.compiler.reset()
    compiled, eager = torch.compile(loss, fullgraph=True, backend="aot_eager")(features), loss(features)
    assert torch.equal(compiled, eager)
    assert torch.equal(torch.autograd.grad(compiled, features)[0], torch.autograd.grad(eager, features)[0])


def no_magnitude(name: str, arguments: dict[str, Any]) -> None:
    if name == "Score":
        arguments["magnitude"] = None


def no_bias(name: str, arguments: dict[str, Any]) -> None:
    if name == "Score":
        arguments["bias"] = None


def all_images_alike(name: str, arguments: dict[str, Any]) -> None:
    if name == "Gather":
        arguments["image_weights"] = None


def students_as_their_own_teachers(name: str, arguments: dict[str, Any]) -> None:
    if name == "Gather":
        arguments["teacher_column"] = 0


def no_slope_of_the_normaliser(name: str, arguments: dict[str, Any]) -> None:
    if name == "PullBack":
        arguments["slope"] = None


def no_pull_back(name: str, arguments: dict[str, Any]) -> None:
    if name == "Gather":
        arguments["pull_back"] = None


def another_scale(name: str, arguments: dict[str, Any]) -> None:
    if name == "Gather":
        arguments["scale"] *= 1.1


DAMAGES = [
    no_magnitude,
    no_bias,
    all_images_alike,
    students_as_their_own_teachers,
    no_slope_of_the_normaliser,
    no_pull_back,
    another_scale,
]


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_call_fails_the_budget(damage: Damage, dtype: torch.dtype, isa: str) -> None:
    """Negative control."""
    problem = random_problem(images=6, views=(2, 4), prototypes=127, dim=24, dtype=dtype)
    with damaged(damage), pytest.raises(AssertionError, match=r"error .*, budget"):
        check(problem, isa)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_permuted_teacher_rows_fail_the_budget(dtype: torch.dtype, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: the student's rows are scored first, then the teacher's."""
    calls, kept = itertools.count(), []

    def permuted(rows: Tensor, *rest: Any) -> Any:
        kept.append(rows.roll(next(calls) % 2, 0).contiguous())  # the task points to them
        return scores.score_task(kept[-1], *rest)

    monkeypatch.setattr(operator, "score_task", permuted)
    with pytest.raises(AssertionError, match=r"error .*, budget"):
        check(random_problem(images=6, views=(2, 4), prototypes=127, dim=24, dtype=dtype), isa)
    assert next(calls) == 2


def test_an_undamaged_call_passes(isa: str) -> None:
    """Negative control of the ones above: what they patch changes nothing by itself."""
    with damaged(lambda name, arguments: None) as names:
        check(random_problem(images=6, views=(2, 4), prototypes=127, dim=24, dtype=FP32), isa)
    assert sorted(names) == ["Gather", "PullBack", "Score", "Score"]
