"""Inputs, results, allocations and errors of each loss of ``compat.dinov2`` and ``compat.dinov3``.

Legend: B images, C masked images, N patches, M masked patches, K prototypes, D bottleneck dim.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tests.fuzz.statements.dino import exact_log_vmf_constant
from tests.fuzz.statements.dinov2 import (
    PublishedKoLeoLoss,
    PublishedPatchLoss,
    PublishedV2Loss,
    PublishedV3Loss,
)
from tests.measure import allocations_of, relative_error
from vmf_kernels import PrototypeLayer, PrototypeLogits, linear_prototypes
from vmf_kernels.compat import _dinov2_and_v3, dinov2, dinov3
from vmf_kernels.ops.target_cross_entropy import target_cross_entropy
from vmf_kernels.unstored.teacher_targets import TeacherTargets

PROTOTYPES, DIM = 61, 8
BUDGET = 1e-10  # relative, in norm, fp64
TAU = 0.05
MODULES = [pytest.param(dinov2, id="v2"), pytest.param(dinov3, id="v3")]
OUTPUTS = ["unstored", "stored"]


def logits(
    *rows: int, prototypes: int = PROTOTYPES, seed: int = 0, dtype: torch.dtype = torch.float64
) -> PrototypeLogits:
    """Unstored logits of [*rows, K] that ask for gradients; every seed has its own features, all share their prototypes."""
    weight = torch.randn(prototypes, DIM, generator=torch.Generator().manual_seed(99), dtype=torch.float64).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    features = functional.normalize(torch.randn(*rows, DIM, generator=generator, dtype=torch.float64), dim=-1)
    return PrototypeLogits(features.to(dtype).requires_grad_(), linear_prototypes(weight.requires_grad_()))


def given(unstored: PrototypeLogits, output: str) -> Any:
    return unstored if output == "unstored" else unstored.materialize()


def made(loss: Callable[..., Any], prototypes: int = PROTOTYPES, **options: Any) -> Any:
    """A loss of fp64 whose centre is set."""
    instance = loss(prototypes, **options)
    if hasattr(instance, "init_weights"):
        instance.init_weights()
    return instance.double()


def values_of(targets: TeacherTargets | Tensor) -> Tensor:
    return targets if isinstance(targets, Tensor) else targets.materialize()


def assert_close(got: Tensor, expected: Tensor, budget: float = BUDGET) -> None:
    error = relative_error(got, expected)
    assert error <= budget, f"relative error {error:.2e}, budget {budget:.0e}"


def assert_same_step(got: Tensor, ours: PrototypeLogits, expected: Tensor, published: PrototypeLogits) -> None:
    """Equal losses, and equal gradients of features and prototypes."""
    assert_close(got, expected)
    sides = [
        torch.autograd.grad(loss, [student.features, student.prototypes.weight])
        for loss, student in ((got, ours), (expected, published))
    ]
    for mine, theirs in zip(*sides, strict=True):
        assert theirs.abs().max() > 0
        assert_close(mine, theirs)


@pytest.mark.quick
@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("rule", ["center", "sinkhorn"])
def test_targets_are_of_the_kind_that_came_in(rule: str, output: str, module: ModuleType) -> None:
    raw, count = logits(7), torch.tensor([7])
    for loss, published, extra in (
        (made(module.DINOLoss), PublishedV2Loss(PROTOTYPES), ()),
        (made(module.iBOTPatchLoss), PublishedPatchLoss(PROTOTYPES), (count,)),
    ):
        if rule == "center":
            targets = loss.softmax_center_teacher(given(raw, output), TAU)
            expected = published.softmax_center_teacher(raw.materialize(), TAU)
        else:
            targets = loss.sinkhorn_knopp_teacher(given(raw, output), TAU, *extra)
            expected = published.sinkhorn_knopp_teacher(raw.materialize(), TAU, *extra)
        assert isinstance(targets, TeacherTargets if output == "unstored" else Tensor)
        assert not targets.requires_grad
        assert_close(values_of(targets), expected)
    assert count.item() == 7, "the caller's tensor was written to"


FORMS: dict[str, Callable[[Any], Any]] = {
    "list": lambda views: [views[0], views[1]],
    "chunks": lambda views: views.flatten(0, 1).chunk(2),
    "whole": lambda views: views,
    "generator": lambda views: (view for view in views),
}


@pytest.mark.quick
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("output", OUTPUTS)
def test_v2_takes_entries_in_any_form(output: str, form: str) -> None:
    ours, theirs, teacher = logits(2, 3, seed=1), logits(2, 3, seed=1), logits(2, 3, seed=2)
    loss, published = made(dinov2.DINOLoss), PublishedV2Loss(PROTOTYPES).double()
    targets = loss.softmax_center_teacher(given(teacher, output), TAU)
    got = loss(FORMS[form](given(ours, output)), FORMS[form](targets))
    expected = published(theirs.materialize(), published.softmax_center_teacher(teacher.materialize(), TAU))
    assert_same_step(got, ours, expected, theirs)


@pytest.mark.quick
def test_v2_sums_all_pairs_in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(student: Any, targets: Any, pair_weights: Tensor, **options: Any) -> Any:
        calls.append(pair_weights.shape)
        return target_cross_entropy(student, targets, pair_weights, **options)

    monkeypatch.setattr(_dinov2_and_v3, "target_cross_entropy", counted)
    loss = made(dinov2.DINOLoss)
    for output in OUTPUTS:
        targets = loss.softmax_center_teacher(given(logits(6), output), TAU)
        loss(given(logits(24, seed=1), output).chunk(8), targets.view(2, -1, PROTOTYPES))
    assert calls == [(2, 8), (1, 8)], "stored targets come as their sum, which the loss is linear in"


@pytest.mark.quick
@pytest.mark.parametrize("output", OUTPUTS)
def test_v2_takes_entries_centred_apart(output: str) -> None:
    """Different temperatures and centres, which no single pass has."""
    ours, theirs, teacher = logits(3, seed=1), logits(3, seed=1), logits(2, 3, seed=2)
    loss, published = made(dinov2.DINOLoss), PublishedV2Loss(PROTOTYPES).double()
    entries, expected_entries = [], []
    for tau, view in zip((0.04, 0.07), teacher, strict=True):
        entries.append(loss.softmax_center_teacher(given(view, output), tau))
        expected_entries.append(published.softmax_center_teacher(view.materialize(), tau))
        loss.update_center(given(view, output))
        published.update_center(view.materialize())
    got, expected = loss([given(ours, output)], entries), published([theirs.materialize()], expected_entries)
    assert_same_step(got, ours, expected, theirs)


@pytest.mark.quick
def test_v2_of_no_entries_is_0() -> None:
    loss = made(dinov2.DINOLoss)
    assert loss([], [values_of(loss.softmax_center_teacher(logits(3), TAU))]) == 0


@pytest.mark.quick
def test_v2_takes_targets_of_any_strides_and_dtype() -> None:
    loss, raw, student = made(dinov2.DINOLoss), logits(6).materialize().detach(), logits(6, seed=1).materialize()
    targets = loss.sinkhorn_knopp_teacher(raw, TAU)
    transposed = targets.T.contiguous().T
    assert not transposed.is_contiguous()
    assert_close(loss([student], [transposed]), loss([student], [targets]))
    assert_close(loss([student], [targets.half(), targets.half()]), 2 * loss([student], [targets]), 1e-3)


@pytest.mark.quick
@pytest.mark.parametrize("ignore", [False, True], ids=["all", "off-diagonal"])
@pytest.mark.parametrize("crops", [(2, 2), (5, 2), (1, 2)], ids=str)
@pytest.mark.parametrize("output", OUTPUTS)
def test_v3_means_over_pairs(output: str, crops: tuple[int, int], ignore: bool) -> None:
    ours, theirs, teacher = logits(crops[0], 3, seed=1), logits(crops[0], 3, seed=1), logits(crops[1], 3, seed=2)
    loss, published = made(dinov3.DINOLoss), PublishedV3Loss(PROTOTYPES).double()
    targets = loss.softmax_center_teacher(given(teacher, output), TAU)
    got = loss(given(ours, output), targets, ignore_diagonal=ignore)
    expected = published(theirs.materialize(), published.softmax_center_teacher(teacher.materialize(), TAU), ignore)
    assert_same_step(got, ours, expected, theirs)


@pytest.mark.quick
@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("output", OUTPUTS)
def test_all_patches_with_masks_equal_the_published_mean(output: str, module: ModuleType) -> None:
    ours, theirs, teacher = logits(4, 5, seed=1), logits(4, 5, seed=1), logits(4, 5, seed=2)
    masks = torch.tensor([[1, 1, 0, 0, 1], [0, 0, 0, 0, 0], [0, 1, 0, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    loss, published = made(module.iBOTPatchLoss), PublishedPatchLoss(PROTOTYPES).double()
    targets = loss.softmax_center_teacher(given(teacher, output), TAU)
    expected_targets = published.softmax_center_teacher(teacher.materialize(), TAU)
    got, expected = loss(given(ours, output), targets, masks), published(theirs.materialize(), expected_targets, masks)
    assert_same_step(got, ours, expected, theirs)
    rows = masks.flatten()
    masked = loss.forward_masked(given(ours, output).flatten(0, 1)[rows], targets.flatten(0, 1)[rows], masks)
    assert_close(masked, expected)


@pytest.mark.quick
@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("output", OUTPUTS)
def test_without_masked_patches_the_loss_and_its_gradients_are_0(output: str, module: ModuleType) -> None:
    student, masks, loss = logits(0, seed=1), torch.zeros(4, 5, dtype=torch.bool), made(module.iBOTPatchLoss)
    loss.update_center(given(logits(1, 6), output))
    for targets in (
        loss.softmax_center_teacher(given(logits(1, 0), output), TAU).squeeze(0),
        loss.sinkhorn_knopp_teacher(given(logits(0), output), TAU, torch.tensor([0])),
    ):
        value = loss.forward_masked(given(student, output), targets, masks, 0)
        assert value == 0
        (gradient,) = torch.autograd.grad(value, student.prototypes.weight)
        assert gradient.eq(0).all()
    before = loss.center.clone()
    loss.update_center(given(logits(1, 0), output))
    loss.apply_center_update()
    assert torch.equal(loss.center, before)


@pytest.mark.quick
@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("name", ["DINOLoss", "iBOTPatchLoss"])
@pytest.mark.parametrize("output", OUTPUTS)
def test_the_center_moves_when_targets_are_next_asked_for(output: str, name: str, module: ModuleType) -> None:
    loss, raw = made(getattr(module, name)), given(logits(1, 6), output)
    loss.update_center(raw)
    assert loss.center.eq(0).all(), "the update did not wait"
    if module is dinov3:
        loss.softmax_center_teacher(raw, TAU, update_centers=False)
        assert loss.center.eq(0).all(), "update_centers=False moved the centre"
    loss.softmax_center_teacher(raw, TAU)
    expected = 0.1 * logits(6).materialize().mean(dim=0)
    assert_close(loss.center.flatten(), expected)


def step_of(output: str, rule: str, rows: int, prototypes: int) -> None:
    """One step of both losses of DINOv2."""
    teacher, student = (given(logits(rows, prototypes=prototypes, seed=s, dtype=torch.float32), output) for s in (1, 2))
    cls, patches = dinov2.DINOLoss(prototypes), dinov2.iBOTPatchLoss(prototypes)
    masks = torch.ones(rows // 2, 2, dtype=torch.bool)
    if rule == "center":
        q, of_patches = cls.softmax_center_teacher(teacher, TAU), patches.softmax_center_teacher(teacher, TAU)
        cls.update_center(teacher)
        patches.update_center(teacher.unsqueeze(0))
    else:
        q = cls.sinkhorn_knopp_teacher(teacher, TAU)
        of_patches = patches.sinkhorn_knopp_teacher(teacher, TAU, torch.tensor([rows]))
    loss = cls(student.chunk(4), q.view(4, -1, prototypes)) + patches.forward_masked(student, of_patches, masks)
    loss.backward()


@pytest.mark.parametrize("rule", ["center", "sinkhorn"])
def test_unstored_steps_allocate_no_rows_by_prototypes(rule: str) -> None:
    rows, prototypes = 2600, 3001
    whole = 4 * rows * prototypes
    largest = allocations_of(lambda: step_of("unstored", rule, rows, prototypes)).largest
    assert largest < whole, f"{largest / 2**20:.0f} MiB at once; the logits of one network take {whole / 2**20:.0f}"
    stored = allocations_of(lambda: step_of("stored", rule, rows, prototypes)).largest
    assert stored >= whole, "negative control: stored logits go unseen"


@pytest.mark.quick
@pytest.mark.parametrize("eps", [1e-8, 1e-3])
def test_koleo_equals_the_published_formula(eps: float) -> None:
    x = torch.randn(9, 5, dtype=torch.float64, requires_grad=True)
    results = []
    for loss in (dinov2.KoLeoLoss(), dinov3.KoLeoLoss(), dinov3.KoLeoLossDistributed(), PublishedKoLeoLoss()):
        value = loss(x, eps)
        results.append(torch.cat([value[None], torch.autograd.grad(value, x)[0].flatten()]))
    for got in results[:-1]:
        assert_close(got, results[-1])


@pytest.mark.quick
@pytest.mark.parametrize("topk", [1, 3])
def test_distributed_koleo_averages_over_neighbours(topk: int) -> None:
    x = torch.randn(9, 5, dtype=torch.float64)
    assert_close(dinov3.KoLeoLossDistributed(topk)(x), PublishedKoLeoLoss(topk)(x))


@pytest.mark.quick
def test_koleo_of_equal_fp16_rows_is_finite_and_of_one_row_refused() -> None:
    assert dinov2.KoLeoLoss()(torch.ones(4, 8, dtype=torch.float16)).isfinite()
    with pytest.raises(ValueError, match=r"shape \(1, 8\); expected \[B, D\] with B >= 2 rows"):
        dinov2.KoLeoLoss()(torch.ones(1, 8))


@pytest.mark.quick
@pytest.mark.parametrize("module", MODULES)
def test_heads_take_any_leading_dims_half_precision_and_copies(module: ModuleType) -> None:
    head = module.DINOHead(6, PROTOTYPES, nlayers=2, hidden_dim=10, bottleneck_dim=DIM)
    x = torch.randn(2, 3, 6)
    assert head(x).shape == (2, 3, PROTOTYPES)
    assert_close(head(x).materialize().flatten(0, 1), head(x.flatten(0, 1)).materialize(), 1e-6)
    assert torch.equal(copy.deepcopy(head)(x).materialize(), head(x).materialize())
    zero = module.DINOHead(6, PROTOTYPES, nlayers=1, bottleneck_dim=DIM, mlp_bias=False).half()
    assert zero(torch.zeros(2, 6, dtype=torch.float16)).features.eq(0).all(), "a zero row was divided by 0"


@pytest.mark.quick
@pytest.mark.parametrize("module", MODULES)
def test_heads_start_as_published(module: ModuleType) -> None:
    head = module.DINOHead(64, 500)
    if module is dinov3:
        head.init_weights()
        assert head.last_layer.weight.std().item() == pytest.approx(0.02, rel=0.05)
    else:
        assert head.last_layer.weight_g.eq(1).all()
        assert head.last_layer.weight_g.requires_grad
        assert head.last_layer.weight_v.abs().max() <= 1 / 16  # nn.Linear's bound at 256 inputs
    assert [layer.weight.std().item() for layer in head.mlp[::2]] == pytest.approx([0.02] * 3, rel=0.05)
    assert all(layer.bias.eq(0).all() for layer in head.mlp[::2])


@pytest.mark.quick
@pytest.mark.parametrize("rule", ["center", "sinkhorn"])
def test_vmf_heads_add_each_network_s_normalizer(rule: str) -> None:
    sizes: dict[str, Any] = {"nlayers": 2, "hidden_dim": 10, "bottleneck_dim": DIM}
    student = dinov2.DINOvMFHead(6, PROTOTYPES, **sizes).double()
    assert isinstance(student.last_layer, PrototypeLayer)
    with torch.no_grad():
        student.last_layer.weight_g.uniform_(0.3, 3.0)
    plain, teacher = dinov2.DINOHead(6, PROTOTYPES, **sizes).double(), copy.deepcopy(student).requires_grad_(False)
    plain.load_state_dict(student.state_dict())
    assert isinstance(plain.last_layer, PrototypeLayer)
    assert isinstance(teacher.last_layer, PrototypeLayer)
    with torch.no_grad():
        teacher.last_layer.weight_g.mul_(1.1)
    loss, published = made(dinov2.DINOLoss), PublishedV2Loss(PROTOTYPES).double()
    x, student_norms, teacher_norms = torch.randn(5, 6).double(), plain.last_layer.weight_g, teacher.last_layer.weight_g
    raw = teacher(x).materialize()
    for each in (loss, published):
        each.update_center(raw)
    normalizer = exact_log_vmf_constant(teacher_norms[:, 0] / TAU, DIM) * TAU
    if rule == "center":
        targets, expected_targets = (
            loss.softmax_center_teacher(teacher(x), TAU),
            published.softmax_center_teacher(raw + normalizer, TAU),
        )
    else:
        targets, expected_targets = (
            loss.sinkhorn_knopp_teacher(teacher(x), TAU),
            published.sinkhorn_knopp_teacher(raw + normalizer, TAU),
        )
    got = loss([student(x)], [targets])
    of_student = plain(x).materialize() + 0.1 * exact_log_vmf_constant(student_norms[:, 0] / 0.1, DIM)
    expected = published([of_student], [expected_targets])
    assert_close(got, expected)
    got.backward()
    expected.backward()
    for (name, mine), theirs in zip(student.named_parameters(), plain.parameters(), strict=True):
        assert mine.grad is not None, name
        assert theirs.grad is not None, name
        assert_close(mine.grad, theirs.grad, 1e-9)
    without = loss([plain(x)], [targets])
    assert abs(without - got) > 1e-3, "negative control: the student's normaliser makes no difference"
