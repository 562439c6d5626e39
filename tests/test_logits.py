"""Logits that are never stored against the same operations on stored ones, and what they refuse.

Legend: R rows, K prototypes, D embedding dim.
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils import _pytree as pytree

from tests.measure import allocations_of
from vmf_kernels import DINOHead, DINOLoss, PrototypeLogits, linear_prototypes, weight_norm_prototypes
from vmf_kernels.unstored import UnstoredRows

ROWS, PROTOTYPES, DIM = 12, 7, 4
Operation = Callable[[Any], Any]


def make_logits(*rows: int, dtype: torch.dtype = torch.float64) -> Any:
    """PrototypeLogits; typed Any, as torch's functions are typed for tensors."""
    g, v = torch.randn(PROTOTYPES, 1, dtype=dtype), torch.randn(PROTOTYPES, DIM, dtype=dtype)
    features = torch.randn(*(rows or (ROWS,)), DIM, dtype=dtype, requires_grad=True)
    return PrototypeLogits(features, weight_norm_prototypes(g.requires_grad_(), v.requires_grad_()))


def stored(result: Any) -> list[Tensor]:
    """The result's parts, each as a stored tensor."""
    parts = result if isinstance(result, Sequence) and not isinstance(result, torch.Size) else [result]
    return [part.materialize() if isinstance(part, UnstoredRows) else part for part in parts]


def split_of_blocks(x: Any, sizes: list[int]) -> list[Any]:
    """What attention masks of variable length do to separate the tensors that they joined: [1, sum, K] to [1, size, K] each."""
    return [part.reshape([1, -1, *part.shape[2:]]) for part in x.split(sizes, dim=1)]


def by_image(x: Any) -> Any:
    """Rows [12, K] as [3, 4, K]: operations on the inner dim of rows."""
    return torch.stack(x.chunk(3))


