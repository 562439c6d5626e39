"""The cross-entropy with targets, stored and not, against the plain formula.

Legend: S / T student / teacher rows, G / V their views, B images, K prototypes.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tests.fuzz.statements.cross_entropy import plain_loss
from tests.measure import allocations_of, relative_error
from tests.unstored.test_teacher_targets import (
    DIM,
    IMAGES,
    PROTOTYPES,
    STUDENT_TEMPERATURE,
    STUDENT_VIEWS,
    TEACHER_TEMPERATURE,
    TEACHER_VIEWS,
    make_logits,
    make_prototypes,
    make_targets,
)
from vmf_kernels import (
    CrossEntropy,
    PrototypeLogits,
    linear_prototypes,
    log_vmf_constant,
    logit_cross_entropy,
    multi_crop_weights,
    prototype_cross_entropy,
)
from vmf_kernels.ops.target_cross_entropy import target_cross_entropy
from vmf_kernels.prototypes import LOWEST_BIAS
from vmf_kernels.unstored.teacher_targets import TeacherTargets


def student_and_weights(stored_student: bool = False, kind: str = "linear") -> tuple[Any, list[Tensor], Tensor, Tensor]:
    """A student [V, B, K], the leaves it depends on, and the weights of its pairs and images."""
    prototypes = make_prototypes(kind)
    prototypes.weight.requires_grad_()
    features = torch.randn(STUDENT_VIEWS, IMAGES, DIM, dtype=torch.float64, requires_grad=True)
    logits: Any = PrototypeLogits(features, prototypes)
    leaves = [features, prototypes.weight]
    weights = multi_crop_weights(TEACHER_VIEWS, STUDENT_VIEWS), torch.rand(IMAGES, dtype=torch.float64)
    if stored_student:
        leaves = [logits.materialize().detach().requires_grad_()]
        logits = leaves[0]
    return logits, leaves, *weights


def assert_same_loss(result: CrossEntropy, expected: Tensor, leaves: list[Tensor]) -> None:
    """Loss and gradients."""
    torch.testing.assert_close(result.loss, expected, rtol=1e-9, atol=1e-12)
    gradients = torch.autograd.grad(result.loss, leaves)
    for got, other in zip(gradients, torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(got, other, rtol=1e-8, atol=1e-12)


@pytest.mark.quick
@pytest.mark.parametrize("backend", ["auto", "streaming", "reference"])
@pytest.mark.parametrize("kind", ["linear", "vmf"])
def test_unstored_loss_is_the_plain_formula(kind: str, backend: str) -> None:
    student, leaves, pairs, images = student_and_weights(kind=kind)
    teacher = make_logits(TEACHER_VIEWS * IMAGES, make_prototypes(kind))
    targets: Any = TeacherTargets(teacher, TEACHER_TEMPERATURE, torch.randn(PROTOTYPES).double())
    got = target_cross_entropy(
        student, targets.view(TEACHER_VIEWS, -1, PROTOTYPES), pairs, image_weights=images, backend=backend
    )
    scaled = student.flatten().materialize() / STUDENT_TEMPERATURE
    if kind == "vmf":
        scaled = scaled + log_vmf_constant(student.prototypes.norms() / STUDENT_TEMPERATURE, DIM)
    assert_same_loss(got, plain_loss(scaled, targets.materialize(), pairs, images), leaves)


@pytest.mark.quick
@pytest.mark.parametrize("backend", ["auto", "streaming", "torch"])
def test_loss_on_stored_logits_is_the_plain_formula(backend: str) -> None:
    student, leaves, pairs, images = student_and_weights(stored_student=True)
    targets = make_targets("stored", TEACHER_VIEWS * IMAGES)
    bias = torch.randn(PROTOTYPES, dtype=torch.float64, requires_grad=True)
    got = target_cross_entropy(
        student,
        targets.unflatten(0, [TEACHER_VIEWS, IMAGES]),
        pairs,
        student_temperature=torch.tensor(0.2),
        student_bias=bias,
        image_weights=images,
        backend=backend,
    )
    scaled = student.flatten(0, 1) / torch.tensor(0.2).double() + bias
    assert_same_loss(got, plain_loss(scaled, targets.materialize(), pairs, images), [*leaves, bias])


PROBABILITIES = ["softmax", "transposed", "zeros", "one-hot", "any-sum", "padded"]


def make_probabilities(case: str, rows: int) -> Tensor:
    """[rows, K] float64, or int64 for one-hot rows."""
    q = torch.randn(rows, PROTOTYPES, dtype=torch.float64).softmax(dim=-1)
    if case == "transposed":
        return q.T.contiguous().T
    if case == "zeros":
        q[:, ::2] = 0
        return q / q.sum(dim=-1, keepdim=True)
    if case == "one-hot":
        return functional.one_hot(torch.arange(rows) % PROTOTYPES, PROTOTYPES)
    if case == "any-sum":
        return q * torch.rand(rows, 1).double() * 2
    if case == "padded":
        q[rows // 2 :] = 0
    return q


@pytest.mark.quick
@pytest.mark.parametrize("pairing", ["crops", "one-teacher-view", "patches", "single-rows"])
@pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "unweighted"])
@pytest.mark.parametrize("case", PROBABILITIES)
def test_loss_on_stored_probabilities_is_the_plain_formula(case: str, weighted: bool, pairing: str) -> None:
    student, leaves, pairs, _ = student_and_weights(stored_student=True)
    if pairing == "one-teacher-view":
        pairs = pairs[:1]
    elif pairing == "patches":
        pairs = torch.ones(1, 1)
    elif pairing == "single-rows":
        pairs = torch.rand(4, STUDENT_VIEWS * IMAGES, dtype=torch.float64)
    images = STUDENT_VIEWS * IMAGES // pairs.shape[1]
    weights = torch.rand(images, dtype=torch.float64) if weighted else None
    q = make_probabilities(case, pairs.shape[0] * images)
    got = target_cross_entropy(student, q, pairs, image_weights=weights, backend="streaming")
    expected = plain_loss(student.flatten(0, 1) / STUDENT_TEMPERATURE, q.double(), pairs.double(), weights)
    tolerance = {"one-hot": 1e-5}.get(case, 1e-9)  # log q of integers is fp32
    torch.testing.assert_close(got.loss, expected, rtol=tolerance, atol=1e-9)
    assert got.statistics.teacher_entropy.isfinite(), "0 log 0 is 0"
    (gradient,), (other,) = torch.autograd.grad(got.loss, leaves), torch.autograd.grad(expected, leaves)
    torch.testing.assert_close(gradient, other, rtol=tolerance, atol=1e-9)


@pytest.mark.quick
@pytest.mark.parametrize("teacher_views", [1, TEACHER_VIEWS])
def test_no_gradient_reaches_stored_probabilities(teacher_views: int) -> None:
    """Of any row sums, which become weights: the teacher's graph is cut off before that."""
    student, leaves, pairs, _ = student_and_weights(stored_student=True)
    q = make_probabilities("any-sum", teacher_views * IMAGES)
    expected = target_cross_entropy(student, q, pairs[:teacher_views], backend="streaming").loss
    loss = target_cross_entropy(student, q.requires_grad_(), pairs[:teacher_views], backend="streaming").loss
    assert torch.equal(loss, expected)
    of_student, of_targets = torch.autograd.grad(loss, [leaves[0], q], allow_unused=True)
    assert of_student is not None
    assert of_targets is None, "the targets have a gradient"


