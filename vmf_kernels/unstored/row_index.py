"""Dims and indices of a [..., K] tensor in which only rows can be moved and picked.

Legend: K prototypes, the last dim.
"""

from __future__ import annotations

from typing import Any

import torch

PROTOTYPE_DIM = "the last dim holds the prototypes, which are never split"
STORED = f"{PROTOTYPE_DIM}; materialize() gives the stored values"
_PROBABILITIES = "TeacherTargets(logits, temperature) stands for a detached softmax of logits"
_ALL_FINITE = "max() and min() of logits are NaN if any logit is, and one of them is infinite if any logit is"
_MOMENTS = "mean, max, min, topk and sum of logits need no stored values"
# operations that training loops use, and what does the same; by name
INSTEAD = {
    **dict.fromkeys(("softmax", "log_softmax"), _PROBABILITIES),
    **dict.fromkeys(("isnan", "isinf", "isfinite"), _ALL_FINITE),
    **dict.fromkeys(("std", "var", "norm", "linalg_norm", "linalg_vector_norm", "median", "quantile"), _MOMENTS),
    **dict.fromkeys(("item", "tolist", "numpy"), _MOMENTS),
}


def advice(name: str) -> str:
    """What a user can do instead of an operation that needs values."""
    instead = INSTEAD.get(name)
    return (
        f"the [rows, K] values are not stored; losses take them as they are (temperature, centre and softmax are applied "
        f"there); {'' if instead is None else instead + '; '}call .materialize() first if {name} really needs them"
    )


def row_dim(dim: int, shape: torch.Size, kind: str, extra: int = 0) -> int:
    """A dim of rows, counted from 0, in a shape to which ``extra`` dims will be added.

    Raises:
        IndexError: it is the dim of prototypes, or does not exist.
    """
    resolved = dim if dim >= 0 else dim + len(shape) + extra
    if not 0 <= resolved < len(shape) - 1 + extra:
        raise IndexError(f"dim {dim} of {kind} of shape {tuple(shape)} is not a dim of rows ({STORED})")
    return resolved


def row_order(dims: tuple[int, ...], shape: torch.Size, kind: str) -> tuple[int, ...]:
    """The order of the dims of rows in a permutation of all dims.

    Raises:
        ValueError: the prototypes do not stay last.
    """
    resolved = tuple(dim % len(shape) if -len(shape) <= dim < len(shape) else dim for dim in dims)
    if sorted(resolved) != list(range(len(shape))) or resolved[-1] != len(shape) - 1:
        raise ValueError(
            f"{kind} of shape {tuple(shape)} cannot be permuted as {tuple(dims)}; expected every dim once, and the last in its "
            f"place ({STORED})"
        )
    return resolved[:-1]


def row_sizes(sizes: tuple[int, ...], shape: torch.Size, kind: str, done: str) -> tuple[int, ...]:
    """Sizes without the last one, which must be K or -1 (unchanged).

    Raises:
        ValueError: the last size is something else.
    """
    if len(sizes) == 0 or sizes[-1] not in (-1, shape[-1]):
        raise ValueError(
            f"{kind} of shape {tuple(shape)} cannot be {done} {tuple(sizes)}; expected sizes of rows, then {shape[-1]} "
            f"({STORED})"
        )
    return tuple(sizes[:-1])


def row_index(index: Any, shape: torch.Size, kind: str) -> tuple[Any, ...]:
    """The index without ``...``, and without a last slice that takes all prototypes.

    Raises:
        TypeError: the index picks some of the prototypes.
    """
    parts = list(index) if isinstance(index, tuple) else [index]
    used = sum(_dims_used(part) for part in parts)
    for place, part in enumerate(parts):
        if part is Ellipsis:
            parts[place : place + 1] = [slice(None)] * (len(shape) - used)
            used = len(shape)
            break
    last = parts[-1] if parts else None
    if used == len(shape) and isinstance(last, slice) and last.indices(shape[-1]) == (0, shape[-1], 1):
        return tuple(parts[:-1])
    if used >= len(shape):
        raise TypeError(
            f"{kind} of shape {tuple(shape)} got the index {index!r}; expected one over rows only ({STORED})"
        )
    return tuple(parts)


def _dims_used(part: Any) -> int:
    """How many dims of the tensor a part of an index consumes; a mask consumes as many as it has."""
    if part is None or part is Ellipsis:
        return 0
    if isinstance(part, (int, slice)):
        return 1
    values = torch.as_tensor(part, device="cpu") if not isinstance(part, torch.Tensor) else part
    return values.ndim if values.dtype in (torch.bool, torch.uint8) else 1
