"""The CUDA backend without its kernels, against the fp64 truth: torch stands in for them, and Triton's are interpreted.

What the kernels themselves compute is tested on a GPU (tests/gpu/test_cuda.py).

Legend: S / T student / teacher rows, G / V their views, B images, K prototypes, D embedding dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.backends import cuda_stand_in
from tests.backends.cuda_stand_in import Damage, StandIn, standing_in
from tests.backends.interpreted import correct_bf16
from tests.ops.test_prototype_cross_entropy import HARD
from vmf_kernels import linear_prototypes, prototype_usage
from vmf_kernels.backends.cuda import passes
from vmf_kernels.backends.cuda.layouts import PAD_TO, WIDTHS, layout_of
from vmf_kernels.backends.triton import launch
from vmf_kernels.ops.assignments import column_log_sum_exp, row_log_sum_exp
from vmf_kernels.prototypes import KINDS
from vmf_kernels.testing import Outcome, Problem, assert_within_budget, library_outcome, random_problem

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on the GPU here: tests/gpu"),
    # padding has weight 0, whose logarithm is meant to be -inf
    pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning", "ignore:invalid value:RuntimeWarning"),
]

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# images, (teacher views, student views), prototypes, dim
SHAPES = {
    "B0-K127-D24": (0, (2, 3), 127, 24),
    "T63-S1-K127-D24": (1, (63, 1), 127, 24),
    "T1-S33-K300-D256": (1, (1, 33), 300, 256),
    "T1-S3-K1025-D24": (1, (1, 3), 1025, 24),
    "T5-S17-K127-D384": (1, (5, 17), 127, 384),
    "B9-G2-V10-K257-D65": (9, (2, 10), 257, 65),
    "B17-G1-V1-K127-D130": (17, (1, 1), 127, 130),
}


@pytest.fixture
def stand_in() -> Iterator[StandIn]:
    with standing_in() as module, correct_bf16():
        yield module


def check(problem: Problem) -> None:
    dtype = problem.student_features.dtype
    assert_within_budget(library_outcome(problem, "cuda"), problem, dtype)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_matches_the_fp64_truth(shape: str, stand_in: StandIn, uninitialised_memory_is_nan: None) -> None:
    images, views, prototypes, dim = SHAPES[shape]
    # with few images the dense formula, that sets the budget, overflows fp16
    for dtype in (BF16, FP16) if images > 9 else (BF16,):
        check(random_problem(images=images, views=views, prototypes=prototypes, dim=dim, dtype=dtype))


@pytest.mark.parametrize(
    ("kind", "dtype", "views"), [*((kind, BF16, (1, 1)) for kind in KINDS), ("weight_norm_vmf", FP16, (2, 4))]
)
def test_every_kind_and_dtype_matches_the_fp64_truth(
    kind: str, dtype: torch.dtype, views: tuple[int, int], stand_in: StandIn
) -> None:
    check(random_problem(images=9, views=views, prototypes=127, dim=40, kind=kind, dtype=dtype))


def in_16_bits(problem: Problem) -> Problem:
    """Features in bf16, prototypes and biases in fp32, as in training."""
    return replace(
        problem,
        student_features=problem.student_features.to(BF16),
        teacher_features=problem.teacher_features.to(BF16),
    )


def test_bf16_features_meet_fp32_prototypes(stand_in: StandIn) -> None:
    check(in_16_bits(random_problem(images=9, views=(2, 4), prototypes=127, dim=63, dtype=FP32)))


# where the dense formula's own rounding in 16 bits neither cancels nor overflows
SOFT = [hard for hard in HARD if hard not in ("temperature 0.01", "magnitudes <= 0", "norms of 1e3", "one dominates")]


@pytest.mark.parametrize("hard", SOFT[::3])  # the others test the kernels, on a GPU
def test_hard_values_match_the_fp64_truth(hard: str, stand_in: StandIn) -> None:
    kind, change = HARD[hard]
    check(change(random_problem(images=4, views=(2, 5), prototypes=127, dim=24, kind=kind, dtype=BF16)))


def test_rows_of_two_dtypes_are_refused(stand_in: StandIn) -> None:
    """Their products are formed in fp32."""
    problem = random_problem(images=3, views=(2, 4), prototypes=127, dim=24, dtype=FP32)
    problem = replace(problem, student_features=problem.student_features.half())
    with pytest.raises(RuntimeError, match=r"'cuda' cannot run here: .* the features are torch\.float32"):
        library_outcome(problem, "cuda")


@pytest.mark.parametrize("multiprocessors", [1, 3, 40])
def test_every_number_of_splits_matches_the_fp64_truth(
    multiprocessors: int, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "target_of", lambda device: launch.Target(launch.INTERPRETER_ARCH, multiprocessors))
    check(random_problem(images=4, views=(2, 3), prototypes=1000, dim=24, dtype=FP16))


def values_of_the_wrong_prototypes(name: str, arguments: dict[str, Any]) -> None:
    if name == "row_pass" and arguments["values"] not in (0, arguments["keys"]):
        arguments["values"] = arguments["keys"]
        arguments["value_bias"] = 0


def no_teacher_bias(name: str, arguments: dict[str, Any]) -> None:
    if name == "row_pass" and arguments["values"] not in (0, arguments["keys"]):
        cuda_stand_in.tensor_at(arguments["bias"], (arguments["prototypes"],), FP32)[:100] = 0


def no_expected_bias(name: str, arguments: dict[str, Any]) -> None:
    if name == "row_pass":
        arguments["value_bias"] = 0


def a_lost_block_of_rows(name: str, arguments: dict[str, Any]) -> None:
    if name == "column_pass":
        student = arguments["student"]
        arguments["student"] = replace(student, rows=student.rows - cuda_stand_in.ROW_TILE)


def cotangents_of_the_wrong_sign(name: str, arguments: dict[str, Any]) -> None:
    if name == "column_pass":
        side, element = arguments["teacher"], arguments["element"].value
        cuda_stand_in.tensor_at(arguments["cotangents"], (side.rows, arguments["width"]), element).neg_()


def no_gradient_of_the_normaliser(name: str, arguments: dict[str, Any]) -> None:
    if name == "pull_back":
        arguments["stored"] = replace(arguments["stored"], temperature=0)


def norms_of_the_wrong_stride(name: str, arguments: dict[str, Any]) -> None:
    if name == "pack_prototypes":
        student, teacher = arguments["networks"]
        stored = replace(student.prototypes, stride=student.prototypes.stride - 1)
        arguments["networks"] = [replace(student, prototypes=stored), teacher]


DAMAGES = [
    values_of_the_wrong_prototypes,
    no_teacher_bias,
    no_expected_bias,
    a_lost_block_of_rows,
    cotangents_of_the_wrong_sign,
    no_gradient_of_the_normaliser,
    norms_of_the_wrong_stride,
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_launch_fails_the_budget(damage: Damage) -> None:
    """Negative control."""
    problem = random_problem(images=9, views=(2, 4), prototypes=127, dim=24, dtype=FP16)
    with standing_in(damage), pytest.raises(AssertionError, match=r"error .*, budget"):
        check(problem)


def too_small_splits(name: str, arguments: dict[str, Any]) -> None:
    if name == "row_pass":
        arguments["split_size"] -= 1


def rows_without_padding(name: str, arguments: dict[str, Any]) -> None:
    if name == "row_pass":
        arguments["rows"] -= 1


@pytest.mark.parametrize(
    ("damage", "said"), [(too_small_splits, "are not whole tiles of"), (rows_without_padding, "rows are not whole")]
)
def test_what_the_kernels_ask_of_the_caller_is_checked(damage: Damage, said: str) -> None:
    """Negative control of the stand-in's own assertions."""
    with standing_in(damage), pytest.raises(AssertionError, match=said):
        library_outcome(random_problem(images=3, prototypes=127, dim=24, dtype=FP16), "cuda")


