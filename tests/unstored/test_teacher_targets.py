"""Targets that are never stored against stored probabilities, and the cross-entropy with them against its plain formula.

Legend: S / T student / teacher rows, G / V views, B images, K prototypes, D embedding dim.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils import _pytree as pytree

from tests.measure import relative_error
from tests.unstored.row_operations import PROTOTYPE_DIM_OPERATIONS, ROW_OPERATIONS, VALUE_OPERATIONS, stored
from vmf_kernels import (
    PrototypeLogits,
    Prototypes,
    linear_prototypes,
    log_vmf_constant,
    vmf_prototypes,
    weight_norm_vmf_prototypes,
)
from vmf_kernels.unstored.teacher_targets import TeacherTargets

pytestmark = pytest.mark.quick

ROWS, PROTOTYPES, DIM = 12, 7, 4
IMAGES, TEACHER_VIEWS, STUDENT_VIEWS = 3, 2, 5
STUDENT_TEMPERATURE, TEACHER_TEMPERATURE = 0.1, 0.06
KINDS = ["unstored", "stored"]


def make_prototypes(kind: str = "linear") -> Prototypes:
    weight = torch.randn(PROTOTYPES, DIM, dtype=torch.float64)
    if kind == "weight_norm_vmf":
        return weight_norm_vmf_prototypes(torch.rand(PROTOTYPES, 1, dtype=torch.float64) + 0.5, weight)
    return vmf_prototypes(weight) if kind == "vmf" else linear_prototypes(weight)


def make_logits(rows: int = ROWS, prototypes: Prototypes | None = None) -> PrototypeLogits:
    features = functional.normalize(torch.randn(rows, DIM, dtype=torch.float64), dim=1)
    return PrototypeLogits(features, make_prototypes() if prototypes is None else prototypes)


def make_targets(kind: str = "unstored", rows: int = ROWS) -> Any:
    """TeacherTargets; typed Any, as torch's functions are typed for tensors."""
    logits = make_logits(rows)
    bias = torch.randn(PROTOTYPES, dtype=torch.float64)
    return TeacherTargets(logits if kind == "unstored" else logits.materialize(), TEACHER_TEMPERATURE, bias)


@pytest.mark.parametrize("kind", KINDS)
def test_row_operation_equals_that_on_stored_probabilities(kind: str, subtests: pytest.Subtests) -> None:
    for name in ROW_OPERATIONS:
        with subtests.test(name):
            targets, do = make_targets(kind), ROW_OPERATIONS[name]
            got, expected = stored(do(targets)), stored(do(targets.materialize()))
            assert len(got) == len(expected)
            for one, other in zip(got, expected, strict=True):
                if not isinstance(other, Tensor):
                    assert one == other
                    continue
                assert (one.shape, one.dtype, one.requires_grad) == (other.shape, other.dtype, other.requires_grad)
                torch.testing.assert_close(one, other)


def test_wrong_rows_fail_the_comparison() -> None:
    """Negative control."""
    targets = make_targets()
    with pytest.raises(AssertionError):
        torch.testing.assert_close(targets[torch.arange(ROWS).flip(0)].materialize(), targets.materialize())