@pytest.mark.parametrize("images", [IMAGES, 1])
@pytest.mark.parametrize("case", ["transposed", "zeros", "padded"])
def test_kernels_take_any_probabilities(case: str, images: int) -> None:
    """Interpreted here; fp32, as they take no fp64."""
    pairs = multi_crop_weights(TEACHER_VIEWS, STUDENT_VIEWS)
    rows = torch.randn(STUDENT_VIEWS * images, PROTOTYPES, requires_grad=True)
    q = make_probabilities(case, TEACHER_VIEWS * images)
    got = target_cross_entropy(rows, q.float(), pairs, backend="triton").loss
    expected = plain_loss(rows.double() / STUDENT_TEMPERATURE, q, pairs, None)
    (gradient,), (other,) = torch.autograd.grad(got, rows), torch.autograd.grad(expected, rows)
    assert relative_error(got, expected) < 1e-6
    assert relative_error(gradient, other) < 1e-6


@pytest.mark.quick
def test_a_padded_row_is_not_a_uniform_target() -> None:
    """Negative control: the softmax of an empty row is uniform, and without its sum as a weight it would count."""
    student, _, _, _ = student_and_weights(stored_student=True)
    rows, q = student.flatten(0, 1), make_probabilities("padded", STUDENT_VIEWS * IMAGES)
    naive = logit_cross_entropy(rows, q.log().clamp(min=LOWEST_BIAS), torch.ones(1, 1), teacher_temperature=1.0).loss
    expected = plain_loss(rows / STUDENT_TEMPERATURE, q, torch.ones(1, 1).double(), None)
    assert relative_error(naive, expected) > 0.1