@pytest.mark.quick
def test_a_step_calls_each_kernel_of_the_design() -> None:
    problem = random_problem(images=2, views=(2, 3), prototypes=127, dim=24, dtype=FP16)
    with standing_in() as module:
        library_outcome(problem, "cuda")
    assert module.called == ["pack_prototypes"] + ["row_pass"] * 2 + ["column_pass", "pull_back"]


@pytest.mark.parametrize("wanted", ["features", "prototypes", "neither"])
def test_only_the_gradients_that_are_wanted_are_formed(wanted: str, stand_in: StandIn) -> None:
    problem = random_problem(images=3, views=(2, 3), prototypes=127, dim=24, dtype=FP16)
    complete = library_outcome(problem, "cuda")
    features, prototypes = problem.student_leaves()
    if wanted != "features":
        features = features.detach()
    if wanted != "prototypes":
        prototypes = prototypes.detach()
    loss, statistics = problem.cross_entropy(features, prototypes, "cuda")
    assert torch.equal(loss.detach(), complete["loss"])
    torch.testing.assert_close(statistics.usage, complete["usage"], rtol=1e-6, atol=1e-9)
    if wanted == "neither":
        assert not loss.requires_grad
        return
    leaf, name = (features, "feature_gradient") if wanted == "features" else (prototypes.weight, "weight_gradient")
    assert torch.equal(torch.autograd.grad(loss, leaf)[0], complete[name])