@pytest.mark.parametrize("kind", KINDS)
def test_an_operation_on_values_names_materialize(kind: str, subtests: pytest.Subtests) -> None:
    for name in [*VALUE_OPERATIONS, "half"]:
        with subtests.test(name):
            do = VALUE_OPERATIONS.get(name, lambda x: x.half())
            with pytest.raises((TypeError, AttributeError), match=r"\.materialize\(\)"):
                do(make_targets(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_the_dim_of_prototypes_is_not_split(kind: str, subtests: pytest.Subtests) -> None:
    for name in PROTOTYPE_DIM_OPERATIONS:
        with (
            subtests.test(name),
            pytest.raises((TypeError, ValueError, IndexError), match=r"holds the prototypes.*materialize\(\)"),
        ):
            PROTOTYPE_DIM_OPERATIONS[name](make_targets(kind))


@pytest.mark.parametrize("bias", ["centred", "none", "closed"])
@pytest.mark.parametrize("kind", ["linear", "vmf", "weight_norm_vmf"])
def test_targets_are_the_softmax_of_the_biased_logits(kind: str, bias: str) -> None:
    """A closed prototype has bias -inf and takes no row."""
    logits = make_logits(prototypes=make_prototypes(kind))
    added = torch.zeros(PROTOTYPES, dtype=torch.float64) if bias == "none" else torch.randn(PROTOTYPES).double()
    if bias == "closed":
        added[2] = -torch.inf
    norms = logits.prototypes.norms()
    normalizer = torch.zeros_like(norms) if kind == "linear" else log_vmf_constant(norms / TEACHER_TEMPERATURE, DIM)
    expected = (logits.materialize() / TEACHER_TEMPERATURE + normalizer + added).softmax(dim=-1)
    given = None if bias == "none" else added
    got = TeacherTargets(logits, TEACHER_TEMPERATURE, given).materialize()
    by_hand = TeacherTargets(logits.materialize(), torch.tensor(TEACHER_TEMPERATURE), normalizer + added).materialize()
    torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-12)
    # the temperature came as a tensor of fp32
    torch.testing.assert_close(by_hand, expected, rtol=1e-4, atol=1e-9)


def test_another_temperature_or_bias_fails_that_comparison() -> None:
    """Negative control."""
    logits = make_logits(prototypes=make_prototypes("vmf"))
    expected = TeacherTargets(logits, TEACHER_TEMPERATURE).materialize()
    without = PrototypeLogits(logits.features, logits.prototypes.without_vmf())
    for other in (TeacherTargets(logits, 0.07), TeacherTargets(without, TEACHER_TEMPERATURE)):
        assert relative_error(other.materialize(), expected) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_probabilities_of_short_logits_are_fp32(dtype: torch.dtype, kind: str) -> None:
    logits = PrototypeLogits(
        torch.randn(ROWS, DIM).to(dtype), linear_prototypes(torch.randn(PROTOTYPES, DIM).to(dtype))
    )
    targets: Any = TeacherTargets(logits if kind == "unstored" else logits.materialize(), 0.5)
    with torch.autocast("cpu", torch.bfloat16):
        q = targets.materialize()
    assert (targets.dtype, q.dtype, targets.float().logits.dtype) == (torch.float32, torch.float32, dtype)
    assert (targets.double().dtype, targets.double().float().logits.dtype) == (torch.float64, torch.float32)
    assert (q.sum(dim=-1) - 1).abs().max() < 1e-6


def test_no_gradient_reaches_the_teacher() -> None:
    weight = torch.randn(PROTOTYPES, DIM, requires_grad=True)
    logits = PrototypeLogits(torch.randn(ROWS, DIM, requires_grad=True), linear_prototypes(weight))
    for given in (logits, logits.materialize()):
        targets: Any = TeacherTargets(given, 0.1, torch.randn(PROTOTYPES))
        assert not any(x.requires_grad for x in (targets, targets.logits, targets.bias, targets.materialize()))
        assert targets.detach() is targets


@pytest.mark.parametrize(
    ("logits", "temperature", "bias", "said"),
    [
        (
            torch.zeros(3, 7, dtype=torch.int64),
            0.1,
            None,
            r"int64 of shape \(3, 7\); expected floating point \[..., K\]",
        ),
        (torch.zeros(()), 0.1, None, r"shape \(\); expected floating point"),
        (torch.zeros(3, 7), 0.1, torch.zeros(6), "bias has 6 elements; expected one for each of the 7 prototypes"),
        (torch.zeros(3, 7), 0.0, None, "temperature is 0.0; expected a number > 0"),
        (torch.zeros(3, 7), 0, None, "temperature is 0.0; expected a number > 0"),
        (torch.zeros(3, 7), torch.tensor([-0.5]), None, "temperature is -0.5; expected a number > 0"),
        (torch.zeros(3, 7), torch.tensor(math.nan), None, "temperature is nan; expected a number > 0"),
    ],
)
def test_targets_that_do_not_fit_are_refused(
    logits: Tensor, temperature: float | Tensor, bias: Tensor | None, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        TeacherTargets(logits, temperature, bias)


def test_cat_takes_parts_of_one_batch_and_equal_values() -> None:
    targets = make_targets()
    again: Any = TeacherTargets(targets.logits, targets.temperature, targets.bias.clone())
    whole: Any = torch.cat([targets[:5], again[5:]])
    torch.testing.assert_close(whole.materialize(), targets.materialize())


@pytest.mark.parametrize("join", [torch.cat, torch.stack])
@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"logits": make_logits()}, "different prototypes; expected rows of one head"),
        ({"logits": torch.zeros(ROWS, PROTOTYPES)}, "over PrototypeLogits and over Tensor; expected one kind"),
        ({"temperature": 0.07}, "temperatures 0.06 and 0.07; expected one"),
        ({"temperature": torch.tensor(0.06)}, "expected one"),
        ({"bias": None}, "different biases; expected one centre"),
        ({"bias": torch.zeros(PROTOTYPES, dtype=torch.float64)}, "different biases; expected one centre"),
    ],
    ids=["prototypes", "kind", "temperature", "temperature-tensor", "no-bias", "bias"],
)
def test_cat_of_different_targets_is_refused(changed: dict[str, Any], said: str, join: Any) -> None:
    targets = make_targets()
    fields = {"logits": targets.logits, "temperature": targets.temperature, "bias": targets.bias}
    with pytest.raises(ValueError, match=f"torch.{join.__name__} of TeacherTargets.*{said}"):
        join([targets, TeacherTargets(**{**fields, **changed})])


