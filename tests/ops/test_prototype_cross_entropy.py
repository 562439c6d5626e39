"""The loss, its statistics and its gradients against the dense formula in fp64, within the error budget.

Legend: S / T student / teacher rows, G / V their views, B images, K prototypes, D embedding dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from vmf_kernels import Prototypes, matched_prototype_cross_entropy, prototype_cross_entropy
from vmf_kernels.backends import choice, composed, streaming
from vmf_kernels.backends.composed import Assign, ComposedBackend
from vmf_kernels.backends.contract import Assignment, Query
from vmf_kernels.prototypes import KINDS, Keys, pull_back_to_stored
from vmf_kernels.testing import (
    GRADIENTS,
    Problem,
    assert_within_budget,
    dense_outcome,
    library_outcome,
    random_problem,
)

BACKENDS = ["streaming", "reference"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# images, (teacher views, student views), prototypes, dim: odd rows, either side of tile edges, and none alike
SHAPES = {
    "B0-K127-D24": (0, (2, 3), 127, 24),
    "T1-S1-K1-D2": (1, (1, 1), 1, 2),
    "T63-S1-K127-D24": (1, (63, 1), 127, 24),
    "T1-S63-K1000-D256": (1, (1, 63), 1000, 256),
    "T63-S65-K4099-D24": (1, (63, 65), 4099, 24),
    "T65-S257-K1000-D384": (1, (65, 257), 1000, 384),
    "B32-G2-V10-K127-D256": (32, (2, 10), 127, 256),
}


def dtype_id(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("shape", SHAPES)
def test_loss_and_gradients_match_the_fp64_truth_at_every_shape(shape: str, dtype: torch.dtype, backend: str) -> None:
    images, views, prototypes, dim = SHAPES[shape]
    problem = random_problem(images=images, views=views, prototypes=prototypes, dim=dim, dtype=dtype)
    assert_within_budget(library_outcome(problem, backend), problem)


@pytest.mark.quick
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_match_the_fp64_truth_for_every_kind(kind: str, dtype: torch.dtype, backend: str) -> None:
    problem = random_problem(images=5, views=(2, 6), prototypes=1000, dim=24, kind=kind, dtype=dtype)
    assert_within_budget(library_outcome(problem, backend), problem)


def colder(problem: Problem) -> Problem:
    return replace(problem, student_temperature=0.01, teacher_temperature=0.01)


def with_zero_rows(problem: Problem) -> Problem:
    problem.student_prototypes.weight[::3] = 0
    problem.teacher_prototypes.weight[::5] = 0
    return problem


def with_zero_and_negative_magnitudes(problem: Problem) -> Problem:
    for magnitude in (problem.student_prototypes.magnitude, problem.teacher_prototypes.magnitude):
        assert magnitude is not None
        magnitude[:40] = 0
        magnitude[40:80] *= -1
    return problem


def with_long_prototypes(problem: Problem) -> Problem:
    assert problem.student_prototypes.magnitude is not None
    problem.student_prototypes.magnitude[::2] *= 1e3
    return problem


def with_an_offset_of_500_in_the_bias(problem: Problem) -> Problem:
    assert problem.teacher_bias is not None
    return replace(problem, teacher_bias=problem.teacher_bias + 500)


def with_an_offset_of_500_in_the_logits(problem: Problem) -> Problem:
    """A coordinate that all rows and all prototypes share; features then are no longer of norm 1."""
    for features in (problem.student_features, problem.teacher_features):
        features[:, 0] = 2
    for prototypes, temperature in (
        (problem.student_prototypes, problem.student_temperature),
        (problem.teacher_prototypes, problem.teacher_temperature),
    ):
        prototypes.weight[:, 0] = 500 * temperature / 2
    return problem


def with_a_dominating_prototype(problem: Problem) -> Problem:
    for prototypes, features in (
        (problem.student_prototypes, problem.student_features),
        (problem.teacher_prototypes, problem.teacher_features),
    ):
        prototypes.weight[17] = 100 * features.mean(dim=0)
    return problem


def with_prototypes_left_out(problem: Problem) -> Problem:
    assert problem.teacher_bias is not None
    problem.teacher_bias[::3] = -torch.inf
    return problem


def without_weight(problem: Problem) -> Problem:
    return replace(problem, pair_weights=torch.zeros_like(problem.pair_weights))


HARD = {
    "temperature 0.01": ("weight_norm_vmf", colder),
    "zero rows, linear vmf": ("linear_vmf", with_zero_rows),
    "zero rows, weight norm": ("weight_norm", with_zero_rows),
    "zero rows, weight norm vmf": ("weight_norm_vmf", with_zero_rows),
    "zero rows, normalized": ("normalized", with_zero_rows),
    "magnitudes <= 0": ("weight_norm_vmf", with_zero_and_negative_magnitudes),
    "norms of 1e3": ("weight_norm", with_long_prototypes),
    "norms of 1e3, vmf": ("weight_norm_vmf", with_long_prototypes),
    "bias + 500": ("linear_vmf", with_an_offset_of_500_in_the_bias),
    "logits + 500": ("linear", with_an_offset_of_500_in_the_logits),
    "one dominates": ("linear", with_a_dominating_prototype),
    "bias -inf": ("weight_norm_vmf", with_prototypes_left_out),
    "pair weights 0": ("weight_norm_vmf", without_weight),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("name", HARD)
def test_hard_values_stay_within_the_budget(name: str, dtype: torch.dtype, backend: str) -> None:
    kind, harden = HARD[name]
    problem = harden(random_problem(images=13, views=(2, 5), prototypes=1000, kind=kind, dtype=dtype))
    assert_within_budget(library_outcome(problem, backend), problem)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("features_dtype", DTYPES[1:], ids=dtype_id)
def test_half_precision_features_meet_fp32_prototypes(features_dtype: torch.dtype, backend: str) -> None:
    problem = random_problem(images=5, views=(2, 6), prototypes=1000, dtype=torch.float32)
    rounded = replace(
        problem,
        student_features=problem.student_features.to(features_dtype),
        teacher_features=problem.teacher_features.to(features_dtype),
    )
    assert_within_budget(library_outcome(rounded, backend), rounded)


def rows_apart(x: Tensor) -> Tensor:
    """The same values in rows that are three apart."""
    wide = x.new_full((3 * x.shape[0], x.shape[1] + 1), torch.nan)
    wide[::3, 1:] = x
    return wide[::3, 1:]


def transposed(x: Tensor) -> Tensor:
    """The same values, column-major."""
    return x.T.contiguous().T


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", [rows_apart, transposed])
def test_strides_do_not_matter(layout: Callable[[Tensor], Tensor], backend: str) -> None:
    problem = random_problem(images=5, views=(2, 3), prototypes=1000, dtype=torch.float32)

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
    assert_within_budget(library_outcome(strided, backend), problem)


@pytest.mark.quick
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("views", [(7, 11), (2, 3)], ids=["pairs of rows", "views of images"])
def test_no_element_is_left_unwritten(
    views: tuple[int, int], backend: str, uninitialised_memory_is_nan: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "BLOCK_PROTOTYPES", 300)
    problem = random_problem(images=4, views=views, prototypes=1000, dtype=torch.float32)
    assert_within_budget(library_outcome(problem, backend), problem)


@pytest.mark.quick
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_matched_sibling_pairs_row_with_row(dtype: torch.dtype, backend: str) -> None:
    rows = 65
    problem = random_problem(images=rows, views=(1, 1), prototypes=1000, dtype=dtype)
    problem = replace(problem, pair_weights=torch.ones(1, 1), image_weights=torch.rand(rows))
    features, prototypes = problem.student_leaves()
    assert problem.image_weights is not None
    loss, statistics = matched_prototype_cross_entropy(
        features,
        prototypes,
        problem.teacher_features,
        problem.teacher_prototypes,
        problem.image_weights,
        teacher_bias=problem.teacher_bias,
        backend=backend,
    )
    loss.backward()
    gradients = [
        features.grad,
        prototypes.weight.grad,
        None if prototypes.magnitude is None else prototypes.magnitude.grad,
    ]
    outcome = {"loss": loss.detach()} | vars(statistics)
    outcome |= {name: gradient for name, gradient in zip(GRADIENTS, gradients, strict=True) if gradient is not None}
    assert_within_budget(outcome, problem)


@pytest.mark.parametrize("weighted", [False, True], ids=["images alike", "image weights"])
def test_image_weights_multiply_the_pairs_of_their_image(weighted: bool) -> None:
    problem = random_problem(images=6, views=(2, 4), prototypes=127)
    problem = problem if weighted else replace(problem, image_weights=None)
    assert_within_budget(library_outcome(problem), problem)


def test_loss_is_teacher_entropy_plus_divergence_times_the_weight() -> None:
    problem = random_problem(images=6, views=(2, 4), prototypes=127)
    outcome = library_outcome(problem)
    assert problem.image_weights is not None
    weight = problem.pair_weights.sum() * problem.image_weights.sum()
    error = (weight * (outcome["teacher_entropy"] + outcome["kl"]) / outcome["loss"] - 1).abs().item()
    assert error <= 1e-12, f"relative error {error:.1e}, budget 1e-12"


@pytest.mark.quick
def test_a_student_equal_to_its_teacher_has_no_divergence() -> None:
    problem = random_problem(views=(9, 9), prototypes=127, kind="linear_vmf")
    outcome = library_outcome(
        replace(
            problem,
            teacher_features=problem.student_features,
            teacher_prototypes=problem.student_prototypes,
            teacher_temperature=problem.student_temperature,
            teacher_bias=None,
            pair_weights=torch.eye(9) / 9,
            image_weights=None,
        )
    )
    worst = max(outcome[name].abs().max().item() for name in ("kl", "feature_gradient", "weight_gradient"))
    assert worst <= 1e-12, f"divergence or gradient of {worst:.1e}, budget 1e-12"


def shuffled_values(assign: Assign) -> Assign:
    return lambda queries, values=None, vectors_KD=None, group=None: assign(
        queries, None if values is None else values._replace(weight=values.weight.roll(1, 0)), vectors_KD, group
    )


def dropped_key_bias(assign: Assign) -> Assign:
    return lambda queries, values=None, vectors_KD=None, group=None: assign(
        [query._replace(keys=query.keys._replace(bias=None)) for query in queries], values, vectors_KD, group
    )


def permuted_prototypes(assign: Assign) -> Assign:
    return lambda queries, values=None, vectors_KD=None, group=None: assign(
        [queries[0]._replace(keys=queries[0].keys._replace(weight=queries[0].keys.weight.flip(0))), *queries[1:]],
        values,
        vectors_KD,
        group,
    )


def dropped_column_sums(assign: Assign) -> Assign:
    return lambda queries, values=None, vectors_KD=None, group=None: assign(
        [query._replace(sums=None if query.sums is None else query.sums.clone()) for query in queries],
        values,
        vectors_KD,
        group,
    )


def bfloat16_features(assign: Assign) -> Assign:
    return lambda queries, values=None, vectors_KD=None, group=None: assign(
        [query._replace(rows=query.rows.bfloat16().to(query.rows.dtype)) for query in queries],
        values,
        vectors_KD,
        group,
    )


def one_wrong_row(assign: Assign) -> Assign:
    """The last row of the gradient at the prototypes lost, as by a block one short."""

    def broken(
        queries: list[Query],
        values: Keys | None = None,
        vectors_KD: Tensor | None = None,
        group: ProcessGroup | None = None,
    ) -> list[Assignment]:
        result = assign(queries, values, vectors_KD, group)
        if vectors_KD is not None:
            vectors_KD[-1] = 0
        return result

    return broken


BROKEN = [
    shuffled_values,
    dropped_key_bias,
    permuted_prototypes,
    dropped_column_sums,
    bfloat16_features,
    one_wrong_row,
]


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=dtype_id)
@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_backend_fails_the_budget(
    broken: Callable[[Assign], Assign], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control."""
    problem = random_problem(images=3, views=(2, 5), prototypes=127, dim=24, dtype=dtype)
    damaged = ComposedBackend(broken(streaming.assign), streaming.column_log_sum_exp)
    monkeypatch.setitem(choice.BACKENDS, "streaming", damaged)
    with pytest.raises(AssertionError, match=r"error .*, budget"):
        assert_within_budget(library_outcome(problem, "streaming"), problem)


