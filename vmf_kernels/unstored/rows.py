"""The operations of training loops on [..., K] tensors between a head and its loss, for rows that stand for such a tensor.

Every operation acts only on dims of rows: the K values of a row are not computed, so they cannot be split or reordered.

Legend: K prototypes, N numbers stored for a row (K, or the dim of its features).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from vmf_kernels.unstored.casts import Casts
from vmf_kernels.unstored.row_index import PROTOTYPE_DIM, advice, row_dim, row_index, row_order, row_sizes

JOINS = dict.fromkeys(("cat", "concat", "concatenate", "vstack", "row_stack"), torch.cat) | {"stack": torch.stack}
ROW_FUNCTIONS = (
    *("chunk", "split", "split_with_sizes", "tensor_split", "unbind", "unsqueeze", "squeeze", "flatten", "unflatten"),
    *(
        "reshape",
        "transpose",
        "swapaxes",
        "swapdims",
        "permute",
        "movedim",
        "moveaxis",
        "flip",
        "roll",
        "narrow",
        "select",
    ),
    *("index_select", "repeat_interleave", "broadcast_to", "detach", "clone", "numel", "is_floating_point"),
)
# attributes and methods of a tensor that do not depend on its values
OF_ANY_VALUES = (
    *("new_empty", "new_zeros", "new_ones", "new_full", "new_tensor", "element_size", "itemsize", "layout"),
    *("is_sparse", "is_quantized", "is_nested", "is_meta", "is_complex", "is_signed"),
)
OPERATORS = (
    *(f"{side}{name}" for name in ("add", "sub", "mul", "truediv", "floordiv", "pow", "matmul") for side in ("", "r")),
    *("neg", "abs", "lt", "le", "gt", "ge", "eq", "ne"),
)


class UnstoredRows(Casts):
    """Behaves like a [..., K] tensor in operations on its rows; operations that need the values raise.

    A subclass has ``shape``, ``dtype``, ``requires_grad``, ``detach``, ``materialize`` and the hooks below. ``view`` is
    ``reshape`` here: features may have other strides than the logits would have, and are copied if a view is impossible.
    """

    @property
    def _rows(self) -> Tensor:
        """[..., N] the stored rows."""
        raise NotImplementedError

    def _with(self, rows: Tensor) -> Self:
        """The same object with other stored rows."""
        raise NotImplementedError

    def _check_joins(self, other: Self, name: str) -> None:
        """Raise ValueError unless the rows of both can be joined in one object."""
        raise NotImplementedError

    @property
    def shape(self) -> torch.Size:
        """[..., K]."""
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        """Dtype that the stored values would have."""
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
        """Number of dims, including that of the prototypes."""
        return self._rows.ndim

    def size(self, dim: int | None = None) -> torch.Size | int:
        """As ``Tensor.size``."""
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        """As ``Tensor.dim``."""
        return self.ndim

    def numel(self) -> int:
        """As ``Tensor.numel``: the number of elements if the values were stored."""
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
        """As ``Tensor.squeeze`` of dims of rows; by default all of size 1, but never the dim of a single prototype."""
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
        """As ``Tensor.reshape`` to sizes that end in K, or in a -1 that means K."""
        asked: Sequence[Any] = sizes if shape is None else shape
        if len(asked) == 1 and isinstance(asked[0], Sequence):
            asked = asked[0]
        if any(isinstance(size, torch.dtype) for size in asked):
            raise TypeError(f"view of {self._kind} as another dtype: {advice('view')}")
        # without this check, torch could infer another size than K for a last -1
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

    def swapaxes(self, axis0: int, axis1: int) -> Self:
        """As ``transpose``."""
        return self.transpose(axis0, axis1)

    def swapdims(self, dim0: int, dim1: int) -> Self:
        """As ``transpose``."""
        return self.transpose(dim0, dim1)

    def permute(self, *sizes: Any, dims: Any = None) -> Self:
        """As ``Tensor.permute``, with the prototypes still last."""
        dims = sizes if dims is None else tuple(dims)
        return self._with(self._rows.permute(*row_order(_unpacked(dims), self.shape, self._kind), self.ndim - 1))

    def movedim(self, source: int | Sequence[int], destination: int | Sequence[int]) -> Self:
        """As ``Tensor.movedim`` of dims of rows."""
        ends = [
            [self._row_dim(d) for d in (side if isinstance(side, Sequence) else (side,))]
            for side in (source, destination)
        ]
        return self._with(self._rows.movedim(*ends))

    def moveaxis(self, source: int | Sequence[int], destination: int | Sequence[int]) -> Self:
        """As ``movedim``."""
        return self.movedim(source, destination)

    def flip(self, *places: Any, dims: Any = None) -> Self:
        """As ``Tensor.flip`` along dims of rows."""
        dims = places if dims is None else (dims,)
        return self._with(self._rows.flip([self._row_dim(dim) for dim in _unpacked(dims)]))

    def roll(self, shifts: int | Sequence[int], dims: int | Sequence[int]) -> Self:
        """As ``Tensor.roll`` along dims of rows."""
        resolved = [self._row_dim(dim) for dim in (dims if isinstance(dims, Sequence) else (dims,))]
        return self._with(self._rows.roll(shifts, resolved))

    def repeat(self, *sizes: Any) -> Self:
        """As ``Tensor.repeat`` of rows; the last number must be 1."""
        asked = _unpacked(sizes)
        if not asked or asked[-1] != 1:
            raise ValueError(f"{self._kind} repeated {asked} times; expected 1 for the last dim ({PROTOTYPE_DIM})")
        return self._with(self._rows.repeat(*asked))

    def repeat_interleave(self, repeats: int | Tensor, dim: int, *, output_size: int | None = None) -> Self:
        """As ``Tensor.repeat_interleave`` along a dim of rows."""
        return self._with(self._rows.repeat_interleave(repeats, self._row_dim(dim), output_size=output_size))

    def expand(self, *sizes: Any, size: Any = None) -> Self:
        """As ``Tensor.expand`` of dims of rows; the last size is K or -1."""
        sizes = sizes if size is None else tuple(size)
        return self._with(self._rows.expand(*row_sizes(_unpacked(sizes), self.shape, self._kind, "expanded to"), -1))

    def broadcast_to(self, size: Sequence[int]) -> Self:
        """As ``expand``."""
        return self.expand(*size)

    def expand_as(self, other: Any) -> Self:
        """As ``expand``, to the shape of a tensor or of an object that stands for one."""
        return self.expand(*other.shape)

    def view_as(self, other: Any) -> Self:
        """As ``reshape``, to the shape of a tensor or of an object that stands for one."""
        return self.reshape(*other.shape)

    def reshape_as(self, other: Any) -> Self:
        """As ``view_as``."""
        return self.reshape(*other.shape)

    def select(self, dim: int, index: int) -> Self:
        """As ``Tensor.select`` along a dim of rows."""
        return self._with(self._rows.select(self._row_dim(dim), index))

    def tensor_split(self, indices_or_sections: Any, dim: int = 0) -> tuple[Self, ...]:
        """As ``Tensor.tensor_split`` along a dim of rows."""
        return self._many(self._rows.tensor_split(indices_or_sections, dim=self._row_dim(dim)))

    def narrow(self, dim: int, start: int, length: int) -> Self:
        """As ``Tensor.narrow`` along a dim of rows."""
        return self._with(self._rows.narrow(self._row_dim(dim), start, length))

    def index_select(self, dim: int, index: Tensor) -> Self:
        """As ``Tensor.index_select`` along a dim of rows."""
        return self._with(self._rows.index_select(self._row_dim(dim), index))

    def __getitem__(self, index: Any) -> Self:
        return self._with(self._rows[row_index(index, self.shape, self._kind)])

    def __iter__(self) -> Iterator[Self]:
        return iter(self.unbind(0))

    def contiguous(self, **options: Any) -> Self:
        """The rows, contiguous."""
        return self._with(self._rows.contiguous())

    def ndimension(self) -> int:
        """As ``dim``."""
        return self.ndim

    def is_contiguous(self) -> bool:
        """Whether the stored rows are contiguous."""
        return self._rows.is_contiguous()

    @property
    def data(self) -> Self:
        """As ``detach``."""
        return self.detach()

    def detach(self) -> Self:
        """Cut off from autograd."""
        raise NotImplementedError

    def nelement(self) -> int:
        """As ``numel``."""
        return self.numel()

    def get_device(self) -> int:
        """As ``Tensor.get_device``."""
        return self._rows.get_device()

    def clone(self, **options: Any) -> Self:
        """A copy of the rows; prototypes are shared."""
        return self._with(self._rows.clone())

    def __array__(self, *args: Any, **options: Any) -> Any:
        raise TypeError(f"{self._kind} as an array: {advice('numpy')}")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        if name in OF_ANY_VALUES:
            return getattr(self._probe(), name)
        raise AttributeError(f"{self._kind} has no {name!r}: {advice(name)}")

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[Any], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Handles the function forms of the methods above, torch.cat and torch.stack; any other function raises."""
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
            TypeError: the objects are of different types.
            ValueError: they differ in prototypes, temperature or bias.
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

    def _many(self, parts: Sequence[Tensor]) -> tuple[Self, ...]:
        return tuple(self._with(part) for part in parts)

    def _row_dim(self, dim: int, extra: int = 0) -> int:
        return row_dim(dim, self.shape, self._kind, extra)


def _unpacked(sizes: tuple[Any, ...]) -> tuple[int, ...]:
    """Sizes or dims as separate numbers, from either form that torch accepts: separate numbers or one sequence."""
    return tuple(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], Sequence) else sizes


def _refusal(name: str) -> Callable[..., Any]:
    def refuse(self: UnstoredRows, *others: Any) -> Any:
        raise TypeError(f"operator {name} on {type(self).__name__}: {advice(name)}")

    return refuse


for _operator in OPERATORS:
    # Python looks operators up on the class and does not call ``__getattr__`` for them
    setattr(UnstoredRows, f"__{_operator}__", _refusal(_operator))
