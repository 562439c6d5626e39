"""On a GPU: loss, statistics and gradients against the fp64 truth, which the GPU itself forms densely.

Under tf32 the dense formula that sets the budget is torch with its own tf32 products (``conftest.tf32``).

Legend: S / T student / teacher rows, G / V their views, B images, K prototypes, D embedding dim.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.backends.interpreted import damaged
from tests.backends.test_triton import no_teacher_bias
from tests.ops.test_prototype_cross_entropy import HARD
from vmf_kernels import prototype_usage, vmf_prototypes
from vmf_kernels.backends.choice import BACKENDS, choose_backend
from vmf_kernels.backends.triton import launch, operator, tiles
from vmf_kernels.backends.triton.prototypes import Network, pack_prototypes
from vmf_kernels.ops.assignments import column_log_sum_exp, row_log_sum_exp
from vmf_kernels.prototypes import prepare_keys
from vmf_kernels.testing import Problem, assert_within_budget, library_outcome, random_problem

K = 65_536
LOG2_E = 1.4426950408889634
CPU = torch.device("cpu")
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
SHAPES = {"640/128": (64, (2, 10)), "1000/1000": (1000, (1, 1))}  # images, (teacher views, student views)
# either side of the tiles' edges; images, views, K, D
EDGES = {
    "B0-K127-D24": (0, (2, 3), 127, 24),
    "T3-S63-K1-D24": (1, (3, 63), 1, 24),
    "T63-S65-K4099-D24": (1, (63, 65), 4099, 24),
    "T65-S257-K127-D200": (1, (65, 257), 127, 200),
    "T257-S63-K4099-D384": (1, (257, 63), 4099, 384),
    "B63-K4099-D768": (63, (1, 1), 4099, 768),
    "T1-S65-K127-D1024": (1, (1, 65), 127, 1024),
}


def products_of(problem: Problem) -> torch.dtype | None:
    """Dtype that the dense formula is to round its products' operands to."""
    dtype = problem.student_features.dtype
    return None if dtype in (FP32, FP64) else dtype


def check(problem: Problem, backend: str = "triton") -> None:
    assert_within_budget(library_outcome(problem, backend), problem, products_of(problem))


def check_random(
    shape: tuple[int, tuple[int, int], int, int],
    dtype: torch.dtype,
    device: torch.device,
    kind: str = "weight_norm_vmf",
) -> None:
    images, views, prototypes, dim = shape
    check(
        random_problem(
            images=images, views=views, prototypes=prototypes, dim=dim, kind=kind, dtype=dtype, device=device
        )
    )


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "dim"), [(BF16, 256), (BF16, 384), (FP16, 256), (FP32, 256)], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_loss_statistics_and_gradients_match_the_fp64_truth(
    shape: str, dtype: torch.dtype, dim: int, device: torch.device
) -> None:
    check_random((*SHAPES[shape], K, dim), dtype, device)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.usefixtures("tf32")
def test_tf32_is_as_near_the_truth_as_torch_s_own(shape: str, device: torch.device) -> None:
    assert tiles.precision_of(FP32) == "tf32"
    check_random((*SHAPES[shape], K, 256), FP32, device)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["linear", "linear_vmf", "normalized", "weight_norm"])
def test_every_kind_of_prototypes_matches_the_fp64_truth(kind: str, device: torch.device) -> None:
    check_random((64, (2, 10), K, 256), BF16, device, kind)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES)
