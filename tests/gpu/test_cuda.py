"""On a Hopper GPU: the CUDA backend against the fp64 truth, its repeats, graphs and streams, its preparation and Triton's.

Legend: S / T student / teacher rows, G / V their views, B images, K prototypes, D embedding dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from tests.backends.cuda_stand_in import standing_in
from tests.backends.test_triton_prototypes import (
    TEMPERATURE,
    ULP,
    Gradients,
    assert_gradients_within_budget,
    assert_normaliser_within_budget,
    in_fp64,
    incoming,
)
from tests.gpu.test_accuracy import check_log_sums, products_of
from tests.gpu.test_capture import Step, check_repeats, check_replays, recorded, refill_rows, training_problem
from tests.gpu.test_devices import assert_equal, moved
from tests.ops.test_prototype_cross_entropy import HARD
from vmf_kernels import Prototypes
from vmf_kernels.backends.choice import BACKENDS, choose_backend
from vmf_kernels.backends.cuda import binding, measured
from vmf_kernels.backends.cuda import prototypes as ours
from vmf_kernels.backends.triton import launch
from vmf_kernels.backends.triton import prototypes as tritons
from vmf_kernels.backends.triton.prototypes import Network
from vmf_kernels.prototypes import KINDS, LOWEST_BIAS
from vmf_kernels.testing import Problem, assert_within_budget, library_outcome, random_problem

K = 65_536
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
SMALLEST_STEP = {BF16: 1e-38, FP16: 2.0**-25}  # half of it
CPU = torch.device("cpu")
DIMS = (24, 64, 128, 192, 200, 256, 384)
SLEEP_CYCLES = 10**8  # some 60 ms
# images, (teacher views, student views): a multi-crop batch, masked patches, either side of the tiles' edges
BATCHES = {"640/128": (64, (2, 10)), "1000/1000": (1000, (1, 1))}
# images, views, K, D
EDGES = {
    "B0-K127-D24": (0, (2, 3), 127, 24),
    "T1-S1-K127-D64": (1, (1, 1), 127, 64),
    "T3-S63-K1000-D24": (1, (3, 63), 1000, 24),
    "T63-S65-K4099-D128": (1, (63, 65), 4099, 128),
    "T65-S257-K127-D200": (1, (65, 257), 127, 200),
    "T257-S63-K4099-D384": (1, (257, 63), 4099, 384),
    "T129-S127-K257-D192": (1, (129, 127), 257, 192),
    "T1-S257-K1000-D255": (1, (1, 257), 1000, 255),
}
# where the dense formula's own rounding in bf16 does not cancel, so that luck would set the budget (test_accuracy.hard_dtype)
SOFT = [hard for hard in HARD if hard not in ("temperature 0.01", "magnitudes <= 0", "norms of 1e3", "one dominates")]


@pytest.fixture
def hopper(device: torch.device) -> torch.device:
    """The GPU, where the backend runs on it."""
    reason = binding.unsupported_device(device)
    if reason is not None:
        pytest.skip(reason)
    return device


def check(problem: Problem) -> None:
    assert_within_budget(library_outcome(problem, "cuda"), problem, products_of(problem))


def check_random(shape: tuple[int, tuple[int, int], int, int], dtype: torch.dtype, device: torch.device) -> None:
    """With NaN in whatever the library leaves unwritten."""
    images, views, prototypes, dim = shape
    problem = random_problem(images=images, views=views, prototypes=prototypes, dim=dim, dtype=dtype, device=device)
    torch.use_deterministic_algorithms(True)  # fills uninitialised memory; dense products on a GPU refuse it
    try:
        assert torch.ones(1, device=device).new_empty(3).isnan().all(), "torch no longer fills uninitialised memory"
        outcome = library_outcome(problem, "cuda")
    finally:
        torch.use_deterministic_algorithms(False)
    assert_within_budget(outcome, problem, products_of(problem))


@pytest.mark.gpu
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_every_width_matches_the_fp64_truth(dim: int, dtype: torch.dtype, hopper: torch.device) -> None:
    check_random((65, (2, 10), 4099, dim), dtype, hopper)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "dim"), [(BF16, 256), (BF16, 384), (FP16, 256)], ids=str)
@pytest.mark.parametrize("batch", BATCHES)
def test_whole_batches_match_the_fp64_truth(batch: str, dtype: torch.dtype, dim: int, hopper: torch.device) -> None:
    check_random((*BATCHES[batch], K, dim), dtype, hopper)


@pytest.mark.gpu
def test_a_batch_of_masked_patches_matches_the_fp64_truth(hopper: torch.device) -> None:
    """3771 rows take more than one wave of blocks; fewer prototypes, for the dense truth holds a dozen [rows, K] in fp64."""
    check_random((3771, (1, 1), 16_384, 256), BF16, hopper)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", EDGES)
def test_shapes_at_the_edges_of_tiles_match_the_fp64_truth(shape: str, hopper: torch.device) -> None:
    check_random(EDGES[shape], BF16, hopper)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_prototypes_matches_the_fp64_truth(kind: str, hopper: torch.device) -> None:
    check(random_problem(images=64, views=(2, 10), prototypes=K, dim=256, kind=kind, dtype=BF16, device=hopper))


@pytest.mark.gpu
@pytest.mark.parametrize("hard", SOFT)
def test_hard_values_match_the_fp64_truth(hard: str, hopper: torch.device) -> None:
    check_hard(hard, hopper, images=13, prototypes=1000)


def check_hard(hard: str, device: torch.device, images: int, prototypes: int) -> None:
    kind, harden = HARD[hard]
    shape: dict[str, Any] = {"images": images, "views": (2, 5), "prototypes": prototypes, "dim": 24}
    check(harden(random_problem(**shape, kind=kind, dtype=BF16, device=device)))


@pytest.mark.gpu
def test_bf16_features_meet_fp32_prototypes(hopper: torch.device) -> None:
    problem = random_problem(images=64, views=(2, 10), prototypes=K, dim=256, dtype=FP32, device=hopper)
    check(in_16_bits(problem))


def in_16_bits(problem: Problem) -> Problem:
    return replace(
        problem,
        student_features=problem.student_features.to(BF16),
        teacher_features=problem.teacher_features.to(BF16),
    )


@contextmanager
def changed_row_passes(change: Callable[[dict[str, Any]], None]) -> Iterator[None]:
    """Every row pass with its arguments changed in place."""
    real = binding.module()

    class Changed:
        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

        def row_pass(self, queue: Any, **arguments: Any) -> None:
            change(arguments)
            real.row_pass(queue, **arguments)

    with mock.patch.object(binding, "module", return_value=Changed()):
        yield


def check_that_damage_shows(problem: Problem) -> None:
    """Without the value bias the expected bias of equation (2) is missing; without a change nothing is."""
    with changed_row_passes(lambda arguments: None):
        check(problem)
    without = pytest.raises(AssertionError, match=r"error .*, budget")
    with changed_row_passes(lambda arguments: arguments.update(value_bias=0)), without:
        check(problem)


@pytest.mark.gpu
def test_a_damaged_launch_fails_the_budget(hopper: torch.device) -> None:
    """Negative control."""
    check_that_damage_shows(random_problem(images=64, views=(2, 10), prototypes=K, dim=256, dtype=BF16, device=hopper))


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "prototypes", "dim"), [(257, K, 256), (1, 4099, 24), (65, 1, 64), (300, 1000, 384)])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_usage_and_log_sums_match_the_fp64_truth(
    rows: int, prototypes: int, dim: int, dtype: torch.dtype, hopper: torch.device
) -> None:
    check_log_sums(rows, prototypes, dim, dtype, hopper, "cuda")


def loss_step(problem: Problem) -> Step:
    """Loss, usage and gradients; the problem's tensors are read anew each time."""
    features, prototypes = problem.student_leaves()

    def step() -> dict[str, Tensor]:
        loss, statistics = problem.cross_entropy(features, prototypes, "cuda")
        leaves = [leaf for leaf in (features, prototypes.weight, prototypes.magnitude) if leaf is not None]
        names = ("feature_gradient", "weight_gradient", "magnitude_gradient")
        gradients = dict(zip(names, torch.autograd.grad(loss, leaves), strict=True))
        return {"loss": loss.detach(), "usage": statistics.usage} | gradients

    return step