MASK = torch.arange(ROWS) % 3 == 0
GRID = (torch.arange(ROWS) % 5 < 2).reshape(3, 4)
# each on rows [12, K]; `by_image` makes them [3, 4, K], a batch of patches
ROW_OPERATIONS: dict[str, Operation] = {
    "chunk": lambda x: x.chunk(3),
    "chunk-uneven": lambda x: x.chunk(5),
    "chunk-dim": lambda x: x.chunk(2, dim=-2),
    "split": lambda x: x.split(5),
    "split-sizes": lambda x: x.split([1, 0, 11]),
    "split-tuple": lambda x: x.split((4, 8), dim=0),
    "torch.chunk": lambda x: torch.chunk(x, 4, dim=0),
    "torch.split": lambda x: torch.split(x, 5),
    "torch.split-sizes": lambda x: torch.split(x, [5, 7], 0),
    "torch.cat-of-chunks": lambda x: torch.cat(x.chunk(4)[::-1]),
    "torch.concat": lambda x: torch.concat([x, x[:1]], dim=0),
    "torch.cat-unsqueezed": lambda x: torch.cat((x[None], x[None]), dim=1),
    "index-int": lambda x: x[3],
    "index-last": lambda x: x[-1],
    "slice": lambda x: x[2:9:2],
    "index-list": lambda x: x[[4, 0, 4]],
    "index-tensor": lambda x: x[torch.tensor([[3, 1], [0, 0]])],
    "mask": lambda x: x[MASK],
    "empty": lambda x: x[:0],
    "new-dim": lambda x: x[None, 2:5],
    "iterate": lambda x: list(x),
    "unsqueeze": lambda x: x.unsqueeze(0),
    "unsqueeze-inner": lambda x: x.unsqueeze(-2),
    "torch.unsqueeze": lambda x: torch.unsqueeze(x, 1),
    "squeeze": lambda x: x.unsqueeze(1).squeeze(1),
    "torch.squeeze": lambda x: torch.squeeze(x[None], 0),
    "squeeze-not-one": lambda x: x.squeeze(0),
    "flatten": lambda x: x.unsqueeze(1).flatten(0, 1),
    "torch.flatten": lambda x: torch.flatten(x[None], 0, 1),
    "flatten-split": lambda x: torch.cat([part[None] for part in x.chunk(3)]).flatten(0, -2),
    "index-inner": lambda x: torch.cat([part[None] for part in x.chunk(3)])[:, 1],
    "index-both": lambda x: torch.cat([part[None] for part in x.chunk(3)])[torch.tensor([0, 2]), 1:],
    "unbind": lambda x: x.unbind(),
    "torch.unbind": lambda x: torch.unbind(x, dim=-2),
    "split_with_sizes": lambda x: x.split_with_sizes([5, 7]),
    "torch.split_with_sizes": lambda x: torch.split_with_sizes(x, [5, 7], dim=0),
    "split-blocks": lambda x: split_of_blocks(x[None], [3, 9]),
    "pop": lambda x: split_of_blocks(x[None], [3, 9]).pop(0).squeeze(0)[:2],
    "index_select": lambda x: x.index_select(0, torch.tensor([3, 3, 11])),
    "torch.index_select-keywords": lambda x: torch.index_select(input=x, dim=0, index=torch.tensor([1])),
    "row-and-all-prototypes": lambda x: x[3, :],
    "ellipsis": lambda x: x[...],
    "ellipsis-first": lambda x: by_image(x)[..., :2, :],
    "ellipsis-new-dim": lambda x: x[None, ...],
    "class-token": lambda x: by_image(x)[:, 0],
    "patch-tokens": lambda x: by_image(x)[:, 1:],
    "mask-of-images-and-patches": lambda x: by_image(x)[GRID],
    "two-index-tensors": lambda x: by_image(x)[torch.tensor([0, 2]), torch.tensor([3, 1]), :],
    "unflatten": lambda x: x.unflatten(0, (3, 4)),
    "unflatten-list": lambda x: x.unflatten(0, [3, -1]),
    "unflatten-keywords": lambda x: by_image(x).unflatten(dim=-2, sizes=(2, 2)),
    "flatten-keywords": lambda x: by_image(x).flatten(start_dim=0, end_dim=1),
    "view": lambda x: x.view(3, -1, PROTOTYPES),
    "view-of-shape": lambda x: x.view(3, -1, *x.shape[1:]),
    "view-last-inferred": lambda x: x.view(3, 4, -1),
    "reshape": lambda x: by_image(x).reshape(-1, PROTOTYPES),
    "reshape-keyword": lambda x: torch.reshape(x, shape=(4, 3, PROTOTYPES)),
    "squeeze-all": lambda x: x[None, :, None].squeeze(),
    "squeeze-dims": lambda x: x[None, :, None].squeeze((0, 2)),
    "torch.stack": lambda x: torch.stack(x.chunk(3)),
    "torch.stack-inner": lambda x: torch.stack(list(x.chunk(3)), dim=1),
    "contiguous": lambda x: by_image(x)[:, 1:].contiguous(),
    "clone": lambda x: x.clone(),
    "to-dtype": lambda x: x.to(torch.float64),
    "to-device": lambda x: x.to("cpu"),
    "to-other": lambda x: x.to(torch.zeros(1, dtype=torch.float64)),
    "type": lambda x: x.type(torch.float64),
    "type-name": lambda x: (x.type(), x.type("torch.DoubleTensor").dtype),
    "detach": lambda x: x.detach(),
    "torch.detach": lambda x: torch.detach(x),
    "shape": lambda x: x.shape,
    "size": lambda x: x.size(),
    "size-dim": lambda x: (x.size(0), x.size(-1)),
    "sizes": lambda x: (len(x), x.dim(), x.ndim, x.shape[0] // 2),
    "numel": lambda x: (x.numel(), torch.numel(x), by_image(x).numel()),
    "is_floating_point": lambda x: (x.is_floating_point(), torch.is_floating_point(x)),
    "dtype": lambda x: x.dtype,
    "device": lambda x: x.device,
    "requires_grad": lambda x: (x.requires_grad, x.detach().requires_grad),
}


@pytest.mark.parametrize("name", ROW_OPERATIONS)
def test_row_operation_equals_that_on_stored_logits(name: str) -> None:
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


@pytest.mark.parametrize("name", HALF_OPERATIONS)
def test_a_cast_to_16_bits_gives_the_logits_of_rounded_features(name: str) -> None:
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


VALUE_OPERATIONS: dict[str, Operation] = {
    "softmax": lambda x: x.softmax(dim=-1),
    "functional.softmax": lambda x: functional.softmax(x, dim=-1),
    "torch.log_softmax": lambda x: torch.log_softmax(x, dim=-1),
    "functional.log_softmax": lambda x: functional.log_softmax(x, dim=-1),
    "functional.cross_entropy": lambda x: functional.cross_entropy(x, torch.zeros(ROWS, dtype=torch.int64)),
    "mean": lambda x: x.mean(dim=0),
    "torch.sum": lambda x: torch.sum(x, dim=0, keepdim=True),
    "torch.exp": lambda x: torch.exp(x),
    "argmax": lambda x: x.argmax(dim=1),
    "to-integers": lambda x: x.to(torch.int64),
    "view-as-another-dtype": lambda x: x.view(torch.int64),
    "max": lambda x: x.max(dim=1)[1],
    "einsum": lambda x: torch.einsum("bk,bk->b", x, x),
    "as-index-of-a-tensor": lambda x: torch.index_select(torch.zeros(3), 0, x),
    "transpose": lambda x: x.t(),
    "divide": lambda x: x / 0.1,
    "divide-a-number": lambda x: 1 / x,
    "add": lambda x: x + 1,
    "add-a-tensor": lambda x: x + torch.zeros(1, PROTOTYPES),
    "to-a-tensor": lambda x: torch.zeros(1, PROTOTYPES) + x,
    "subtract-a-center": lambda x: x - torch.zeros(1, PROTOTYPES),
    "from-a-tensor": lambda x: torch.zeros(1, PROTOTYPES) - x,
    "multiply": lambda x: x * x,
    "matmul": lambda x: x @ torch.zeros(PROTOTYPES, 2),
    "negate": lambda x: -x,
    "less": lambda x: x < 0,
    "in-place": lambda x: operator.itruediv(x, 0.1),
    "isnan": lambda x: torch.isnan(x),
}


@pytest.mark.parametrize("name", VALUE_OPERATIONS)
def test_an_operation_on_values_names_materialize(name: str) -> None:
    with pytest.raises((TypeError, AttributeError), match=r"\.materialize\(\)"):
        VALUE_OPERATIONS[name](make_logits())


PROTOTYPE_DIM_OPERATIONS: dict[str, Operation] = {
    "index": lambda x: x[0, 0],
    "slice": lambda x: x[:, :3],
    "ellipsis": lambda x: x[..., 0],
    "mask": lambda x: x[torch.ones(ROWS, PROTOTYPES, dtype=torch.bool)],
    "new-dim": lambda x: x[:, :, None],
    "chunk": lambda x: x.chunk(2, dim=1),
    "split": lambda x: x.split(2, dim=-1),
    "torch.cat": lambda x: torch.cat([x, x], dim=1),
    "unsqueeze": lambda x: x.unsqueeze(-1),
    "squeeze": lambda x: x.squeeze(-1),
    "flatten": lambda x: x.flatten(0, -1),
    "beyond": lambda x: x.chunk(2, dim=-3),
    "index-after-ellipsis": lambda x: x[..., 0, 2],
    "slice-after-ellipsis": lambda x: x[..., :-1],
    "new-dim-last": lambda x: x[..., None],
    "mask-of-prototypes": lambda x: x[:, torch.arange(PROTOTYPES) < 3],
    "index_select": lambda x: x.index_select(1, torch.tensor([0])),
    "unflatten": lambda x: x.unflatten(-1, (PROTOTYPES, 1)),
    "torch.stack": lambda x: torch.stack([x, x], dim=2),
    "view-flat": lambda x: x.view(-1),
    "view-other": lambda x: x.view(PROTOTYPES, ROWS),
    "view-last-inferred": lambda x: x.view(-1, -1),
    "reshape-nothing": lambda x: x.reshape(()),
    "iterate-a-row": lambda x: list(x[0]),
}


@pytest.mark.parametrize("name", PROTOTYPE_DIM_OPERATIONS)
def test_the_dim_of_prototypes_is_not_split(name: str) -> None:
    with pytest.raises((TypeError, ValueError, IndexError), match=r"holds the prototypes.*materialize\(\)"):
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
