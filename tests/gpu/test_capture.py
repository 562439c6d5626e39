"""On a GPU: steps as CUDA graphs, what a step launches, that it never waits for the host, and that it repeats bit for bit.

Legend: S / T student / teacher rows, G / V their views, B images, K prototypes, D embedding dim.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from tests.backends.interpreted import damaged
from vmf_kernels import (
    DINOLoss,
    DINOvMFLoss,
    LogitCenter,
    ProbabilityCenter,
    PrototypeLogits,
    Prototypes,
    logit_cross_entropy,
)
from vmf_kernels.testing import Problem, random_problem

K, DIM = 65_536, 256
IMAGES, CROPS = 64, 10
BF16, FP32 = torch.bfloat16, torch.float32
CPU = torch.device("cpu")
ROUNDS = 3  # batches that a graph is replayed on
FORWARD_AND_BACKWARD = Counter(
    {
        "pack_networks_kernel": 1,
        "pack_rows_kernel": 1,
        "assign_rows_kernel": 2,
        "merge_kernel": 1,
        "finish_students_kernel": 1,
        "sum_losses_kernel": 1,
        "gather_columns_kernel": 1,
        "pull_back_kernel": 1,
        "scale_kernel": 3,  # gradients at features, weight and magnitude; on the CPU a scale of 1 needs none
    }
)
MOST_OTHERS = 4  # torch's own: two temperatures, the gradient of the loss, and the cast of the features' gradient

Step = Callable[[], dict[str, Tensor]]


def training_problem(device: torch.device, images: int, prototypes: int, dim: int, crops: int = CROPS) -> Problem:
    """bf16 features and fp32 prototypes, as in training, ready for use: no argument needs a cast."""
    problem = random_problem(images=images, views=(2, crops), prototypes=prototypes, dim=dim, dtype=FP32, device=device)
    assert problem.image_weights is not None
    return replace(
        problem,
        student_features=problem.student_features.to(BF16),
        teacher_features=problem.teacher_features.to(BF16),
        pair_weights=problem.pair_weights.float(),
        image_weights=problem.image_weights.float(),
    )


def loss_step(problem: Problem) -> Step:
    """Loss, usage and gradients; the problem's tensors are read anew each time."""
    features, prototypes = problem.student_leaves()

    def step() -> dict[str, Tensor]:
        loss, statistics = problem.cross_entropy(features, prototypes, "triton")
        leaves = [leaf for leaf in (features, prototypes.weight, prototypes.magnitude) if leaf is not None]
        names = ("feature_gradient", "weight_gradient", "magnitude_gradient")
        gradients = dict(zip(names, torch.autograd.grad(loss, leaves), strict=True))
        return {"loss": loss.detach(), "usage": statistics.usage} | gradients

    return step


def module_step(module: DINOLoss, problem: Problem) -> Step:
    """A step of a loss module, which moves its centre."""
    features, prototypes = problem.student_leaves()
    stored = problem.student_prototypes.without_vmf()
    student = PrototypeLogits(features, Prototypes(prototypes.weight, prototypes.magnitude, stored.kind))
    teacher = PrototypeLogits(problem.teacher_features, problem.teacher_prototypes.without_vmf())

    def step() -> dict[str, Tensor]:
        loss = module(student, teacher, 0)
        feature_gradient, weight_gradient = torch.autograd.grad(loss, [features, prototypes.weight])
        gradients = {"feature_gradient": feature_gradient, "weight_gradient": weight_gradient}
        return {"loss": loss.detach(), "center": module.center} | gradients

    return step


def logit_step(student: Tensor, teacher: Tensor, weights: Tensor) -> Step:
    leaf = student.detach().requires_grad_()

    def step() -> dict[str, Tensor]:
        loss, statistics = logit_cross_entropy(leaf, teacher, weights, backend="triton")
        (gradient,) = torch.autograd.grad(loss, leaf)
        return {"loss": loss.detach(), "usage": statistics.usage, "gradient": gradient}

    return step


def recorded(step: Step, device: torch.device) -> Step:
    """The step as a CUDA graph, warm; a call replays it and returns its static results. On the CPU the step itself."""
    if device.type != "cuda":
        return step
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(3):  # Triton loads a kernel when it is first launched, which no capture allows
            step()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # raises where the host would wait for the device
        results = step()

    def replay() -> dict[str, Tensor]:
        graph.replay()
        return results

    return replay


def check_replays(eager: Step, replayed: Step, refill: Callable[[], object], rounds: int = ROUNDS) -> None:
    """A graph that reads its inputs where they lie gives the bits of the eager step, batch after batch."""
    losses = set()
    for batch in range(rounds):
        refill()
        expected = {name: tensor.clone() for name, tensor in eager().items()}
        got = replayed()
        changed = [name for name in expected if not torch.equal(got[name], expected[name])]
        assert not changed, f"batch {batch}: {changed} differ from the eager step's"
        losses.add(expected["loss"].item())
    assert len(losses) == rounds, f"the batches give {len(losses)} losses: the inputs have not been replaced"


def refill_rows(problem: Problem) -> None:
    """New features, in the same memory."""
    for rows in (problem.student_features, problem.teacher_features):
        rows.copy_(torch.nn.functional.normalize(torch.randn_like(rows, dtype=FP32), dim=1))


def check_loss_replays(problem: Problem, rounds: int = ROUNDS) -> None:
    step = loss_step(problem)
    replayed = recorded(step, problem.student_features.device)
    check_replays(step, replayed, lambda: refill_rows(problem), rounds)


@pytest.mark.gpu
def test_a_graph_of_the_loss_replays_the_eager_bits(device: torch.device) -> None:
    check_loss_replays(training_problem(device, IMAGES, K, DIM))


