"""On a GPU: streams, other devices, and torch.compile.

Legend: S / T student / teacher rows, K prototypes, D embedding dim.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.gpu.test_capture import Step, logit_step, loss_step, training_problem
from vmf_kernels import Prototypes, prototype_cross_entropy
from vmf_kernels.testing import Problem

K, DIM = 65_536, 256
IMAGES = 64
SLEEP_CYCLES = 10**8  # some 60 ms
CPU = torch.device("cpu")


def assert_equal(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    changed = [name for name in expected if not torch.equal(got[name].to(expected[name].device), expected[name])]
    assert not changed, f"{changed} differ"


def steps(problem: Problem) -> dict[str, Step]:
    """The loss, and the loss of stored logits."""
    (views, crops), count = problem.pair_weights.shape, problem.student_prototypes.count
    images, device = len(problem.student_features) // crops, problem.student_features.device
    student, teacher = (torch.randn(n * images, count, device=device, dtype=torch.bfloat16) for n in (crops, views))
    return {"loss": loss_step(problem), "logits": logit_step(student, teacher, problem.pair_weights)}


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["loss", "logits"])
def test_kernels_go_to_the_current_stream(name: str, device: torch.device) -> None:
    """The pair weights are right only once the stream has come to it: kernels on another stream would read NaN."""
    problem = training_problem(device, IMAGES, K, DIM)
    step, weights, right = steps(problem)[name], problem.pair_weights, problem.pair_weights.clone()
    expected = step()
    stream = torch.cuda.Stream(device)
    torch.cuda.synchronize(device)
    with torch.cuda.stream(stream):
        step()  # memory of this stream's own
        stream.synchronize()
        weights.fill_(torch.nan)
        torch.cuda._sleep(SLEEP_CYCLES)
        weights.copy_(right)
        got = step()
    stream.synchronize()
    assert_equal(got, expected)


def moved(problem: Problem, device: torch.device) -> Problem:
    """The problem on another device."""

    def move(prototypes: Prototypes) -> Prototypes:
        magnitude = None if prototypes.magnitude is None else prototypes.magnitude.to(device)
        return replace(prototypes, weight=prototypes.weight.to(device), magnitude=magnitude)

    assert problem.teacher_bias is not None
    assert problem.image_weights is not None
    return replace(
        problem,
        student_features=problem.student_features.to(device),
        student_prototypes=move(problem.student_prototypes),
        teacher_features=problem.teacher_features.to(device),
        teacher_prototypes=move(problem.teacher_prototypes),
        pair_weights=problem.pair_weights.to(device),
        teacher_bias=problem.teacher_bias.to(device),
        image_weights=problem.image_weights.to(device),
    )


@pytest.mark.gpu
def test_tensors_need_not_be_on_the_current_device(device: torch.device) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs, there is one")
    other = next(i for i in range(torch.cuda.device_count()) if i != device.index)
    problem = training_problem(device, IMAGES, K, DIM)
    expected = loss_step(problem)()
    got = loss_step(moved(problem, torch.device("cuda", other)))()
    assert torch.cuda.current_device() == device.index, "the current device has changed"
    assert {tensor.device.index for tensor in got.values()} == {other}
    assert_equal(got, expected)


def check_compiled(problem: Problem, backend: str, *, autocast: bool = False) -> None:
    """fullgraph, forward and backward: what the eager call gives."""
    kind = problem.student_features.device.type

    def loss_of(features: Tensor, weight: Tensor, magnitude: Tensor) -> Tensor:
        with torch.autocast(kind, torch.bfloat16, enabled=autocast):
            loss, statistics = prototype_cross_entropy(
                2 * features,
                Prototypes(weight, magnitude, problem.student_prototypes.kind),
                problem.teacher_features,
                problem.teacher_prototypes,
                problem.pair_weights,
                teacher_bias=problem.teacher_bias,
                backend="triton",
            )
        total: Tensor = loss + 0.1 * statistics.usage.sum() + 0.01 * statistics.teacher_entropy
        return total

    features, prototypes = problem.student_leaves()
    assert prototypes.magnitude is not None
    leaves = (features, prototypes.weight, prototypes.magnitude)
    torch.compiler.reset()
    compiled = torch.compile(loss_of, fullgraph=True, backend=backend)
    results = []
    for function in (compiled, loss_of):
        loss = function(*leaves)
        results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    for name, got, expected in zip(("loss", "features", "weight", "magnitude"), *results, strict=True):
        error = float((got - expected).double().norm() / expected.double().norm())
        assert error <= 1e-5, f"{name}: relative difference {error:.1e}, budget 1e-05"  # what fusing 2x may round
    torch.compiler.reset()


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [False, True], ids=["bf16", "autocast"])
def test_compiled_by_inductor_equals_eager(autocast: bool, device: torch.device) -> None:
    problem = training_problem(device, IMAGES, K, DIM)
    if autocast:
        problem = replace(
            problem,
            student_features=problem.student_features.float(),
            teacher_features=problem.teacher_features.float(),
        )
    check_compiled(problem, "inductor", autocast=autocast)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
def test_dry_run_at_toy_size() -> None:
    problem = training_problem(CPU, 1, 33, 64, crops=3)
    check_compiled(problem, "aot_eager", autocast=True)
    found = steps(moved(problem, CPU))
    assert_equal(found["logits"](), found["logits"]())
