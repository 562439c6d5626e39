"""The Triton backend against the fp64 truth, on the CPU under Triton's interpreter.

Shapes are small and the tiles of the interpreter smaller, so that every loop runs more than once and every edge is ragged.

Legend: S / T student / teacher rows, G / V their views, B images, K prototypes, D embedding dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.backends.interpreted import Damage, correct_bf16, damaged
from tests.ops.test_prototype_cross_entropy import HARD
from vmf_kernels import linear_prototypes, prototype_cross_entropy, prototype_usage
from vmf_kernels.backends import choice
from vmf_kernels.backends.triton import launch, tiles
from vmf_kernels.backends.triton.prototypes import scale_in_place
from vmf_kernels.backends.triton.tiles import Tile
from vmf_kernels.ops import prototype_cross_entropy as operator_module
from vmf_kernels.ops.assignments import column_log_sum_exp, row_log_sum_exp
from vmf_kernels.prototypes import KINDS
from vmf_kernels.testing import Problem, assert_within_budget, library_outcome, random_problem

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on the GPU here: tests/gpu"),
    # padding has weight 0, whose logarithm is meant to be -inf
    pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning", "ignore:invalid value:RuntimeWarning"),
]

# images, (teacher views, student views), prototypes, dim
SHAPES = {
    "B0-K127-D24": (0, (2, 3), 127, 24),
    "T1-S1-K1-D2": (1, (1, 1), 1, 2),
    "T63-S1-K127-D24": (1, (63, 1), 127, 24),
    "T1-S33-K130-D256": (1, (1, 33), 130, 256),
    "T1-S3-K1025-D24": (1, (1, 3), 1025, 24),
    "T5-S17-K65-D384": (1, (5, 17), 65, 384),
    "B9-G2-V10-K127-D48": (9, (2, 10), 127, 48),
    "B17-G1-V1-K65-D200": (17, (1, 1), 65, 200),
    "T2-S3-K33-D1000": (1, (2, 3), 33, 1000),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_fp32_matches_the_fp64_truth_at_every_shape(shape: str, uninitialised_memory_is_nan: None) -> None:
    images, views, prototypes, dim = SHAPES[shape]
    problem = random_problem(images=images, views=views, prototypes=prototypes, dim=dim, dtype=torch.float32)
    assert_within_budget(library_outcome(problem, "triton"), problem)


@pytest.mark.parametrize(
    ("kind", "dtype", "views"),
    [
        *(pytest.param(kind, torch.float32, (2, 4), marks=pytest.mark.quick) for kind in KINDS[-1:]),
        *((kind, torch.float32, (2, 4)) for kind in KINDS[:-1]),
        *((kind, torch.bfloat16, (1, 1)) for kind in KINDS),
        *(("weight_norm_vmf", torch.float16, views) for views in ((2, 4), (1, 1))),
    ],
)
def test_every_kind_and_dtype_matches_the_fp64_truth(kind: str, dtype: torch.dtype, views: tuple[int, int]) -> None:
    problem = random_problem(images=7, views=views, prototypes=127, dim=40, kind=kind, dtype=dtype)
    products = None if dtype == torch.float32 else dtype
    with correct_bf16():
        outcome = library_outcome(problem, "triton")
    # numpy forms the interpreter's products, which round otherwise on every kind of CPU
    assert_within_budget(outcome, problem, products, logit_roundings=2)


@pytest.mark.parametrize("hard", HARD)
def test_hard_values_match_the_fp64_truth(hard: str) -> None:
    kind, change = HARD[hard]
    problem = change(random_problem(images=3, views=(2, 5), prototypes=127, dim=24, kind=kind, dtype=torch.float32))
    assert_within_budget(library_outcome(problem, "triton"), problem)


@pytest.mark.parametrize("views", [(2, 4), (1, 1)], ids=["views", "one to one"])
def test_bf16_prototypes_and_fp32_features_meet(views: tuple[int, int]) -> None:
    problem = random_problem(images=5, views=views, prototypes=127, dim=24, dtype=torch.bfloat16)
    problem = replace(
        problem, student_features=problem.student_features.float(), teacher_features=problem.teacher_features.float()
    )
    with correct_bf16():
        outcome = library_outcome(problem, "triton")
    assert_within_budget(outcome, problem)


def test_rows_of_two_dtypes_are_multiplied_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = random_problem(images=3, views=(2, 4), prototypes=127, dim=24, dtype=torch.float32)
    problem = replace(problem, student_features=problem.student_features.half())
    outcome, expected = library_outcome(problem, "triton"), library_outcome(problem, "reference")
    error = (outcome["weight_gradient"] - expected["weight_gradient"]).abs().max().item()
    assert error <= 1e-6, f"error {error:.1e}, budget 1e-6"
    # what decides whether the kernels serve them is that dtype too
    asked: list[torch.dtype] = []

    def recorded(name: str, rows: Tensor, *weights: Tensor) -> Any:
        asked.append(rows.dtype)
        return choice.choose_backend(name, rows, *weights)

    monkeypatch.setattr(operator_module, "choose_backend", recorded)
    library_outcome(problem, "streaming")
    assert asked == [torch.float32]


def small_weights(problem: Problem) -> Problem:
    return replace(problem, pair_weights=problem.pair_weights * 1e-6)


def one_heavy_image(problem: Problem) -> Problem:
    assert problem.image_weights is not None
    problem.image_weights[1:] *= 1e-5
    return problem


@pytest.mark.parametrize("views", [(2, 4), (1, 1)], ids=["views", "one to one"])
@pytest.mark.parametrize("change", [small_weights, one_heavy_image])
def test_fp16_keeps_probabilities_in_range(change: Callable[[Problem], Problem], views: tuple[int, int]) -> None:
    """A weighted probability of 1e-10 would be 0 in fp16, one of 1e5 infinite."""
    problem = random_problem(images=7, views=views, prototypes=300, dim=24, kind="linear_vmf", dtype=torch.float32)
    problem = change(problem.to(torch.float16))
    assert_within_budget(library_outcome(problem, "triton"), problem, torch.float16)


@pytest.mark.parametrize("images", [0, 3])
@pytest.mark.parametrize("views", [(2, 4), (1, 1)], ids=["views", "one to one"])
def test_no_pair_with_weight_is_no_loss_in_fp16(views: tuple[int, int], images: int) -> None:
    problem = random_problem(images=images, views=views, prototypes=40, dim=24, dtype=torch.float16)
    outcome = library_outcome(replace(problem, pair_weights=0 * problem.pair_weights), "triton")
    nonzero = [name for name, value in outcome.items() if value.any()]
    assert not nonzero, f"{nonzero} are not 0"


TILES = {
    "parts": {"student": Tile(16, 32, parts=2), "teacher": Tile(16, 32, parts=2), "columns": Tile(16, 32, parts=2)},
    "descriptors": {name: replace(tile, tma=True) for name, tile in tiles.INTERPRETER_TILES.items()},
    "wide rows": {"student": Tile(64, 16), "teacher": Tile(16, 64), "columns": Tile(64, 64), "scores": Tile(16, 16)},
}


@pytest.mark.parametrize("views", [(2, 5), (1, 1)], ids=["views", "one to one"])
@pytest.mark.parametrize("name", TILES)
def test_every_way_to_tile_matches_the_fp64_truth(
    name: str, views: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "INTERPRETER_TILES", TILES[name] | {"scores": Tile(32, 32)})
    problem = random_problem(images=9, views=views, prototypes=127, dim=60, dtype=torch.float32)
    assert_within_budget(library_outcome(problem, "triton"), problem)


@pytest.mark.parametrize("multiprocessors", [1, 3, 40])
def test_every_number_of_splits_matches_the_fp64_truth(multiprocessors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "target_of", lambda device: launch.Target(launch.INTERPRETER_ARCH, multiprocessors))
    problem = random_problem(images=2, views=(2, 3), prototypes=500, dim=24, dtype=torch.float32)
    assert_within_budget(library_outcome(problem, "triton"), problem)


def shuffle(tensor: Tensor) -> None:
    tensor.copy_(tensor.roll(1, 0))


def values_of_the_wrong_prototypes(kernel: str, arguments: list[Any], options: dict[str, Any]) -> None:
    if kernel == "assign_rows_kernel" and options["VALUES"] == "own":
        arguments[2] = arguments[2].roll(1, 0)


def no_teacher_bias(kernel: str, arguments: list[Any], options: dict[str, Any]) -> None:
    if kernel == "assign_rows_kernel" and options["VALUES"] == "own":
        arguments[3] = arguments[3] * 0


def no_expected_bias(kernel: str, arguments: list[Any], options: dict[str, Any]) -> None:
    if kernel == "assign_rows_kernel":
        options["HAS_VALUE_BIAS"] = False


def a_lost_split(kernel: str, arguments: list[Any], options: dict[str, Any]) -> None:
    if kernel in ("merge_kernel", "finish_students_kernel"):
        arguments[0][0, -1] = -1e38


def a_lost_block_of_rows(kernel: str, arguments: list[Any], options: dict[str, Any]) -> None:
    if kernel == "gather_columns_kernel":
        arguments[16] -= options["N_ROWS"]


def cotangents_of_the_wrong_rows(kernel: str, arguments: list[Any], options: dict[str, Any]) -> None:
    if kernel == "gather_columns_kernel":
        arguments[4] = arguments[4].roll(1, 0)


def no_gradient_of_the_normaliser(kernel: str, arguments: list[Any], options: dict[str, Any]) -> None:
    if kernel == "pull_back_kernel":
        arguments[3] = arguments[3] * 0


def a_coarse_expansion(kernel: str, arguments: list[Any], options: dict[str, Any]) -> None:
    if kernel == "pack_networks_kernel":
        options["COEFFICIENTS"] = tuple(0.0 for _ in options["COEFFICIENTS"])


DAMAGES = [
    values_of_the_wrong_prototypes,
    no_teacher_bias,
    no_expected_bias,
    a_lost_split,
    a_lost_block_of_rows,
    cotangents_of_the_wrong_rows,
    no_gradient_of_the_normaliser,
    a_coarse_expansion,
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_launch_fails_the_budget(damage: Damage) -> None:
    """Negative control."""
    problem = random_problem(images=6, views=(2, 4), prototypes=127, dim=24, dtype=torch.float32)
    with damaged(damage), pytest.raises(AssertionError, match=r"error .*, budget"):
        assert_within_budget(library_outcome(problem, "triton"), problem)


def test_an_undamaged_launch_passes() -> None:
    """Negative control of the one above: what it patches changes nothing by itself."""
    problem = random_problem(images=6, views=(2, 4), prototypes=127, dim=24, dtype=torch.float32)
    with damaged(lambda kernel, arguments, options: None) as names:
        assert_within_budget(library_outcome(problem, "triton"), problem)
    assert len(names) == 9, f"launched {names}"


@pytest.mark.quick
def test_forward_and_backward_are_nine_launches() -> None:
    """Seven up to the loss, two for the gradient at the prototypes; scaling on a GPU adds one for each gradient."""
    problem = random_problem(images=2, views=(2, 3), prototypes=127, dim=24, dtype=torch.float32)
    with damaged(lambda kernel, arguments, options: None) as names:
        library_outcome(problem, "triton")
    assert names == [
        "pack_networks_kernel",
        "pack_rows_kernel",
        "assign_rows_kernel",
        "merge_kernel",
        "assign_rows_kernel",
        "finish_students_kernel",
        "sum_losses_kernel",
        "gather_columns_kernel",
        "pull_back_kernel",
    ]


@pytest.mark.parametrize("wanted", ["features", "prototypes", "neither"])
def test_only_the_gradients_that_are_wanted_are_formed(wanted: str) -> None:
    problem = random_problem(images=3, views=(2, 3), prototypes=127, dim=24, dtype=torch.float32)
    complete = library_outcome(problem, "triton")
    features, prototypes = problem.student_leaves()
    if wanted != "features":
        features = features.detach()
    if wanted != "prototypes":
        prototypes = prototypes.detach()
    loss, statistics = problem.cross_entropy(features, prototypes, "triton")
    assert torch.equal(loss.detach(), complete["loss"])
    torch.testing.assert_close(statistics.usage, complete["usage"], rtol=1e-6, atol=1e-9)
    if wanted == "neither":
        assert not loss.requires_grad
        return
    leaf, name = (features, "feature_gradient") if wanted == "features" else (prototypes.weight, "weight_gradient")
    assert torch.equal(torch.autograd.grad(3 * loss, leaf)[0], 3 * complete[name])


@pytest.mark.parametrize("factor", [1.0, 3.0, 0.0])
def test_gradients_are_scaled_in_place(factor: float) -> None:
    gradient = torch.randn(77, 129)
    expected = gradient * factor
    assert scale_in_place(gradient, torch.tensor(factor)) is gradient
    assert torch.equal(gradient, expected)


def test_a_repeat_is_bitwise_equal() -> None:
    problem = random_problem(images=6, views=(2, 4), prototypes=300, dim=24, dtype=torch.float16)
    first, second = (library_outcome(problem, "triton") for _ in range(2))
    changed = [name for name in first if not torch.equal(first[name], second[name])]
    assert not changed, f"{changed} differ on repeat"


@pytest.mark.parametrize("layout", [lambda x: x.T.contiguous().T, lambda x: x.repeat(1, 2)[:, : x.shape[1]]])
def test_strides_do_not_matter(layout: Callable[[Tensor], Tensor]) -> None:
    problem = random_problem(images=6, views=(2, 4), prototypes=127, dim=24, dtype=torch.float32)
    strided = replace(
        problem,
        student_features=layout(problem.student_features),
        teacher_features=layout(problem.teacher_features),
        student_prototypes=replace(problem.student_prototypes, weight=layout(problem.student_prototypes.weight)),
        pair_weights=layout(problem.pair_weights),
    )
    expected, got = library_outcome(problem, "triton"), library_outcome(strided, "triton")
    changed = [name for name in expected if not torch.equal(expected[name], got[name])]
    assert not changed, f"{changed} differ"


@pytest.mark.parametrize(
    ("rows", "prototypes", "dim", "dtype"),
    [
        (1, 1, 2, torch.float32),
        (63, 127, 24, torch.float32),
        (63, 127, 24, torch.float16),
        (17, 300, 96, torch.float16),
    ],
)
def test_usage_and_log_sums_follow_the_reference(rows: int, prototypes: int, dim: int, dtype: torch.dtype) -> None:
    problem = random_problem(views=(rows, rows), prototypes=prototypes, dim=dim, dtype=dtype)
    x, p, offset = problem.teacher_features, problem.teacher_prototypes, torch.randn(rows)
    tolerance = 2e-6 if dtype == torch.float32 else 4e-3

    def results(backend: str) -> list[Tensor]:
        usage = prototype_usage(x, p, 0.07, problem.teacher_bias, backend=backend)
        rows_ = row_log_sum_exp(x, p, 0.07, backend=backend)
        return [usage * prototypes, rows_, column_log_sum_exp(x, p, 0.07, offset, backend=backend)]

    for name, got, expected in zip(("usage", "rows", "columns"), results("triton"), results("reference"), strict=True):
        assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
        error = ((got - expected).abs() / (1 + expected.abs())).max().item()
        assert error <= tolerance, f"{name}: relative error {error:.1e}, budget {tolerance:.0e}"


def test_column_log_sum_of_no_rows_is_minus_infinity() -> None:
    got = column_log_sum_exp(
        torch.empty(0, 4), linear_prototypes(torch.randn(5, 4)), 0.1, torch.empty(0), backend="triton"
    )
    assert got.tolist() == [-torch.inf] * 5


def test_opcheck_and_fullgraph_compile() -> None:
    problem = random_problem(images=2, views=(2, 3), prototypes=40, dim=16, dtype=torch.float32)

    def loss(features: Tensor) -> Tensor:
        value: Tensor = prototype_cross_entropy(
            features,
            problem.student_prototypes,
            problem.teacher_features,
            problem.teacher_prototypes,
            problem.pair_weights,
            image_weights=problem.image_weights,
            backend="triton",
        ).loss
        return value

    features = problem.student_features.clone().requires_grad_()
    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(features)
    assert torch.equal(compiled, loss(features))
    assert torch.equal(torch.autograd.grad(compiled, features)[0], torch.autograd.grad(loss(features), features)[0])