def loss_module(name: str, prototypes: int, crops: int, device: torch.device) -> DINOLoss:
    schedule = (crops, 0.04, 0.04, 0, 1)
    if name == "DINO":
        return DINOLoss(prototypes, *schedule, backend="triton").to(device)
    return DINOvMFLoss(prototypes, *schedule, centering=name, backend="triton").to(device)


MODULES = {"DINO": LogitCenter, "logit": LogitCenter, "probability": ProbabilityCenter}


def check_module_replays(name: str, problem: Problem, rounds: int = ROUNDS) -> None:
    """Two modules that start alike: the eager one and the graph's move their centres alike."""
    device, crops = problem.student_features.device, problem.pair_weights.shape[1]
    eager, captured = (loss_module(name, problem.student_prototypes.count, crops, device) for _ in range(2))
    assert isinstance(captured.centering, MODULES[name])
    replayed = recorded(module_step(captured, problem), device)
    captured.center.copy_(eager.center)  # back from where warming up moved it
    check_replays(module_step(eager, problem), replayed, lambda: refill_rows(problem), rounds)
    assert eager.center.abs().max() > 0, "the centre has not moved"


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODULES)
def test_a_graph_of_a_loss_module_moves_its_centre_as_the_eager_one(name: str, device: torch.device) -> None:
    check_module_replays(name, training_problem(device, IMAGES, K, DIM))


def check_logit_replays(images: int, prototypes: int, device: torch.device) -> None:
    student, teacher = (torch.randn(n * images, prototypes, device=device, dtype=BF16) for n in (CROPS, 2))
    step = logit_step(student, teacher, torch.rand(2, CROPS, device=device))
    check_replays(step, recorded(step, device), lambda: [logits.normal_() for logits in (student, teacher)])


@pytest.mark.gpu
def test_a_graph_of_the_loss_of_stored_logits_replays_the_eager_bits(device: torch.device) -> None:
    check_logit_replays(IMAGES, K, device)


def warm_step(name: str, problem: Problem) -> Step:
    """A step of the loss, of the loss of stored logits, or of a loss module, that has run once."""
    device, (views, crops) = problem.student_features.device, problem.pair_weights.shape
    images, prototypes = len(problem.student_features) // crops, problem.student_prototypes.count
    step = loss_step(problem)
    if name == "logits":
        student, teacher = (torch.randn(n * images, prototypes, device=device, dtype=BF16) for n in (crops, views))
        step = logit_step(student, teacher, problem.pair_weights)
    elif name in MODULES:
        step = module_step(loss_module(name, prototypes, crops, device), problem)
    step()
    return step


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["loss", "logits", *MODULES])
def test_no_step_waits_for_the_device(name: str, device: torch.device) -> None:
    step = warm_step(name, training_problem(device, IMAGES, K, DIM))
    torch.cuda.synchronize(device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_wait_for_the_device_is_seen(device: torch.device) -> None:
    """Negative control."""
    one = torch.ones((), device=device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            one.item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def launches_of(step: Step, device: torch.device) -> Counter[str]:
    """What a warm step launches, kernels, copies and fills, by the profiler's names; on the CPU the kernels only."""
    if device.type != "cuda":
        with damaged(lambda kernel, arguments, options: None) as names:
            step()
        return Counter(names)
    for _ in range(2):  # the first profile of a process loses kernels
        with profile(activities=[ProfilerActivity.CUDA]) as record:
            step()
            torch.cuda.synchronize(device)
    on_device = [event for event in record.events() if event.device_type == DeviceType.CUDA]
    return Counter(event.name for event in on_device if not getattr(event, "is_user_annotation", False))


def check_launches(problem: Problem) -> None:
    step, device = loss_step(problem), problem.student_features.device
    expected = Counter(FORWARD_AND_BACKWARD)
    if device.type != "cuda":
        del expected["scale_kernel"]
    counted = launches_of(step, device)
    ours = Counter({name: count for name, count in counted.items() if name.endswith("_kernel") and name in expected})
    assert ours == expected, f"launches {dict(ours)}, expected {dict(expected)}"
    others = counted - ours
    assert others.total() <= MOST_OTHERS, f"{others.total()} other launches, at most {MOST_OTHERS}: {dict(others)}"


@pytest.mark.gpu
def test_a_step_launches_the_kernels_of_the_design_and_little_else(device: torch.device) -> None:
    check_launches(training_problem(device, IMAGES, K, DIM))


def check_repeats(step: Step, device: torch.device, runs: int = 5) -> None:
    """The same bits every time, whatever else the device does meanwhile."""
    first = {name: tensor.clone() for name, tensor in step().items()}
    aside = torch.cuda.Stream(device) if device.type == "cuda" else None
    noise = torch.randn(2048 if aside else 64, 2048 if aside else 64, device=device)
    for run in range(runs - 1):
        if aside is not None:
            aside.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(aside):
                for _ in range(run * 5):
                    noise = noise @ noise / 2048
        again = step()
        changed = [name for name in first if not torch.equal(first[name], again[name])]
        assert not changed, f"run {run + 1}: {changed} differ from the first"
    if aside is not None:
        torch.cuda.current_stream(device).wait_stream(aside)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["loss", "logits"])
def test_runs_beside_other_work_agree_bit_for_bit(name: str, device: torch.device) -> None:
    check_repeats(warm_step(name, training_problem(device, IMAGES, K, DIM)), device)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
def test_dry_run_at_toy_size() -> None:
    problem = training_problem(CPU, 1, 33, 64, crops=2)  # from D = 64 on the normaliser needs no recurrence
    check_loss_replays(problem, rounds=1)
    check_launches(problem)
    check_module_replays("probability", problem, rounds=1)
    check_logit_replays(1, 33, CPU)
    check_repeats(warm_step("logits", problem), CPU, runs=2)