@pytest.mark.quick
def test_all_rows_padded_give_no_loss_and_no_gradient() -> None:
    student, leaves, pairs, images = student_and_weights(stored_student=True)
    q = torch.zeros(TEACHER_VIEWS * IMAGES, PROTOTYPES)
    result = target_cross_entropy(student, q, pairs, image_weights=images)
    result.loss.backward()
    assert leaves[0].grad is not None
    assert result.loss == 0
    assert leaves[0].grad.abs().max() == 0
    assert all(x.isfinite().all() for x in (result.statistics.kl, result.statistics.usage))


@pytest.mark.quick
@pytest.mark.parametrize("sums", ["one", "any"])
def test_statistics_of_several_teacher_views_are_those_of_one_pass(sums: str) -> None:
    """With rows that sum to 1 one call gives them; otherwise usage is the weighted mean of q over its weighted sum."""
    student, _, pairs, images = student_and_weights(stored_student=True)
    q = make_probabilities("softmax" if sums == "one" else "any-sum", TEACHER_VIEWS * IMAGES)
    got = target_cross_entropy(student, q, pairs, image_weights=images).statistics
    mass_T = torch.outer(pairs.sum(dim=1), images).reshape(-1)
    torch.testing.assert_close(got.usage, mass_T @ q / (mass_T @ q.sum(dim=1)))
    if sums == "one":
        rows = student.flatten(0, 1)
        one = logit_cross_entropy(rows, q.log(), pairs, teacher_temperature=1.0, image_weights=images).statistics
        for name in ("teacher_entropy", "student_entropy", "kl", "usage"):
            torch.testing.assert_close(getattr(got, name), getattr(one, name), rtol=1e-9, atol=1e-12)
    total = pairs.to(q) @ torch.ones(STUDENT_VIEWS).double() @ (q.sum(1).view(TEACHER_VIEWS, IMAGES) * images)
    loss = target_cross_entropy(student, q, pairs, image_weights=images).loss
    torch.testing.assert_close((got.teacher_entropy + got.kl) * total.sum(), loss)


@pytest.mark.quick
def test_another_pairing_fails_the_comparison() -> None:
    """Negative control: swapping the teacher's views is another loss."""
    student, leaves, pairs, images = student_and_weights()
    targets: Any = TeacherTargets(make_logits(TEACHER_VIEWS * IMAGES), TEACHER_TEMPERATURE)
    got = target_cross_entropy(student, torch.cat(targets.chunk(2)[::-1]), pairs, image_weights=images)
    scaled = student.flatten().materialize() / STUDENT_TEMPERATURE
    with pytest.raises(AssertionError):
        assert_same_loss(got, plain_loss(scaled, targets.materialize(), pairs, images), leaves)


@pytest.mark.quick
def test_unstored_targets_give_what_the_functions_below_give() -> None:
    """Same result, bit for bit, and with targets as they come out of a training loop."""
    student, _, pairs, images = student_and_weights()
    teacher = make_logits(TEACHER_VIEWS * IMAGES)
    bias = torch.randn(PROTOTYPES).double()
    targets: Any = TeacherTargets(teacher, TEACHER_TEMPERATURE, bias)
    looped: Any = torch.cat(
        [part.unsqueeze(0).squeeze(0)[:IMAGES] for part in targets.view(TEACHER_VIEWS, -1, PROTOTYPES)]
    )
    expected = prototype_cross_entropy(
        student.features.flatten(0, 1),
        student.prototypes,
        teacher.features,
        teacher.prototypes,
        pairs,
        teacher_temperature=TEACHER_TEMPERATURE,
        teacher_bias=bias,
        image_weights=images,
    )
    assert torch.equal(target_cross_entropy(student, looped, pairs, image_weights=images).loss, expected.loss)


