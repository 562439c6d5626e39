"""Logits that are never stored: features and prototypes that stand for their product."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vmf_kernels.prototypes import Prototypes

PROTOTYPE_DIM = "the last dim holds the prototypes, which are never split"


@dataclass(eq=False, repr=False)
class PrototypeLogits:
    """Stands for ``features @ prototypes.effective_weight().T``, the [..., K] logits of a head, without storing them.

    It behaves as that tensor in what training loops do between a head and its loss: ``shape``, ``dtype``, ``device``,
    ``chunk``, ``split``, indexing of rows, ``unsqueeze``, ``squeeze``, ``flatten``, ``float``, ``detach``, ``torch.cat``.
    Anything that would need the values raises and names ``materialize()``.

    Args:
        features: [..., D] L2-normalised bottleneck features.
        prototypes: K prototypes of dim D; logits are not divided by a temperature.

    Raises:
        ValueError: the features' last dim is not D.
    """

    # a dataclass, because DistributedDataParallel looks for the tensors of a module's output in the fields of one
    features: Tensor
    prototypes: Prototypes

    def __post_init__(self) -> None:
        if not isinstance(self.features, Tensor):
            return  # a tree of something else in the shape of this one, as torch makes them of a module's outputs
        if self.features.ndim < 1 or self.features.shape[-1] != self.prototypes.dim:
            raise ValueError(
                f"features have shape {tuple(self.features.shape)} but the prototypes dim {self.prototypes.dim}; "
                "expected features [..., D] with that D"
            )

    @property
    def shape(self) -> torch.Size:
        """[..., K]."""
        return torch.Size((*self.features.shape[:-1], self.prototypes.count))

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the features."""
        return self.features.dtype

    @property
    def device(self) -> torch.device:
        """Device of the features."""
        return self.features.device

    @property
    def ndim(self) -> int:
        """Number of dims, the prototypes' included."""
        return self.features.ndim

    @property
    def requires_grad(self) -> bool:
        """Whether the features or the prototypes require a gradient."""
        magnitude = self.prototypes.magnitude
        stored = [self.features, self.prototypes.weight, *([] if magnitude is None else [magnitude])]
        return any(t.requires_grad for t in stored)

    def size(self, dim: int | None = None) -> torch.Size | int:
        """As ``Tensor.size``."""
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        """As ``Tensor.dim``."""
        return self.ndim

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"PrototypeLogits(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device!s}, not stored)"

    def materialize(self) -> Tensor:
        """[..., K] the stored logits, differentiable: the memory this class exists to save."""
        dtype = torch.promote_types(self.features.dtype, self.prototypes.weight.dtype)
        return (self.features.to(dtype) @ self.prototypes.effective_weight().to(dtype).T).to(self.dtype)

    def detach(self) -> PrototypeLogits:
        """Cut off from autograd."""
        return PrototypeLogits(self.features.detach(), self.prototypes.detach())

    def float(self) -> PrototypeLogits:
        """Features in fp32."""
        return self._with(self.features.float())

    def chunk(self, chunks: int, dim: int = 0) -> tuple[PrototypeLogits, ...]:
        """As ``Tensor.chunk`` along a dim of rows."""
        return self._many(self.features.chunk(chunks, self._row_dim(dim)))

    def split(self, split_size: int | Sequence[int], dim: int = 0) -> tuple[PrototypeLogits, ...]:
        """As ``Tensor.split`` along a dim of rows."""
        size = split_size if isinstance(split_size, int) else list(split_size)
        return self._many(torch.split(self.features, size, self._row_dim(dim)))

    def unsqueeze(self, dim: int) -> PrototypeLogits:
        """As ``Tensor.unsqueeze`` before the dim of prototypes."""
        return self._with(self.features.unsqueeze(self._row_dim(dim, extra=1)))

    def squeeze(self, dim: int) -> PrototypeLogits:
        """As ``Tensor.squeeze`` of a dim of rows."""
        return self._with(self.features.squeeze(self._row_dim(dim)))

    def flatten(self, start_dim: int = 0, end_dim: int = -2) -> PrototypeLogits:
        """As ``Tensor.flatten`` over dims of rows; the default flattens all of them."""
        return self._with(self.features.flatten(self._row_dim(start_dim), self._row_dim(end_dim)))

    def __getitem__(self, index: Any) -> PrototypeLogits:
        parts = index if isinstance(index, tuple) else (index,)
        used = sum(p.ndim if isinstance(p, Tensor) and p.dtype == torch.bool else p is not None for p in parts)
        if any(p is Ellipsis for p in parts) or used >= self.ndim:
            raise TypeError(
                f"PrototypeLogits of shape {tuple(self.shape)} got the index {index!r}; expected one over rows only "
                f"({PROTOTYPE_DIM}); materialize() gives the stored logits"
            )
        return self._with(self.features[index])

    def __iter__(self) -> Any:
        return (self[row] for row in range(len(self)))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        raise AttributeError(f"PrototypeLogits has no {name!r}: {_advice(name)}")

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """torch.cat and the function forms of the methods above; anything else raises."""
        options = kwargs or {}
        if func in (torch.cat, torch.concat, torch.concatenate):
            return cat(*args, **options)
        name = getattr(func, "__name__", str(func))
        if name in ROW_FUNCTIONS:
            return getattr(args[0], name)(*args[1:], **options)
        raise TypeError(f"torch.{name} on PrototypeLogits: {_advice(name)}")

    def _row_dim(self, dim: int, extra: int = 0) -> int:
        resolved = dim if dim >= 0 else dim + self.ndim + extra
        if not 0 <= resolved < self.ndim - 1 + extra:
            raise IndexError(
                f"dim {dim} of PrototypeLogits of shape {tuple(self.shape)} is not a dim of rows ({PROTOTYPE_DIM}); "
                "materialize() gives the stored logits"
            )
        return resolved

    def _with(self, features: Tensor) -> PrototypeLogits:
        return PrototypeLogits(features, self.prototypes)

    def _many(self, parts: Sequence[Tensor]) -> tuple[PrototypeLogits, ...]:
        return tuple(self._with(part) for part in parts)