@pytest.mark.gpu
@pytest.mark.parametrize(("images", "crops"), [(64, 10), (1000, 1)])
@pytest.mark.parametrize("dim", [64, 256, 384])
def test_runs_beside_other_work_agree_bit_for_bit(images: int, crops: int, dim: int, hopper: torch.device) -> None:
    step = loss_step(training_problem(hopper, images, K, dim, crops))
    step()
    check_repeats(step, hopper)


def check_graph(problem: Problem, rounds: int = 3) -> None:
    step = loss_step(problem)
    replayed = recorded(step, problem.student_features.device)
    check_replays(step, replayed, lambda: refill_rows(problem), rounds)


@pytest.mark.gpu
def test_a_graph_of_the_loss_replays_the_eager_bits(hopper: torch.device) -> None:
    check_graph(training_problem(hopper, 64, K, 256))


@pytest.mark.gpu
def test_no_step_waits_for_the_device(hopper: torch.device) -> None:
    step = loss_step(training_problem(hopper, 64, K, 256))
    step()
    torch.cuda.synchronize(hopper)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_kernels_go_to_the_current_stream(hopper: torch.device) -> None:
    """The prototypes are right only once the stream has come to it: kernels on another stream would read NaN."""
    problem = training_problem(hopper, 64, K, 256)
    step, weight = loss_step(problem), problem.teacher_prototypes.weight
    right, expected = weight.clone(), step()
    stream = torch.cuda.Stream(hopper)
    torch.cuda.synchronize(hopper)
    with torch.cuda.stream(stream):
        step()  # memory of this stream's own
        stream.synchronize()
        weight.fill_(torch.nan)
        torch.cuda._sleep(SLEEP_CYCLES)
        weight.copy_(right)
        got = step()
    stream.synchronize()
    assert_equal(got, expected)