def test_cat_with_another_kind_is_refused() -> None:
    targets = make_targets()
    for other in (targets.materialize(), targets.logits):
        with pytest.raises(TypeError, match=r"torch.cat got \w+ and \w+; expected one kind"):
            torch.cat([targets, other])


def test_repr_copies_and_trees() -> None:
    targets = make_targets()
    assert repr(targets) == "TeacherTargets(shape=(12, 7), dtype=torch.float64, device=cpu, not stored)"
    assert torch.equal(copy.deepcopy(targets).materialize(), targets.materialize())
    leaves, structure = pytree.tree_flatten({"teacher": [targets]})
    back = pytree.tree_unflatten(leaves, structure)["teacher"][0]
    assert torch.equal(back.materialize(), targets.materialize())
    assert pytree.tree_unflatten([0] * len(leaves), structure)["teacher"][0].bias == 0


def test_moving_to_another_device_moves_everything() -> None:
    targets: Any = TeacherTargets(make_logits(), torch.tensor(0.1), torch.zeros(PROTOTYPES))
    moved = targets.to("meta")
    parts = (moved.logits, moved.logits.prototypes.weight, moved.temperature, moved.bias)
    assert [part.device.type for part in parts] == ["meta"] * 4


@pytest.mark.parametrize("normalizer", ["with_vmf", "without_vmf"])
@pytest.mark.parametrize("kind", ["linear", "weight_norm_vmf"])
def test_freed_prototypes_are_refused_not_read(kind: str, normalizer: str) -> None:
    prototypes = getattr(make_prototypes(kind), normalizer)()
    targets = TeacherTargets(make_logits(prototypes=prototypes), TEACHER_TEMPERATURE)
    assert targets.materialize().isfinite().all()
    assert isinstance(targets.logits, PrototypeLogits)
    targets.logits.prototypes.weight.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="has been freed"):
        targets.materialize()