def test_a_step_compiles_whole() -> None:
    """What a training loop does with the outputs of its heads costs no graph break."""
    prototypes = make_prototypes()
    features, teacher = torch.randn(20, DIM).double(), torch.randn(8, DIM).double()

    def step(student_features: Tensor, teacher_features: Tensor) -> Tensor:
        out: Any = PrototypeLogits(student_features, prototypes)
        crops, local = torch.split_with_sizes(out, [8, 12], dim=0)
        student: Any = torch.cat([crops.unflatten(0, [2, 4]), local.unflatten(0, [3, 4])])
        targets: Any = TeacherTargets(PrototypeLogits(teacher_features, prototypes), TEACHER_TEMPERATURE)
        views: Any = torch.stack([part[:, :] for part in targets.view(2, -1, *targets.shape[1:])])
        return target_cross_entropy(student.float(), views.squeeze(), multi_crop_weights(2, 5)).loss

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(features, teacher), step(features, teacher))


def test_unstored_loss_stores_nothing() -> None:
    """[2^12, 2^14] probabilities would take 256 MiB."""
    prototypes = linear_prototypes(torch.randn(2**14, 2))
    features = torch.randn(2**12, 2)
    pairs, weights = torch.ones(1, 1), torch.full((2**12,), 2.0**-12)

    def step() -> Any:
        targets: Any = (
            TeacherTargets(PrototypeLogits(features, prototypes), 0.1).float().view(2, -1, 2**14).flatten(0, 1)
        )
        return target_cross_entropy(PrototypeLogits(features, prototypes), targets, pairs, image_weights=weights).loss

    largest = allocations_of(step).largest
    assert largest <= 2**25, f"{largest / 2**20:.1f} MiB allocated at once"


@pytest.mark.quick
@pytest.mark.parametrize(
    ("student", "targets", "said"),
    [
        ("unstored", "probabilities", r"targets are a tensor of probabilities; expected .* or student.materialize\(\)"),
        ("unstored", "stored", r"targets are TeacherTargets over stored logits; expected .*student.materialize\(\)"),
        ("stored", "unstored", r"student is a tensor but targets .*, or targets.materialize\(\)"),
        ("stored", "logits", r"targets are PrototypeLogits; expected TeacherTargets\(logits, temperature\)"),
        ("targets", "unstored", "student is TeacherTargets; expected PrototypeLogits or a tensor"),
    ],
)
def test_sides_of_different_kinds_are_refused(student: str, targets: str, said: str) -> None:
    logits = make_logits()
    kinds: dict[str, Any] = {
        "unstored": make_targets(),
        "stored": make_targets("stored"),
        "probabilities": make_targets().materialize(),
        "logits": logits,
    }
    given: Any = {"unstored": logits, "stored": logits.materialize(), "targets": make_targets()}[student]
    with pytest.raises(TypeError, match=said):
        target_cross_entropy(given, kinds[targets], torch.ones(1, 1))


@pytest.mark.quick
def test_other_misfits_are_refused() -> None:
    logits, stored_logits, ones = make_logits(), make_logits().materialize(), torch.ones(1, 1)
    targets = TeacherTargets(make_logits(), 0.1)
    q = make_targets().materialize()
    with pytest.raises(ValueError, match="student_bias came with PrototypeLogits, whose prototypes add their own"):
        target_cross_entropy(logits, targets, ones, student_bias=torch.zeros(PROTOTYPES))
    with pytest.raises(ValueError, match="student is a single row"):
        target_cross_entropy(stored_logits[0], q, ones)
    with pytest.raises(ValueError, match="both networks must have the same number of prototypes K"):
        target_cross_entropy(stored_logits, q[:, :-1], ones)
    with pytest.raises(ValueError, match="expected the same number of images, got 5 and 12"):
        target_cross_entropy(stored_logits, q[:5], ones)
    with pytest.raises(ValueError, match="unknown backend 'numpy'"):
        target_cross_entropy(logits, targets, ones, backend="numpy")
    # no backend stands in for another: what has no pass over stored logits says so
    for name in ("numpy", "reference", "native", "cuda"):
        with pytest.raises(ValueError, match=f"backend '{name}' has no pass over stored logits; expected one of auto"):
            target_cross_entropy(stored_logits, q, ones, backend=name)
