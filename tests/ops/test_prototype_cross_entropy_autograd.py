"""The loss as an operator of torch: gradients on request, once, scaled, compiled, traced, and nothing kept or copied."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.measure import allocations_of
from vmf_kernels import CrossEntropy, Prototypes, prototype_cross_entropy
from vmf_kernels.prototypes import KINDS
from vmf_kernels.testing import Outcome, Problem, assert_within_budget, dense_outcome, library_outcome, random_problem

BACKENDS = ["streaming", "reference"]
OP = torch.ops.vmf_kernels.prototype_cross_entropy.default


def loss_of(problem: Problem, features: Tensor, prototypes: Prototypes, **options: object) -> CrossEntropy:
    settings: dict[str, object] = {
        "student_temperature": problem.student_temperature,
        "teacher_temperature": problem.teacher_temperature,
        "teacher_bias": problem.teacher_bias,
        "image_weights": problem.image_weights,
    }
    return prototype_cross_entropy(
        features,
        prototypes,
        problem.teacher_features,
        problem.teacher_prototypes,
        problem.pair_weights,
        **(settings | options),  # type: ignore[arg-type]
    )


def leaves_of(features: Tensor, prototypes: Prototypes) -> list[Tensor]:
    return [t for t in (features, prototypes.weight, prototypes.magnitude) if t is not None]


def gradients_of(loss: Tensor, leaves: list[Tensor], **options: Any) -> list[Tensor]:
    return list(torch.autograd.grad(loss, leaves, **options))


def all_equal(some: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


def arguments_of_op(problem: Problem, gradients: bool, backend: str = "streaming") -> tuple[object, ...]:
    features, student = (
        problem.student_leaves() if gradients else (problem.student_features, problem.student_prototypes)
    )
    teacher = problem.teacher_prototypes
    weights = [None if w is None else w.to(torch.float32) for w in (problem.pair_weights, problem.image_weights)]
    temperatures = [torch.tensor(t, dtype=torch.float64) for t in (0.1, 0.04)]
    return (
        *(features, student.weight, student.magnitude, student.kind),
        *(problem.teacher_features, teacher.weight, teacher.magnitude, teacher.kind, problem.teacher_bias),
        *(*weights, *temperatures, gradients, gradients, backend),
    )


@pytest.mark.parametrize("gradients", [True, False], ids=["with gradients", "loss alone"])
@pytest.mark.parametrize("options", ["all", "none"])
@pytest.mark.parametrize("kind", ["linear", "weight_norm_vmf"])
def test_op_passes_opcheck(kind: str, options: str, gradients: bool) -> None:
    problem = random_problem(images=3, views=(2, 3), prototypes=17, dim=6, kind=kind, dtype=torch.float32)
    if options == "none":
        problem = replace(problem, teacher_bias=None, image_weights=None)
    torch.library.opcheck(OP, arguments_of_op(problem, gradients))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_match_finite_differences(kind: str) -> None:
    problem = random_problem(images=2, views=(2, 3), prototypes=7, dim=4, kind=kind)
    features, prototypes = problem.student_leaves()

    def loss(features: Tensor, weight: Tensor, magnitude: Tensor | None = None) -> Tensor:
        student = replace(prototypes, weight=weight, magnitude=magnitude)
        return loss_of(problem, features, student, student_temperature=0.5, teacher_temperature=0.3).loss

    assert torch.autograd.gradcheck(loss, leaves_of(features, prototypes), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "wanted",
    [(True, False, False), (False, True, True), (False, True, False), (False, False, True), (True, False, True)],
)
def test_only_the_gradients_asked_for_are_given_and_they_are_the_same(wanted: tuple[bool, ...], backend: str) -> None:
    problem = random_problem(images=3, views=(2, 3), dtype=torch.float32)
    features, prototypes = problem.student_leaves()
    leaves = leaves_of(features, prototypes)
    together = gradients_of(loss_of(problem, features, prototypes, backend=backend).loss, leaves)
    for leaf, wants in zip(leaves, wanted, strict=True):
        leaf.requires_grad_(wants)
    loss_of(problem, features, prototypes, backend=backend).loss.backward()
    for leaf, wants, expected in zip(leaves, wanted, together, strict=True):
        assert (leaf.grad is not None) == wants, "a gradient is missing, or one nobody asked for is there"
        assert leaf.grad is None or torch.equal(leaf.grad, expected), "asking for fewer gradients changed one"


def test_the_teacher_gets_no_gradient() -> None:
    problem = random_problem(images=3, views=(2, 3))
    features, prototypes = problem.student_leaves()
    teacher_features, teacher = replace(
        problem, student_features=problem.teacher_features, student_prototypes=problem.teacher_prototypes
    ).student_leaves()
    loss = prototype_cross_entropy(features, prototypes, teacher_features, teacher, problem.pair_weights).loss
    loss.backward()
    assert [t.grad for t in leaves_of(teacher_features, teacher)] == [None] * 3
    assert all(leaf.grad is not None for leaf in leaves_of(features, prototypes)), "the student got no gradient"


def test_statistics_are_detached_and_a_loss_without_leaves_has_no_graph() -> None:
    problem = random_problem(images=3, views=(2, 3))
    features, prototypes = problem.student_leaves()
    loss, statistics = loss_of(problem, features, prototypes)
    assert loss.requires_grad
    assert not any(value.requires_grad for value in vars(statistics).values())
    with torch.no_grad():
        assert not loss_of(problem, features, prototypes).loss.requires_grad
    assert not loss_of(problem, problem.student_features, problem.student_prototypes).loss.requires_grad


def test_prototypes_built_without_grad_mode_still_get_their_gradient() -> None:
    problem = random_problem(images=3, views=(2, 3), kind="linear_vmf")
    with torch.no_grad():
        features, prototypes = problem.student_leaves()
        prototypes = prototypes.without_vmf().with_vmf()
    gradients = gradients_of(loss_of(problem, features, prototypes).loss, leaves_of(features, prototypes))
    expected = dense_outcome(problem)
    torch.testing.assert_close(gradients[1], expected["weight_gradient"], rtol=1e-10, atol=1e-14)


def test_differentiating_twice_is_refused() -> None:
    problem = random_problem(images=3, views=(2, 3))
    features, prototypes = problem.student_leaves()
    loss = loss_of(problem, features, prototypes).loss
    (gradient,) = torch.autograd.grad(loss, features, create_graph=True)  # a penalty on other terms may want the graph
    assert torch.equal(gradient, torch.autograd.grad(loss, features)[0])
    with pytest.raises(RuntimeError, match="prototype_cross_entropy cannot be differentiated twice"):
        torch.autograd.grad(gradient.sum(), features)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_retained_graph_gives_the_same_gradients_again(dtype: torch.dtype) -> None:
    problem = random_problem(images=3, views=(2, 3), dtype=dtype)
    features, prototypes = problem.student_leaves()
    leaves, loss = leaves_of(features, prototypes), loss_of(problem, features, prototypes).loss
    first = [g.clone() for g in gradients_of(3 * loss, leaves, retain_graph=True)]
    second = gradients_of(3 * loss, leaves, retain_graph=True)
    assert all_equal(first, second), "the second pass over a retained graph gives other gradients"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_scaled_loss_has_scaled_gradients(dtype: torch.dtype) -> None:
    problem = random_problem(images=3, views=(2, 3), dtype=dtype)
    features, prototypes = problem.student_leaves()
    leaves = leaves_of(features, prototypes)
    plain = gradients_of(loss_of(problem, features, prototypes).loss, leaves)
    scaled = gradients_of(65536 * loss_of(problem, features, prototypes).loss, leaves)
    assert all_equal([65536 * g for g in plain], scaled), "scaling by a power of 2 is not exact"


def test_grad_scaler_keeps_fp16_gradients_from_underflow() -> None:
    problem = random_problem(images=3, views=(2, 3), prototypes=1000, dtype=torch.float16)
    problem = replace(problem, pair_weights=problem.pair_weights / 4096)
    features, prototypes = problem.student_leaves()
    scaler = torch.amp.GradScaler("cpu", init_scale=4096.0)
    scaler.scale(loss_of(problem, features, prototypes).loss).backward()
    assert prototypes.weight.grad is not None
    exact = dense_outcome(problem.to(torch.float64))["weight_gradient"]
    error = ((prototypes.weight.grad.double() / 4096 - exact).norm() / exact.norm()).item()
    assert error <= 1e-3, f"relative error {error:.1e}, budget 1e-3 (two roundings to fp16)"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_changes_nothing(backend: str, dtype: torch.dtype) -> None:
    problem = random_problem(images=3, views=(2, 3), prototypes=1000, dtype=torch.float32)
    outside = library_outcome(problem, backend)
    with torch.autocast("cpu", dtype=dtype):
        inside = library_outcome(problem, backend)
    changed = [name for name in outside if not torch.equal(outside[name], inside[name])]
    assert not changed, f"autocast changes {changed}"


@pytest.mark.parametrize("at_once", [True, False], ids=["one backward", "two backwards"])
def test_gradients_accumulate_over_two_losses(at_once: bool) -> None:
    problems = [random_problem(images=images, views=(2, 3)) for images in (3, 5)]
    _, prototypes = problems[0].student_leaves()
    shared = [replace(p, student_prototypes=problems[0].student_prototypes) for p in problems]
    losses = [loss_of(p, p.student_features, prototypes).loss for p in shared]
    if at_once:
        (losses[0] + 0.5 * losses[1]).backward()
    else:
        losses[0].backward()
        (0.5 * losses[1]).backward()
    first, second = (dense_outcome(p)["weight_gradient"] for p in shared)
    assert prototypes.weight.grad is not None
    torch.testing.assert_close(prototypes.weight.grad, first + 0.5 * second, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_backward_allocates_no_second_gradient_of_the_prototypes(scale: float) -> None:
    problem = random_problem(images=3, views=(2, 3), prototypes=4099, dim=64, dtype=torch.float32)
    features, prototypes = problem.student_leaves()
    losses = [scale * loss_of(problem, features, prototypes).loss for _ in range(2)]

    def step() -> None:
        prototypes.weight.grad = None
        losses.pop().backward()

    largest, size = allocations_of(step).largest, prototypes.weight.nbytes
    assert largest < size / 4, f"an allocation of {largest} bytes in the backward pass; the gradient has {size}"


def test_a_gradient_in_another_dtype_is_seen_as_an_allocation() -> None:
    """Negative control of the one above: bfloat16 prototypes do need a copy."""
    problem = random_problem(images=3, views=(2, 3), prototypes=4099, dim=64, dtype=torch.bfloat16)
    features, prototypes = problem.student_leaves()
    losses = [loss_of(problem, features, prototypes).loss for _ in range(2)]
    largest, size = allocations_of(lambda: losses.pop().backward()).largest, prototypes.weight.nbytes
    assert largest >= size, f"an allocation of {largest} bytes; the copy has {size}"


def test_nothing_outlives_the_graph() -> None:
    problem = random_problem(images=3, views=(2, 3), prototypes=1009, dtype=torch.float32)
    gc.collect()
    gc.disable()
    try:
        features, prototypes = problem.student_leaves()
        loss, statistics = loss_of(problem, features, prototypes)
        watched: list[weakref.ref[Any]] = [
            weakref.ref(t) for t in (features, prototypes.weight, loss, statistics.usage)
        ]
        buffer = weakref.ref(loss.grad_fn)
        del features, prototypes, loss, statistics
        alive = [ref() for ref in (*watched, buffer) if ref() is not None]
    finally:
        gc.enable()
    assert not alive, f"kept alive by a cycle or a cache: {[type(x).__name__ for x in alive]}"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_repeat_is_bitwise_equal(dtype: torch.dtype, backend: str) -> None:
    torch.set_num_threads(2)
    problem = random_problem(images=32, views=(2, 4), prototypes=4099, dim=64, dtype=dtype)
    first = library_outcome(problem, backend)
    changed = {
        k for _ in range(3) for k, v in library_outcome(problem, backend).items() if not torch.equal(v, first[k])
    }
    assert not changed, f"a repeat changes {sorted(changed)}"


def compiled_outcome(problem: Problem, step: Callable[..., CrossEntropy], taus: tuple[float, float]) -> Outcome:
    features, prototypes = problem.student_leaves()
    loss, statistics = step(features, prototypes.weight, prototypes.magnitude, *(torch.tensor(t) for t in taus))
    names = ("feature_gradient", "weight_gradient", "magnitude_gradient")
    gradients = gradients_of(loss, leaves_of(features, prototypes))
    return {"loss": loss.detach()} | vars(statistics) | dict(zip(names, gradients, strict=True))


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_in_one_graph_it_equals_eager_and_a_schedule_does_not_recompile(compiler: str) -> None:
    problem = random_problem(images=3, views=(2, 3), prototypes=1000, dtype=torch.float32)

    def step(
        features: Tensor, weight: Tensor, magnitude: Tensor, student_temperature: Tensor, teacher_temperature: Tensor
    ) -> CrossEntropy:
        student = Prototypes(weight, magnitude, "weight_norm_vmf")
        temperatures = {"student_temperature": student_temperature, "teacher_temperature": teacher_temperature}
        return loss_of(problem, features, student, **temperatures)

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend=compiler)
    compiled_outcome(problem, compiled, (0.1, 0.04))
    with torch.compiler.set_stance("fail_on_recompile"):
        outcomes = [compiled_outcome(problem, compiled, taus) for taus in ((0.1, 0.05), (0.1, 0.06), (0.2, 0.07))]
    eager = compiled_outcome(problem, step, (0.2, 0.07))
    assert_within_budget(outcomes[-1], replace(problem, student_temperature=0.2, teacher_temperature=0.07))
    changed = [name for name in eager if not torch.equal(eager[name], outcomes[-1][name])]
    assert not changed, f"compiling changes {changed}"
    assert not torch.equal(outcomes[0]["loss"], outcomes[1]["loss"]), "the temperature was burnt into the graph"


def test_fake_tensors_go_forward_and_backward() -> None:
    """They have no values: a step planned without memory must not look at any."""
    with FakeTensorMode():
        problem = random_problem(images=3, views=(2, 3), dtype=torch.float32)
        outcome = library_outcome(problem)
        assert outcome["weight_gradient"].shape == problem.student_prototypes.weight.shape


def test_more_than_2_to_the_31_logits_have_their_shapes() -> None:
    """On the meta device: shapes and strides only, 2^33 logits and a weight of 2^31 elements."""

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, device="meta", dtype=torch.bfloat16)

    features, weight = empty(2**16, 2**14).requires_grad_(), empty(2**17, 2**14).requires_grad_()
    student = Prototypes(weight, empty(2**17, 1).requires_grad_(), "weight_norm_vmf")
    loss, statistics = prototype_cross_entropy(
        features, student, empty(2**15, 2**14), student.detach(), torch.ones(1, 2), teacher_bias=empty(2**17)
    )
    loss.backward()
    assert (loss.shape, statistics.usage.shape) == ((), (2**17,))
    for leaf in leaves_of(features, student):
        assert leaf.grad is not None
        assert (leaf.grad.shape, leaf.grad.dtype) == (leaf.shape, leaf.dtype)
