"""Logits that are never stored against the same operations on stored ones, and what they refuse.

Legend: R rows, K prototypes, D embedding dim.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tests.measure import allocations_of
from tests.unstored.row_operations import (
    DIM,
    PROTOTYPE_DIM_OPERATIONS,
    PROTOTYPES,
    ROW_OPERATIONS,
    ROWS,
    VALUE_OPERATIONS,
    Operation,
    make_logits,
    stored,
)
from vmf_kernels import DINOHead, DINOLoss, PrototypeLogits, linear_prototypes

pytestmark = pytest.mark.quick


def test_row_operation_equals_that_on_stored_logits(subtests: pytest.Subtests) -> None:
    for name in ROW_OPERATIONS:
        with subtests.test(name):
            logits, do = make_logits(), ROW_OPERATIONS[name]
            got, expected = stored(do(logits)), stored(do(logits.materialize()))
            assert len(got) == len(expected)
            for one, other in zip(got, expected, strict=True):
                if not isinstance(other, Tensor):
                    assert one == other
                    continue
                assert (one.shape, one.dtype, one.requires_grad) == (other.shape, other.dtype, other.requires_grad)
                torch.testing.assert_close(one, other)


HALF_OPERATIONS: dict[str, Operation] = {
    "half": lambda x: x.half(),
    "bfloat16": lambda x: x.bfloat16(),
    "to-dtype": lambda x: x.to(torch.float16),
    "type": lambda x: x.type(torch.float16),
    "type-name": lambda x: x.type("torch.BFloat16Tensor"),
}


def test_a_cast_to_16_bits_gives_the_logits_of_rounded_features(subtests: pytest.Subtests) -> None:
    for name in HALF_OPERATIONS:
        with subtests.test(name):
            logits, do = make_logits(), HALF_OPERATIONS[name]
            got, expected = do(logits), do(logits.materialize())
            assert got.dtype == expected.dtype
            error = (got.materialize().double() - logits.materialize()).abs().max()
            budget = 32 * torch.finfo(expected.dtype).eps * logits.features.norm(dim=1).max()
            assert 0 < error <= budget, f"{error} against a budget of {budget}"


def test_a_cast_keeps_gradients() -> None:
    logits = make_logits()
    logits.float().materialize().sum().backward()
    assert logits.features.grad.dtype == torch.float64
    assert logits.features.grad.norm() > 0


def test_moving_to_another_device_moves_the_prototypes() -> None:
    moved = make_logits().to("meta")
    assert {t.device.type for t in (moved.features, moved.prototypes.weight, moved.prototypes.magnitude)} == {"meta"}
    assert moved.materialize().shape == (ROWS, PROTOTYPES)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_float_gives_fp32_logits_of_the_same_rows(dtype: torch.dtype) -> None:
    logits = make_logits(dtype=dtype)
    got, expected = logits.float(), logits.materialize().float()
    assert (got.dtype, got.materialize().dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(got.materialize(), expected, rtol=0, atol=8 * torch.finfo(dtype).eps)


def test_wrong_values_fail_the_comparison() -> None:
    """Negative control: rows in another order are other logits."""
    logits = make_logits()
    with pytest.raises(AssertionError):
        torch.testing.assert_close(logits[torch.arange(ROWS).flip(0)].materialize(), logits.materialize())


def test_gradients_flow_through_row_operations_to_features_and_prototypes() -> None:
    logits = make_logits()
    leaves = [logits.features, logits.prototypes.weight, logits.prototypes.magnitude]
    weights = torch.randn(ROWS, PROTOTYPES, dtype=torch.float64)
    joined: Any = torch.cat(logits.chunk(3)[::-1])
    shuffled = joined.materialize()
    expected = torch.cat(logits.materialize().chunk(3)[::-1])
    for one, other in zip(
        torch.autograd.grad((shuffled * weights).sum(), leaves),
        torch.autograd.grad((expected * weights).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_an_operation_on_values_names_materialize(subtests: pytest.Subtests) -> None:
    for name in VALUE_OPERATIONS:
        with subtests.test(name), pytest.raises((TypeError, AttributeError), match=r"\.materialize\(\)"):
            VALUE_OPERATIONS[name](make_logits())


def test_the_dim_of_prototypes_is_not_split(subtests: pytest.Subtests) -> None:
    for name in PROTOTYPE_DIM_OPERATIONS:
        with (
            subtests.test(name),
            pytest.raises((TypeError, ValueError, IndexError), match=r"holds the prototypes.*materialize\(\)"),
        ):
            PROTOTYPE_DIM_OPERATIONS[name](make_logits())


@pytest.mark.parametrize("join", [torch.cat, torch.stack])
def test_cat_of_two_heads_is_refused(join: Operation) -> None:
    with pytest.raises(
        ValueError, match=f"torch.{join.__name__} of .* different prototypes; expected rows of one head"
    ):
        join([make_logits(), make_logits()])


def test_a_single_prototype_is_not_squeezed() -> None:
    logits: Any = PrototypeLogits(torch.randn(1, 1, DIM), linear_prototypes(torch.randn(1, DIM)))
    assert logits.squeeze().shape == (1,)
    assert logits.squeeze().squeeze().shape == (1,)


@pytest.mark.parametrize("strides", ["transposed", "sliced"])
def test_features_of_any_strides_can_be_viewed(strides: str) -> None:
    """Stored logits are contiguous whatever their features were."""
    whole = torch.randn(3, 6, DIM)
    features = whole.transpose(0, 1) if strides == "transposed" else whole[:, 1:]
    logits: Any = PrototypeLogits(features, linear_prototypes(torch.randn(PROTOTYPES, DIM)))
    torch.testing.assert_close(logits.view(-1, PROTOTYPES).materialize(), logits.materialize().view(-1, PROTOTYPES))


def test_cat_with_stored_logits_is_refused() -> None:
    logits = make_logits()
    with pytest.raises(TypeError, match=r"torch.cat got PrototypeLogits and Tensor; expected one kind"):
        torch.cat([logits, logits.materialize()])


def test_cat_of_attached_and_detached_logits_is_refused() -> None:
    """One of the two would get the other's gradient at the prototypes."""
    logits = make_logits()
    for pair in ([logits, logits.detach()], [logits.detach(), logits]):
        with pytest.raises(ValueError, match="some detached and some not"):
            torch.cat(pair)
    assert not torch.cat([logits.detach(), logits.detach()]).requires_grad


