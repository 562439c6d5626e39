"""What training loops do to [..., K] tensors between a head and its loss, on rows that stand for such a tensor.

Every operation acts on dims of rows only: the K values of a row are never formed, so they cannot be split or reordered.

Legend: K prototypes, N width of what is stored for a row (K itself, or the dim of its features).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

import torch
from torch import Tensor

PROTOTYPE_DIM = "the last dim holds the prototypes, which are never split"
JOINS = {"cat": torch.cat, "concat": torch.cat, "concatenate": torch.cat, "stack": torch.stack}
_PROBABILITIES = "TeacherTargets(logits, temperature) stands for a detached softmax of logits"
_ALL_FINITE = "max() and min() of logits are NaN where one of them is, and infinite where one is and none is NaN"
_MOMENTS = "mean, max, min, topk and sum of logits need no stored values"
# operations that loops are written with, and what does the same; by name
INSTEAD = {
    **dict.fromkeys(("softmax", "log_softmax"), _PROBABILITIES),
    **dict.fromkeys(("isnan", "isinf", "isfinite"), _ALL_FINITE),
    **dict.fromkeys(("std", "var", "norm", "linalg_norm", "linalg_vector_norm", "median", "quantile"), _MOMENTS),
    **dict.fromkeys(("item", "tolist", "numpy"), _MOMENTS),
}
ROW_FUNCTIONS = (
    *("chunk", "split", "split_with_sizes", "unbind", "unsqueeze", "squeeze", "flatten", "unflatten", "reshape"),
    *("transpose", "narrow", "index_select", "detach", "clone", "numel", "is_floating_point"),
)
OPERATORS = (
    *(f"{side}{name}" for name in ("add", "sub", "mul", "truediv", "floordiv", "pow", "matmul") for side in ("", "r")),
    *("neg", "abs", "lt", "le", "gt", "ge"),
)


class UnstoredRows:
    """Behaves as a [..., K] tensor in operations on its rows; anything that needs the values raises.

    A class of this kind has ``shape``, ``dtype``, ``requires_grad``, ``detach``, ``materialize`` and the hooks below.
    ``view`` is ``reshape`` here: features of other strides than the logits would have are copied where a view is not possible.
    """

    @property
    def _rows(self) -> Tensor:
        """[..., N] what stands for the rows."""
        raise NotImplementedError

    def _with(self, rows: Tensor) -> Self:
        """The same kind over other rows."""
        raise NotImplementedError

    def _moved(self, device: torch.device, dtype: torch.dtype) -> Self:
        """The same rows on a device, their values in a floating dtype."""
        raise NotImplementedError

    def _check_joins(self, other: Self, name: str) -> None:
        """Raise ValueError unless the rows of both can stand side by side in one object."""
        raise NotImplementedError

    @property
    def shape(self) -> torch.Size:
        """[..., K]."""
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        """Dtype the stored values would have."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """Device of the rows."""
        return self._rows.device

    @property
    def is_cuda(self) -> bool:
        """Whether the rows are on a GPU."""
        return self._rows.is_cuda

    @property
    def ndim(self) -> int:
        """Number of dims, the prototypes' included."""
        return self._rows.ndim

    def size(self, dim: int | None = None) -> torch.Size | int:
        """As ``Tensor.size``."""
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        """As ``Tensor.dim``."""
        return self.ndim

    def numel(self) -> int:
        """As ``Tensor.numel``: elements that storing would take."""
        return math.prod(self.shape)

    def is_floating_point(self) -> bool:
        """True."""
        return True

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"{self._kind}(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device!s}, not stored)"

    def chunk(self, chunks: int, dim: int = 0) -> tuple[Self, ...]:
        """As ``Tensor.chunk`` along a dim of rows."""
        return self._many(self._rows.chunk(chunks, self._row_dim(dim)))

    def split(self, split_size: int | Sequence[int], dim: int = 0) -> tuple[Self, ...]:
        """As ``Tensor.split`` along a dim of rows."""
        size = list(split_size) if isinstance(split_size, Sequence) else split_size
        return self._many(torch.split(self._rows, size, self._row_dim(dim)))

    def split_with_sizes(self, split_sizes: Sequence[int], dim: int = 0) -> tuple[Self, ...]:
        """As ``Tensor.split_with_sizes`` along a dim of rows."""
        return self.split(split_sizes, dim)

    def unbind(self, dim: int = 0) -> tuple[Self, ...]:
        """As ``Tensor.unbind`` along a dim of rows."""
        return self._many(self._rows.unbind(self._row_dim(dim)))

    def unsqueeze(self, dim: int) -> Self:
        """As ``Tensor.unsqueeze`` before the dim of prototypes."""
        return self._with(self._rows.unsqueeze(self._row_dim(dim, extra=1)))

    def squeeze(self, dim: int | Sequence[int] | None = None) -> Self:
        """As ``Tensor.squeeze`` of dims of rows; the default takes all of size 1, never that of a single prototype."""
        dims = range(self.ndim - 1) if dim is None else dim if isinstance(dim, Sequence) else (dim,)
        resolved = tuple(self._row_dim(d) for d in dims)
        return self._with(self._rows.squeeze(resolved)) if resolved else self

    def flatten(self, start_dim: int = 0, end_dim: int = -2) -> Self:
        """As ``Tensor.flatten`` over dims of rows; the default flattens all of them."""
        return self._with(self._rows.flatten(self._row_dim(start_dim), self._row_dim(end_dim)))

    def unflatten(self, dim: int, sizes: Sequence[int]) -> Self:
        """As ``Tensor.unflatten`` of a dim of rows."""
        return self._with(torch.unflatten(self._rows, self._row_dim(dim), tuple(sizes)))

    def reshape(self, *sizes: Any, shape: Sequence[int] | None = None) -> Self:
        """As ``Tensor.reshape`` to sizes that end in K, or in a -1 that is K."""
        asked: Sequence[Any] = sizes if shape is None else shape
        if len(asked) == 1 and isinstance(asked[0], Sequence):
            asked = asked[0]
        if any(isinstance(size, torch.dtype) for size in asked):
            raise TypeError(f"view of {self._kind} as another dtype: {advice('view')}")
        # without this check, -1 last would hide the prototypes in what torch infers
        whole = len(asked) > 0 and asked[-1] == -1 and math.prod(asked[:-1]) == self._rows.shape[:-1].numel()
        if len(asked) == 0 or not (whole or asked[-1] == self.shape[-1]):
            raise ValueError(
                f"{self._kind} of shape {tuple(self.shape)} cannot be viewed as {tuple(asked)}; expected sizes of rows, "
                f"then {self.shape[-1]} ({PROTOTYPE_DIM}); materialize() gives the stored values"
            )
        return self._with(self._rows.reshape(*asked[:-1], self._rows.shape[-1]))

    def view(self, *sizes: Any) -> Self:
        """As ``reshape``."""
        return self.reshape(*sizes)

    def transpose(self, dim0: int, dim1: int) -> Self:
        """As ``Tensor.transpose`` of two dims of rows."""
        return self._with(self._rows.transpose(self._row_dim(dim0), self._row_dim(dim1)))

    def narrow(self, dim: int, start: int, length: int) -> Self:
        """As ``Tensor.narrow`` along a dim of rows."""
        return self._with(self._rows.narrow(self._row_dim(dim), start, length))

    def index_select(self, dim: int, index: Tensor) -> Self:
        """As ``Tensor.index_select`` along a dim of rows."""
        return self._with(self._rows.index_select(self._row_dim(dim), index))

    def __getitem__(self, index: Any) -> Self:
        return self._with(self._rows[self._row_index(index)])

    def __iter__(self) -> Iterator[Self]:
        return iter(self.unbind(0))

    def contiguous(self) -> Self:
        """The rows, contiguous."""
        return self._with(self._rows.contiguous())

    def clone(self) -> Self:
        """A copy of the rows; prototypes are shared."""
        return self._with(self._rows.clone())

    def to(self, *args: Any, **options: Any) -> Self:
        """As ``Tensor.to``; values of another dtype are those that a head with such features would give."""
        probe = self._probe().to(*args, **options)  # torch's own reading of the many forms
        return self._moved(probe.device, probe.dtype)

    def type(self, dtype: Any = None) -> Any:
        """As ``Tensor.type``."""
        if dtype is None:
            return self._probe().type()
        probe = self._probe().type(dtype)
        return self._moved(probe.device, probe.dtype)

    def cpu(self) -> Self:
        """On the CPU."""
        return self._moved(torch.device("cpu"), self.dtype)

    def cuda(self, device: Any = None) -> Self:
        """On a GPU."""
        return self.to(
            "cuda" if device is None else torch.device("cuda", device) if isinstance(device, int) else device
        )

    def float(self) -> Self:
        """Values in fp32."""
        return self._moved(self.device, torch.float32)

    def double(self) -> Self:
        """Values in fp64."""
        return self._moved(self.device, torch.float64)

    def half(self) -> Self:
        """Values in fp16."""
        return self._moved(self.device, torch.float16)

    def bfloat16(self) -> Self:
        """Values in bf16."""
        return self._moved(self.device, torch.bfloat16)

    def __array__(self, *args: Any, **options: Any) -> Any:
        raise TypeError(f"{self._kind} as an array: {advice('numpy')}")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        raise AttributeError(f"{self._kind} has no {name!r}: {advice(name)}")

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[Any], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Function forms of the methods above, torch.cat and torch.stack; anything else raises."""
        options = dict(kwargs or {})
        name = getattr(func, "__name__", str(func))
        if name in JOINS:
            return cls._join(name, *args, **options)
        if name in ROW_FUNCTIONS:
            first, *rest = args if args else (options.pop("input", None),)
            if isinstance(first, cls):
                return getattr(first, name)(*rest, **options)
        raise TypeError(f"torch.{name} on {cls.__name__}: {advice(name)}")

    @classmethod
    def _join(cls, name: str, tensors: Sequence[Self], dim: int = 0, *, axis: int | None = None) -> Self:
        """``torch.cat`` or ``torch.stack`` along a dim of rows.

        Raises:
            TypeError: one of them is of another kind.
            ValueError: they do not share what makes values of their rows.
        """
        others = [t for t in tensors if not isinstance(t, cls)]
        if others:
            raise TypeError(f"torch.{name} got {cls.__name__} and {type(others[0]).__name__}; expected one kind")
        first = tensors[0]
        for other in tensors[1:]:
            first._check_joins(other, name)
        resolved = first._row_dim(dim if axis is None else axis, extra=1 if name == "stack" else 0)
        return first._with(JOINS[name]([t._rows for t in tensors], dim=resolved))

    @property
    def _kind(self) -> str:
        return type(self).__name__

    def _probe(self) -> Tensor:
        return torch.empty(0, dtype=self.dtype, device=self.device)

    def _many(self, parts: Sequence[Tensor]) -> tuple[Self, ...]:
        return tuple(self._with(part) for part in parts)

    def _row_dim(self, dim: int, extra: int = 0) -> int:
        resolved = dim if dim >= 0 else dim + self.ndim + extra
        if not 0 <= resolved < self.ndim - 1 + extra:
            raise IndexError(
                f"dim {dim} of {self._kind} of shape {tuple(self.shape)} is not a dim of rows ({PROTOTYPE_DIM}); "
                "materialize() gives the stored values"
            )
        return resolved

    def _row_index(self, index: Any) -> tuple[Any, ...]:
        """The index without ``...`` and without a slice that takes all prototypes."""
        parts = list(index) if isinstance(index, tuple) else [index]
        used = sum(_dims_used(part) for part in parts)
        for place, part in enumerate(parts):
            if part is Ellipsis:
                parts[place : place + 1] = [slice(None)] * (self.ndim - used)
                used = self.ndim
                break
        last = parts[-1] if parts else None
        if used == self.ndim and isinstance(last, slice) and last.indices(self.shape[-1]) == (0, self.shape[-1], 1):
            return tuple(parts[:-1])
        if used >= self.ndim:
            raise TypeError(
                f"{self._kind} of shape {tuple(self.shape)} got the index {index!r}; expected one over rows only "
                f"({PROTOTYPE_DIM}); materialize() gives the stored values"
            )
        return tuple(parts)


def advice(name: str) -> str:
    """What to do about an operation that needs values."""
    instead = INSTEAD.get(name)
    return (
        f"the [rows, K] values are not stored; losses take them as they are (temperature, centre and softmax are applied "
        f"there); {'' if instead is None else instead + '; '}call .materialize() first if {name} really needs them"
    )


def _dims_used(part: Any) -> int:
    """How many dims of the tensor a part of an index takes: a mask as many as it has."""
    if part is None or part is Ellipsis:
        return 0
    if isinstance(part, (int, slice)):
        return 1
    values = torch.as_tensor(part)
    return values.ndim if values.dtype in (torch.bool, torch.uint8) else 1


def _refusal(name: str) -> Callable[..., Any]:
    def refuse(self: UnstoredRows, *others: Any) -> Any:
        raise TypeError(f"operator {name} on {type(self).__name__}: {advice(name)}")

    return refuse


for _operator in OPERATORS:
    # Python looks operators up on the class, where ``__getattr__`` is never asked
    setattr(UnstoredRows, f"__{_operator}__", _refusal(_operator))