# so that the tensors inside are found wherever torch walks a module's outputs (DistributedDataParallel, export)
torch.export.register_dataclass(Prototypes)
torch.export.register_dataclass(PrototypeLogits)

ROW_FUNCTIONS = ("chunk", "split", "unsqueeze", "squeeze", "flatten", "detach")
OPERATORS = (
    *(f"{side}{name}" for name in ("add", "sub", "mul", "truediv", "floordiv", "pow", "matmul") for side in ("", "r")),
    *("neg", "abs", "lt", "le", "gt", "ge"),
)


def _refusal(name: str) -> Callable[..., Any]:
    def refuse(self: PrototypeLogits, *others: Any) -> Any:
        raise TypeError(f"operator {name} on PrototypeLogits: {_advice(name)}")

    return refuse


for _operator in OPERATORS:
    # Python looks operators up on the class, where ``__getattr__`` is never asked
    setattr(PrototypeLogits, f"__{_operator}__", _refusal(_operator))


def cat(tensors: Sequence[PrototypeLogits], dim: int = 0) -> PrototypeLogits:
    """``torch.cat`` along a dim of rows of logits that share their prototypes.

    Raises:
        TypeError: one of them is a stored tensor.
        ValueError: they come from different prototypes, or only some are detached.
    """
    stored = [t for t in tensors if not isinstance(t, PrototypeLogits)]
    if stored:
        raise TypeError(f"torch.cat got PrototypeLogits and {type(stored[0]).__name__}; expected one kind")
    first = tensors[0]
    for other in tensors[1:]:
        if not _same_prototypes(first.prototypes, other.prototypes):
            raise ValueError("torch.cat of PrototypeLogits with different prototypes; expected rows of one head")
        if first.prototypes.weight.requires_grad != other.prototypes.weight.requires_grad:
            raise ValueError("torch.cat of PrototypeLogits, some detached and some not; expected all or none detached")
    return first._with(torch.cat([t.features for t in tensors], dim=first._row_dim(dim)))


def project(prototypes: Prototypes, vector_D: Tensor) -> Tensor:
    """[K] ``<w_k, vector>`` in the dtype of ``vector_D`` ([D], fp32 or fp64), without casting all prototypes at once."""
    block = 8192  # 8 MiB of fp32 at D = 256
    with torch.autocast(vector_D.device.type, enabled=False):  # a region of the caller's would round to half precision
        parts = [rows.to(vector_D.dtype) @ vector_D for rows in torch.split(prototypes.weight.detach(), block)]
    projected = torch.cat(parts)
    gain = prototypes.detach().gain()
    return projected if gain is None else projected * gain.to(projected.dtype)


def _same_prototypes(one: Prototypes, other: Prototypes) -> bool:
    """Whether both stand for one layer, detached or not."""
    if one.kind != other.kind or one.weight.shape != other.weight.shape:
        return False
    pairs = ((one.weight, other.weight), (one.magnitude, other.magnitude))
    return all(a is b or (a is not None and b is not None and a.data_ptr() == b.data_ptr() != 0) for a, b in pairs)


def _advice(name: str) -> str:
    return f"the [rows, K] logits are not stored; call .materialize() first if {name} really needs their values"