def test_a_repeat_is_bitwise_equal(stand_in: StandIn) -> None:
    problem = random_problem(images=6, views=(2, 4), prototypes=300, dim=24, dtype=FP16)
    first, second = (library_outcome(problem, "cuda") for _ in range(2))
    changed = [name for name in first if not torch.equal(first[name], second[name])]
    assert not changed, f"{changed} differ on repeat"


def test_blocks_in_clusters_are_asked_for_by_the_kernels_that_have_them(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = random_problem(images=9, views=(2, 4), prototypes=127, dim=40, dtype=FP16)
    asked: list[tuple[str, int]] = []

    def look(name: str, arguments: dict[str, Any]) -> None:
        if name in ("row_pass", "column_pass"):
            asked.append((name, arguments["blocks_in_cluster"]))

    outcomes: list[Outcome] = []
    for kernels in (passes.CUDA, passes.CUDA_CLUSTERS):
        monkeypatch.setattr(passes, "CUDA", kernels)
        with standing_in(look):
            outcomes.append(library_outcome(problem, "cuda"))
    names = ["row_pass", "row_pass", "column_pass"]
    assert asked == [(name, blocks) for blocks in (1, 2) for name in names]
    alone, in_clusters = outcomes
    changed = [name for name in alone if not torch.equal(alone[name], in_clusters[name])]
    assert not changed, f"{changed} differ in clusters"


@pytest.mark.parametrize("layout", [lambda x: x.T.contiguous().T, lambda x: x.repeat(1, 2)[:, : x.shape[1]]])
def test_strides_do_not_matter(layout: Callable[[Tensor], Tensor], stand_in: StandIn) -> None:
    problem = random_problem(images=6, views=(2, 4), prototypes=127, dim=24, dtype=FP16)
    strided = replace(
        problem,
        student_features=layout(problem.student_features),
        teacher_features=layout(problem.teacher_features),
        student_prototypes=replace(problem.student_prototypes, weight=layout(problem.student_prototypes.weight)),
        pair_weights=layout(problem.pair_weights),
    )
    expected, got = library_outcome(problem, "cuda"), library_outcome(strided, "cuda")
    changed = [name for name in expected if not torch.equal(expected[name], got[name])]
    assert not changed, f"{changed} differ"


@pytest.mark.parametrize(
    ("rows", "prototypes", "dim", "dtype"), [(1, 1, 2, FP16), (63, 127, 24, BF16), (17, 257, 96, FP16)]
)
def test_usage_and_log_sums_follow_the_reference(
    rows: int, prototypes: int, dim: int, dtype: torch.dtype, stand_in: StandIn
) -> None:
    """Prototypes of free norm: what is stored is what is multiplied."""
    problem = random_problem(views=(rows, rows), prototypes=prototypes, dim=dim, kind="linear_vmf", dtype=dtype)
    x, p, offset = problem.teacher_features, problem.teacher_prototypes, torch.randn(rows)

    def results(backend: str) -> list[Tensor]:
        usage = prototype_usage(x, p, 0.07, problem.teacher_bias, backend=backend)
        rows_ = row_log_sum_exp(x, p, 0.07, backend=backend)
        return [usage * prototypes, rows_, column_log_sum_exp(x, p, 0.07, offset, backend=backend)]

    for name, got, expected in zip(("usage", "rows", "columns"), results("cuda"), results("reference"), strict=True):
        assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
        error = ((got - expected).abs() / (1 + expected.abs())).max().item()
        assert error <= 2e-5, f"{name}: relative error {error:.1e}, budget 2e-05"


@pytest.mark.quick
def test_column_log_sum_of_no_rows_is_minus_infinity(stand_in: StandIn) -> None:
    x, p = torch.empty(0, 4, dtype=FP16), linear_prototypes(torch.randn(5, 4))
    assert column_log_sum_exp(x, p, 0.1, torch.empty(0), backend="cuda").tolist() == [-torch.inf] * 5


@pytest.mark.quick
@pytest.mark.parametrize("dim", [2, 24, 64, 65, 130, 192, 200, 256, 257, 384])
def test_layouts_suit_both_the_passes_and_the_merge(dim: int) -> None:
    layout = layout_of(dim, BF16)
    assert layout.width == min(width for width in WIDTHS if width >= dim), f"D = {dim} is padded to {layout.width}"
    assert layout.chunk & (layout.chunk - 1) == 0, f"a chunk of {layout.chunk} columns is no power of two"


def test_prototypes_are_padded_to_whole_tiles_of_rows() -> None:
    """They take the rows' place in ``column_log_sum_exp``."""
    assert PAD_TO % cuda_stand_in.ROW_TILE == 0