def test_tensor_descriptors_load_what_pointers_do(
    shape: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shipped table has no such tile; ``bench.tune`` may put one there."""
    if launch.target_of(device).arch < 90:
        pytest.skip("tensor descriptors need compute capability 9.0")
    smaller = {"student": (64, 64), "teacher": (64, 64), "columns": (64, 64)}

    def described(name: str, *rest: object) -> tiles.Tile:
        return tiles.Tile(*smaller[name], warps=4, tma=True)

    monkeypatch.setattr(operator, "tile_of", described)
    check_random((*SHAPES[shape], 4096, 256), BF16, device)


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [24, 256])
def test_the_normaliser_on_the_device_is_that_of_fp64(dim: int, device: torch.device) -> None:
    """The device divides and takes roots approximately; kappa from 1e-3 to 1e5."""
    weight = torch.nn.functional.normalize(torch.randn(4099, dim, device=device), dim=1)
    weight *= torch.logspace(-4, 4, 4099, device=device)[:, None]
    temperature = torch.full((), 0.1, dtype=FP64, device=device)
    packed = pack_prototypes(Network(vmf_prototypes(weight), temperature), FP32)
    exact = prepare_keys(vmf_prototypes(weight.double()), temperature, None, FP64).bias
    assert exact is not None
    error = ((packed.bias[:4099].double() / LOG2_E - exact) / exact).abs().max().item()
    assert error <= 2e-6, f"relative error {error:.1e}, budget 2e-6"


@pytest.mark.gpu
@pytest.mark.parametrize("shape", EDGES)
def test_shapes_at_the_edges_of_tiles_match_the_fp64_truth(shape: str, device: torch.device) -> None:
    check_edges(EDGES[shape], device)


def check_edges(shape: tuple[int, tuple[int, int], int, int], device: torch.device) -> None:
    """As ``check_random``, with NaN in whatever the library leaves unwritten.

    In bf16; one prototype in fp32, for there push and pull are equal, and what rounding them leaves is measured against 0.
    """
    images, views, prototypes, dim = shape
    dtype = FP32 if prototypes == 1 else BF16
    problem = random_problem(images=images, views=views, prototypes=prototypes, dim=dim, dtype=dtype, device=device)
    torch.use_deterministic_algorithms(True)  # fills uninitialised memory with NaN; dense products on a GPU refuse it
    try:
        assert torch.ones(1, device=device).new_empty(3).isnan().all(), "torch no longer fills uninitialised memory"
        outcome = library_outcome(problem, "triton")
    finally:
        torch.use_deterministic_algorithms(False)
    assert_within_budget(outcome, problem, products_of(problem))


@pytest.mark.gpu
@pytest.mark.parametrize("hard", HARD)
def test_hard_values_match_the_fp64_truth(hard: str, device: torch.device) -> None:
    check_hard(hard, device, images=13, prototypes=1000)


def check_hard(hard: str, device: torch.device, images: int, prototypes: int) -> None:
    kind, harden = HARD[hard]
    problem = random_problem(
        images=images, views=(2, 5), prototypes=prototypes, dim=24, kind=kind, dtype=hard_dtype(hard), device=device
    )
    check(harden(problem))


def hard_dtype(hard: str) -> torch.dtype:
    """bf16, but fp32 where the dense formula's rounding in bf16 cancels or nearly so, and luck would set the budget."""
    return FP32 if hard in ("temperature 0.01", "magnitudes <= 0", "norms of 1e3", "one dominates") else BF16


@pytest.mark.gpu
def test_bf16_features_meet_fp32_prototypes(device: torch.device) -> None:
    check(fp32_prototypes(random_problem(images=64, views=(2, 10), prototypes=K, dim=256, dtype=BF16, device=device)))


def fp32_prototypes(problem: Problem) -> Problem:
    """As in training: parameters in fp32, that are not on bf16's grid."""
    student, teacher = (
        replace(p, weight=p.weight.float() * 1.001, magnitude=None if p.magnitude is None else p.magnitude.float())
        for p in (problem.student_prototypes, problem.teacher_prototypes)
    )
    return replace(problem, student_prototypes=student, teacher_prototypes=teacher)


@pytest.mark.gpu
def test_a_damaged_launch_fails_the_budget(device: torch.device) -> None:
    """Negative control."""
    with damaged(no_teacher_bias), pytest.raises(AssertionError, match=r"error .*, budget"):
        check_random((64, (2, 10), K, 256), BF16, device)


@pytest.mark.gpu
def test_usage_and_log_sums_match_the_fp64_truth(device: torch.device) -> None:
    check_log_sums(257, K, 256, BF16, device)


def check_log_sums(
    rows: int, prototypes: int, dim: int, dtype: torch.dtype, device: torch.device, backend: str = "triton"
) -> None:
    """Prototypes of free norm: what is stored is what is multiplied, so that 16 bits round nothing but the inputs."""
    problem = random_problem(
        views=(rows, rows), prototypes=prototypes, dim=dim, kind="linear_vmf", dtype=dtype, device=device
    )
    offset = torch.randn(rows, dtype=FP64, device=device)

    def results(problem: Problem, backend: str, offset: Tensor) -> dict[str, Tensor]:
        x, p = problem.teacher_features, problem.teacher_prototypes
        return {
            "usage": prototype_usage(x, p, 0.07, problem.teacher_bias, backend=backend) * prototypes,
            "rows": row_log_sum_exp(x, p, 0.07, backend=backend),
            "columns": column_log_sum_exp(x, p, 0.07, offset, backend=backend),
        }

    exact = results(problem.to(FP64), "reference", offset)
    for name, got in results(problem, backend, offset.float()).items():
        error = ((got - exact[name]).abs() / (1 + exact[name].abs())).max().item()
        assert error <= 2e-5, f"{name}: relative error {error:.1e}, budget 2e-05"


@pytest.mark.gpu
def test_auto_takes_the_kernels_and_for_fp64_the_streaming_backend(device: torch.device) -> None:
    for dtype, expected in ((BF16, "triton"), (FP16, "triton"), (FP32, "triton"), (FP64, "streaming")):
        rows = torch.empty(2, 24, dtype=dtype, device=device)
        assert choose_backend("auto", rows, rows) is BACKENDS[expected], f"{dtype} did not take {expected}"
    problem = random_problem(images=3, views=(2, 3), prototypes=1000, dim=24, device=device)
    with damaged(lambda kernel, arguments, options: None) as names:
        check(problem, "auto")
        assert "assign_rows_kernel" not in names, f"fp64 launched {names}"
        check(problem.to(BF16), "auto")
    assert "assign_rows_kernel" in names, "bf16 launched no kernel"


@pytest.mark.usefixtures("interpreter")
@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
def test_dry_run_at_toy_size() -> None:
    for dtype in (FP16, FP32):
        check_random((3, (2, 3), 40, 64), dtype, CPU)  # with fewer images the dense formula overflows fp16
    check_edges((0, (2, 3), 40, 64), CPU)
    check_edges((1, (3, 5), 1, 64), CPU)
    check_log_sums(3, 40, 64, BF16, CPU)
    for hard in list(HARD)[::6]:
        check_hard(hard, CPU, images=2, prototypes=40)
    check(fp32_prototypes(random_problem(images=4, views=(2, 4), prototypes=40, dim=64, dtype=BF16)))
    with damaged(no_teacher_bias), pytest.raises(AssertionError, match=r"error .*, budget"):
        check_random((1, (2, 3), 40, 64), BF16, CPU)