@pytest.mark.gpu
def test_tensors_need_not_be_on_the_current_device(hopper: torch.device) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs, there is one")
    other = torch.device("cuda", next(i for i in range(torch.cuda.device_count()) if i != hopper.index))
    if (reason := binding.unsupported_device(other)) is not None:
        pytest.skip(reason)
    problem = training_problem(hopper, 64, K, 256)
    expected, got = loss_step(problem)(), loss_step(moved(problem, other))()
    assert torch.cuda.current_device() == hopper.index, "the current device has changed"
    assert {tensor.device.index for tensor in got.values()} == {other.index}
    assert_equal(got, expected)


def stored(kind: str, count: int, dim: int, dtype: torch.dtype, device: torch.device) -> Prototypes:
    """Norms from 1e-3 to 1e4, a zero row, magnitudes of either sign and a zero one."""
    norms = torch.logspace(-3, 4, count, device=device)[:, None]
    weight = torch.nn.functional.normalize(torch.randn(count, dim, device=device), dim=1) * norms
    weight[0] = 0
    if not kind.startswith("weight_norm"):
        return Prototypes(weight.to(dtype), None, kind)
    magnitude = norms.roll(3) * torch.where(torch.arange(count, device=device) % 2 == 0, 1.0, -1.0)[:, None]
    magnitude[-1] = 0
    return Prototypes(weight.to(dtype), magnitude.to(dtype), kind)


def check_preparation(prototypes: Prototypes, dtype: torch.dtype) -> None:
    """Packed and pulled back as in fp64, within the budgets of Triton's kernels (tests/backends/test_triton_prototypes.py)."""
    count, dim = prototypes.weight.shape
    packed = ours.pack_prototypes(Network(prototypes, on(prototypes, TEMPERATURE)), dtype)
    truth = in_fp64(prototypes).effective_weight()
    error = (packed.weight[:count, :dim].double() - truth).abs()
    budget = (torch.finfo(dtype).eps / 2 + 4 * ULP) * truth.abs() + SMALLEST_STEP[dtype]
    excess = float((error / budget).nan_to_num(nan=torch.inf).max())
    assert excess <= 1, f"an element of w is off by {excess:.2f} of its budget"
    assert not packed.weight[count:].any(), "rows of the padding are not zero"
    assert not packed.weight[:, dim:].any(), "columns of the padding are not zero"
    assert (packed.bias[count:] < LOWEST_BIAS).all(), "the padding weighs something"
    if prototypes.has_normalizer:
        assert_normaliser_within_budget(packed, prototypes)
    else:
        assert not packed.bias[:count].any(), "a bias that nobody asked for"
    gradient, bias_gradient = (on(prototypes, tensor) for tensor in incoming(prototypes))
    pulled = gradient.clone()
    magnitude = ours.pull_back(prototypes, on(prototypes, TEMPERATURE), pulled, bias_gradient)
    assert_gradients_within_budget(Gradients(pulled, magnitude), prototypes, gradient, bias_gradient)