def test_a_lost_gradient_of_the_normaliser_fails_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: beta, equation (6), replaced by zeros; only the gradient at the prototypes can tell."""
    monkeypatch.setattr(
        composed, "pull_back_to_stored", lambda p, t, gradient, beta: pull_back_to_stored(p, t, gradient, 0 * beta)
    )
    problem = random_problem(images=3, views=(2, 5), prototypes=127, kind="linear_vmf", dtype=torch.float32)
    with pytest.raises(AssertionError, match="weight_gradient: largest error"):
        assert_within_budget(library_outcome(problem, "streaming"), problem)


@pytest.mark.parametrize("name", list(dense_outcome(random_problem(prototypes=3, dim=2))))
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_the_budget_of_every_quantity_is_a_few_roundings_and_refuses_nan(name: str, dtype: torch.dtype) -> None:
    """Negative control: the dense result itself passes, off by a hundred roundings or NaN in one element it does not."""
    problem = random_problem(images=3, views=(2, 5), prototypes=127, dtype=dtype)
    outcome = dense_outcome(problem)
    assert_within_budget(outcome, problem)
    step = 1e-10 if dtype == torch.float64 else 100 * torch.finfo(outcome[name].dtype).eps
    for change in (1 + step, torch.nan):
        off = outcome[name].clone()
        off.view(-1)[off.abs().argmax()] *= change
        with pytest.raises(AssertionError, match=name):
            assert_within_budget(outcome | {name: off}, problem)


def test_no_backend_is_asked_by_the_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "BACKENDS", dict.fromkeys(choice.BACKENDS))
    problem = random_problem(prototypes=127)
    assert torch.isfinite(dense_outcome(problem)["loss"])
    with pytest.raises(AttributeError, match="'NoneType' object has no attribute 'unsupported'"):
        prototype_cross_entropy(
            problem.student_features,
            problem.student_prototypes,
            problem.teacher_features,
            problem.teacher_prototypes,
            problem.pair_weights,
        )