@pytest.mark.parametrize("shape", [(3, DIM + 1), (), (DIM, 3)])
def test_features_of_another_dim_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"but the prototypes dim {DIM}; expected features \[..., D\]"):
        PrototypeLogits(torch.randn(shape), linear_prototypes(torch.randn(PROTOTYPES, DIM)))


def test_repr_says_what_it_is() -> None:
    text = repr(make_logits(2, 3))
    assert text == "PrototypeLogits(shape=(2, 3, 7), dtype=torch.float64, device=cpu, not stored)"


def test_private_names_are_ordinary_attribute_errors() -> None:
    """Libraries probe for protocols; copying and hasattr must work."""
    logits = make_logits()
    assert not hasattr(logits, "__cuda_array_interface__")
    assert not hasattr(logits, "exp")
    assert torch.equal(copy.copy(logits).features, logits.features)
    assert copy.deepcopy(logits.detach()).shape == logits.shape


def test_pytree_keeps_the_logits_whole() -> None:
    logits = make_logits()
    leaves, structure = pytree.tree_flatten({"student": [logits], "n": 1})
    back = pytree.tree_unflatten(leaves, structure)
    assert back["student"][0].features is logits.features


def test_logits_too_large_to_store_cost_nothing() -> None:
    """[2^16, 2^20] logits would take 256 GiB."""
    features = torch.zeros(2**16, 2).requires_grad_()
    weight = torch.zeros(2**20, 2)

    def handle() -> Any:
        logits: Any = PrototypeLogits(features, linear_prototypes(weight))
        parts = torch.cat(logits.chunk(4)).float().split(2**15)
        return parts[0][:5].unsqueeze(0).flatten(0, 1).detach()

    assert handle().shape == (5, 2**20)
    largest = allocations_of(handle).largest
    assert largest <= features.nbytes, f"{largest / 2**20:.1f} MiB allocated at once"


def test_head_on_the_meta_device_gives_shapes() -> None:
    with torch.device("meta"):
        logits = DINOHead(8, 2**20, nlayers=1, bottleneck_dim=16)(torch.empty(2**12, 8))
    assert logits.shape == (2**12, 2**20)
    assert logits.device.type == "meta"


class MultiCrop(nn.Module):
    """How training loops wrap backbone and head: one backbone pass per resolution, one head pass over all crops."""

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, crops: list[Tensor]) -> Any:
        sizes = torch.tensor([crop.shape[-1] for crop in crops])
        ends = sizes.unique_consecutive(return_counts=True)[1].cumsum(0)
        start, features = 0, torch.empty(0)
        for end in ends.tolist():
            features = torch.cat((features, self.backbone(torch.cat(crops[start:end]))))
            start = end
        return self.head(features)


def test_multi_crop_loop_runs_end_to_end() -> None:
    backbone = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())
    student = MultiCrop(backbone, DINOHead(12, 50, nlayers=2, hidden_dim=8, bottleneck_dim=6))
    crops = [torch.randn(3, 3, 8, 8) for _ in range(2)] + [torch.randn(3, 3, 4, 4) for _ in range(3)]
    out = student(crops)
    per_crop = [student.head(backbone(crop)) for crop in crops]
    loss = DINOLoss(50, 5, 0.04, 0.04, 0, 1)(out, student(crops[:2]).detach(), 0)
    loss.backward()
    assert out.shape == (15, 50)
    for got, expected in zip(out.chunk(5), per_crop, strict=True):
        torch.testing.assert_close(got.materialize(), expected.materialize())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in student.parameters() if p.requires_grad)