def on(prototypes: Prototypes, tensor: Tensor) -> Tensor:
    """The tensor on the prototypes' device."""
    return tensor.to(prototypes.weight.device)


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [2, 24, 63, 64, 200, 256, 260, 384])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
def test_prototypes_are_prepared_as_in_fp64(dtype: torch.dtype, kind: str, dim: int, hopper: torch.device) -> None:
    check_preparation(stored(kind, 1000, dim, dtype, hopper), BF16)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_rows_that_are_not_aligned_are_prepared_too(dtype: torch.dtype, hopper: torch.device) -> None:
    prototypes = stored("weight_norm_vmf", 1000, 256, dtype, hopper)
    wide = torch.zeros(1000, 259, dtype=dtype, device=hopper)
    wide[:, 1:257] = prototypes.weight
    check_preparation(replace(prototypes, weight=wide[:, 1:257]), BF16)


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [24, 256])
def test_preparation_agrees_with_triton_s(dim: int, hopper: torch.device) -> None:
    check_against_triton(stored("weight_norm_vmf", 1000, dim, FP32, hopper), BF16)


def check_against_triton(prototypes: Prototypes, dtype: torch.dtype) -> None:
    """The same up to one rounding of the packed dtype, and a few of fp32 in the bias."""
    temperature, extra = (on(prototypes, tensor) for tensor in (TEMPERATURE, torch.randn(prototypes.count)))
    packed = [side.pack_prototypes(Network(prototypes, temperature, extra), dtype) for side in (ours, tritons)]
    weights, biases = (
        [getattr(one, name)[: prototypes.count].double() for one in packed] for name in ("weight", "bias")
    )
    error = (weights[0][:, : prototypes.dim] - weights[1][:, : prototypes.dim]).abs()
    one_step = torch.finfo(dtype).eps * weights[1][:, : prototypes.dim].abs()
    assert (error <= one_step).all(), f"{int((error > one_step).sum())} elements differ by more than a rounding"
    difference = float(((biases[0] - biases[1]) / (1 + biases[1].abs())).abs().max())
    assert difference <= 4e-6, f"the biases differ by {difference:.1e}, budget 4e-06"


@pytest.mark.gpu
def test_auto_takes_it_only_where_it_was_measured_to_win(hopper: torch.device) -> None:
    rows = torch.empty(640, 256, dtype=BF16, device=hopper)
    won = measured.wins(launch.target_of(hopper).arch, "bf16", 256, 640, len(rows))
    assert choose_backend("auto", rows, rows) is BACKENDS["cuda" if won else "triton"]


@pytest.mark.usefixtures("interpreter")
@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
def test_dry_run_at_toy_size() -> None:
    with standing_in():
        check_random((7, (2, 3), 40, 64), FP16, CPU)
        check_random(EDGES["B0-K127-D24"], BF16, CPU)
        check_hard(SOFT[0], CPU, images=2, prototypes=40)
        check(in_16_bits(random_problem(images=4, views=(2, 4), prototypes=40, dim=64, dtype=FP32)))
        check_that_damage_shows(random_problem(images=7, views=(2, 3), prototypes=40, dim=64, dtype=BF16))
        check_log_sums(3, 40, 64, BF16, CPU, "cuda")
        problem = training_problem(CPU, 1, 33, 64, crops=2)
        check_graph(problem, rounds=1)
        check_repeats(loss_step(problem), CPU, runs=2)
        for kind in KINDS:
            check_preparation(stored(kind, 40, 24, FP32, CPU), BF16)
        check_against_triton(stored("weight_norm_vmf", 40, 24, FP32, CPU), BF16)
