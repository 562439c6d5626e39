"""By name, operations that unstored rows support as stored ones do, and operations that need values and are refused."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from vmf_kernels import PrototypeLogits, weight_norm_prototypes
from vmf_kernels.unstored.rows import UnstoredRows

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
    "transpose": lambda x: by_image(x).transpose(0, 1),
    "torch.transpose": lambda x: torch.transpose(by_image(x), 1, -3),
    "narrow": lambda x: by_image(x).narrow(1, 1, 2),
    "torch.cat-axis": lambda x: torch.cat([x, x], axis=0),  # type: ignore[call-arg]  # NumPy's name, which torch takes too
    "cpu": lambda x: (x.cpu(), x.is_cuda),
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

VALUE_OPERATIONS: dict[str, Operation] = {
    "softmax": lambda x: x.softmax(dim=-1),
    "functional.softmax": lambda x: functional.softmax(x, dim=-1),
    "torch.log_softmax": lambda x: torch.log_softmax(x, dim=-1),
    "functional.log_softmax": lambda x: functional.log_softmax(x, dim=-1),
    "functional.cross_entropy": lambda x: functional.cross_entropy(x, torch.zeros(ROWS, dtype=torch.int64)),
    "torch.exp": lambda x: torch.exp(x),
    "to-integers": lambda x: x.to(torch.int64),
    "view-as-another-dtype": lambda x: x.view(torch.int64),
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
    "in-place": lambda x: operator.itruediv(x, 0.1),  # type: ignore[no-untyped-call]
    "isnan": lambda x: torch.isnan(x),
}

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
