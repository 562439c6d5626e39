"""Whether the prototypes of two outputs belong to one layer, even if wrappers have copied them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vmf_kernels.prototypes import Prototypes
from vmf_kernels.tensors import has_memory

# autograd nodes that wrappers add to a module's outputs; DistributedDataParallel's sink has all outputs as its inputs
SINKS = ("_DDPSinkBackward",)
COPIES = ("ViewBackward0", "AliasBackward0", "CloneBackward0", "ToCopyBackward0")
MOST_NODES = (
    200  # of a graph that computes prototypes from parameters: a few for weight norm, a mask, a parametrization
)


def same_prototypes(one: Prototypes, other: Prototypes) -> bool:
    """Whether both belong to one layer, detached or not.

    If both are the layer's own tensors, their memory is the same. Wrappers of modules (DistributedDataParallel, FSDP2,
    Lightning's Fabric) return a copy at each call, and a pruned or parametrized layer computes its prototypes at each call;
    then autograd's graph must lead to the same parameters. Copies without a graph are compared by value, which waits for a
    GPU.
    """
    if one.kind != other.kind or one.weight.shape != other.weight.shape:
        return False
    if one.weight.requires_grad != other.weight.requires_grad and not _same_memory(one.weight, other.weight):
        return False
    # the norms of several layers may all be 1, so if the directions are the same, equal norms are accepted
    return _same_tensor(one.weight, other.weight, most=1) and _same_tensor(
        one.magnitude, other.magnitude, most=MOST_NODES
    )


def _same_tensor(a: Tensor | None, b: Tensor | None, most: int) -> bool:
    if a is None or b is None or a is b:
        return a is b
    if not has_memory(a) or not has_memory(b):
        return True  # traced: only the shapes are known
    if _same_memory(a, b):
        return True
    if not (a.requires_grad and b.requires_grad):
        return a.device == b.device and torch.equal(a, b)
    return _same_source(a, b, most)


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return has_memory(a) and has_memory(b) and a.data_ptr() == b.data_ptr() != 0


def _same_source(a: Tensor, b: Tensor, most: int) -> bool:
    """Whether both come from the same parameters by the same operations; a copy may come from one of up to ``most``."""
    copied = [_copied_from(x) for x in (a, b)]
    if all(copied):
        # if several parameters went through one sink, take the one that the copy equals
        left = [found if len(found) == 1 else _equal_to(x, found) for found, x in zip(copied, (a, b), strict=True)]
        return 1 <= len(left[0]) <= most and {*map(id, left[0])} == {*map(id, left[1])}
    return _same_computation(a.grad_fn, b.grad_fn) and torch.equal(a, b)


def _equal_to(tensor: Tensor, parameters: list[Tensor]) -> list[Tensor]:
    return [p for p in parameters if torch.equal(p.to(tensor.dtype), tensor)]


def _copied_from(tensor: Tensor) -> list[Tensor]:
    """The parameters of the same shape that a tensor may be a view or copy of; none if it was computed."""
    return [tensor] if tensor.grad_fn is None else _parameters(tensor.grad_fn, tensor.shape)


def _parameters(node: Any, shape: torch.Size) -> list[Tensor]:
    if node is None:
        return []
    if node.name() in SINKS:
        found = [p for edge, _ in node.next_functions for p in _parameters(edge, shape)]
        return list({id(p): p for p in found}.values())
    if node.name() in COPIES:
        return _parameters(node.next_functions[0][0], shape)
    variable: Tensor | None = getattr(node, "variable", None)
    return [] if variable is None or variable.shape != shape else [variable]


def _same_computation(one: Any, other: Any) -> bool:
    """Whether two graphs have the same operations in the same order on the same parameters."""
    waiting, seen = [(one, other)], 0
    while waiting:
        a, b = waiting.pop()
        seen += 1
        if a is None or b is None or seen > MOST_NODES:
            if a is b:
                continue
            return False
        variables = getattr(a, "variable", None), getattr(b, "variable", None)
        if a.name() != b.name() or variables[0] is not variables[1] or len(a.next_functions) != len(b.next_functions):
            return False
        edges = list(zip(a.next_functions, b.next_functions, strict=True))
        if any(x[1] != y[1] for x, y in edges):
            return False
        waiting.extend((x[0], y[0]) for x, y in edges)
    return True
