"""Logits that are never stored: features and prototypes that stand for their product."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from vmf_kernels.prototypes import Prototypes, refuse_freed, refuse_severed
from vmf_kernels.tensors import is_transforming, no_autocast, untransformed
from vmf_kernels.unstored.einops_backend import offer_to_einops
from vmf_kernels.unstored.reductions import Dims, Extreme, extreme, extreme_over_rows, split_dims, top, total
from vmf_kernels.unstored.row_index import advice
from vmf_kernels.unstored.rows import UnstoredRows
from vmf_kernels.unstored.same_layer import same_prototypes

Owner = TypeVar("Owner")
P = ParamSpec("P")
Result = TypeVar("Result")

REDUCTIONS = ("max", "min", "amax", "amin", "argmax", "argmin", "topk", "sum", "mean")


@dataclass(eq=False, repr=False)
class PrototypeLogits(UnstoredRows):
    """Stands for ``features @ prototypes.effective_weight().T``, the [..., K] logits of a head, without storing them.

    It behaves like that tensor in everything that training loops do between a head and its loss: ``shape``, ``dtype``,
    ``device``, every operation that moves, picks or joins rows (``UnstoredRows``, also ``einops``), ``float``, ``half``,
    ``to``, ``detach``. ``max``, ``min``, ``amax``, ``amin``, ``argmax``, ``argmin``, ``topk``, ``sum`` and ``mean`` work over
    the prototypes, over rows or over both, a tile of logits at a time, and are differentiable; but an extreme over rows only
    has no gradient, and raises if one is needed. Any other operation that needs the values raises and names
    ``materialize()``. A change of dtype changes the features: a cast to 16 bits rounds them and not the logits.

    Args:
        features: [..., D] L2-normalised bottleneck features.
        prototypes: K prototypes of dim D; logits are not divided by a temperature.

    Raises:
        ValueError: the features' last dim is not D.
        RuntimeError: the prototypes' memory has been freed (``refuse_freed``).

    Example:
        >>> head = DINOHead(in_dim=8, out_dim=512, hidden_dim=16, bottleneck_dim=4)
        >>> logits = torch.cat([head(torch.randn(2, 8)), head(torch.randn(4, 8))])[1:]  # rows, as of a tensor
        >>> tuple(logits.shape), torch.equal(logits.argmax(dim=1), logits.materialize().argmax(dim=1))
        ((5, 512), True)
    """

    # a dataclass, because DistributedDataParallel finds the tensors of a module's output in the fields of dataclasses
    features: Tensor
    prototypes: Prototypes

    def __post_init__(self) -> None:
        if not isinstance(self.features, Tensor):
            return  # torch rebuilds a module's outputs with other objects in place of their tensors
        offer_to_einops(PrototypeLogits)
        refuse_freed(self.prototypes.weight, self.prototypes.magnitude)
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
    def requires_grad(self) -> bool:
        """Whether the features or the prototypes require a gradient."""
        return self.features.requires_grad or self.prototypes.requires_grad

    def materialize(self) -> Tensor:
        """[..., K] the logits as a tensor, differentiable. It takes the memory that this class otherwise saves.

        They do not include the vMF normaliser, which depends on a temperature (``Prototypes.log_normalizer``).
        """
        refuse_severed(self.prototypes)
        dtype = torch.promote_types(self.features.dtype, self.prototypes.weight.dtype)
        # cast first, so that norms and effective prototypes are as exact as the features
        prototypes = replace(self.prototypes, weight=self.prototypes.weight.to(dtype))
        return (self.features.to(dtype) @ prototypes.effective_weight().T).to(self.dtype)

    def detach(self) -> PrototypeLogits:
        """Cut off from autograd."""
        return PrototypeLogits(self.features.detach(), self.prototypes.detach())

    def with_vmf(self) -> PrototypeLogits:
        """The same logits of von Mises-Fisher components: ``Prototypes.with_vmf``, which names the error."""
        return PrototypeLogits(self.features, self.prototypes.with_vmf())

    def max(self, dim: int | None = None, keepdim: bool = False, *, axis: int | None = None) -> Any:
        """As ``Tensor.max``: of all logits, or (values, indices) along a dim; the gradient goes to the logit at the index."""
        return self._ranked("max", dim if axis is None else axis, keepdim)

    def min(self, dim: int | None = None, keepdim: bool = False, *, axis: int | None = None) -> Any:
        """As ``Tensor.min``; gradients as ``max``."""
        return self._ranked("min", dim if axis is None else axis, keepdim)

    def amax(self, dim: Dims = (), keepdim: bool = False, *, axis: Dims = None) -> Tensor:
        """As ``Tensor.amax``; of equal logits, one gets the whole gradient (torch divides it among them)."""
        return self._extreme("amax", dim if axis is None else axis, keepdim)[0]

    def amin(self, dim: Dims = (), keepdim: bool = False, *, axis: Dims = None) -> Tensor:
        """As ``Tensor.amin``; gradients as ``amax``."""
        return self._extreme("amin", dim if axis is None else axis, keepdim)[0]

    def argmax(self, dim: int | None = None, keepdim: bool = False, *, axis: int | None = None) -> Tensor:
        """As ``Tensor.argmax``; the first of equal logits."""
        return self.detach()._extreme("argmax", dim if axis is None else axis, keepdim)[1]

    def argmin(self, dim: int | None = None, keepdim: bool = False, *, axis: int | None = None) -> Tensor:
        """As ``Tensor.argmin``; the first of equal logits."""
        return self.detach()._extreme("argmin", dim if axis is None else axis, keepdim)[1]

    def topk(self, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
        """As ``Tensor.topk`` over the prototypes."""
        if split_dims(dim, self.ndim)[0]:
            raise IndexError(
                f"topk over dim {dim} of PrototypeLogits of shape {tuple(self.shape)}; expected the last one, of the "
                f"prototypes: {advice('topk')}"
            )
        return torch.return_types.topk(top(self.features, self.prototypes, k, largest=largest, in_order=sorted))

    def sum(
        self, dim: Dims = None, keepdim: bool = False, *, dtype: torch.dtype | None = None, axis: Dims = None
    ) -> Tensor:
        """As ``Tensor.sum``, summed in fp32 (fp64)."""
        dims = dim if axis is None else axis
        _refuse_another(dims, "sum")
        rows, over_prototypes = split_dims(dims, self.ndim)
        result = total(self.features, self.prototypes, rows, over_prototypes=over_prototypes)
        if not keepdim:
            result = result.squeeze((*rows, *([self.ndim - 1] if over_prototypes else [])))
        return result.to(self.dtype if dtype is None else dtype)

    def mean(
        self, dim: Dims = None, keepdim: bool = False, *, dtype: torch.dtype | None = None, axis: Dims = None
    ) -> Tensor:
        """As ``Tensor.mean``, summed in fp32 (fp64)."""
        dims = dim if axis is None else axis
        wide = self.sum(dims, keepdim, dtype=torch.promote_types(self.dtype, torch.float32))
        mean = wide / (self.numel() / wide.numel() if wide.numel() else math.nan)
        return mean.to(self.dtype if dtype is None else dtype)

    def _ranked(self, name: str, dim: int | None, keepdim: bool) -> Any:
        found = self._extreme(name, dim, keepdim)
        return found[0] if dim is None else getattr(torch.return_types, name)(found)

    def _extreme(self, name: str, dims: Dims, keepdim: bool) -> Extreme:
        """(values, indices) of the extreme of ``name``; indices over several dims refer to these dims flattened."""
        _refuse_another(dims, name)
        rows, over_prototypes = split_dims(dims, self.ndim)
        if not over_prototypes:
            values, indices = extreme_over_rows(self.features, rows, self.prototypes, name)
        else:
            values, indices = extreme(self.features, self.prototypes, largest="max" in name)
            if dims is None or len(rows) == self.ndim - 1 > 0:
                flat = values.flatten()
                at = flat.detach().argmax() if "max" in name else flat.detach().argmin()
                values, indices = flat[at], at * self.prototypes.count + indices.flatten()[at]
            elif rows:
                values = values.amax(rows) if "max" in name else values.amin(rows)
        if keepdim:
            for dim in [*rows, *([self.ndim - 1] if over_prototypes else [])]:
                values, indices = values.unsqueeze(dim), indices.unsqueeze(dim)
        return values, indices

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[Any], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Also handles the function forms of the reductions."""
        name, options = getattr(func, "__name__", str(func)), dict(kwargs or {})
        if name in REDUCTIONS and options.get("out") is None:
            options.pop("out", None)
            first, *rest = args if args else (options.pop("input", None),)
            if isinstance(first, cls):
                return getattr(first, name)(*rest, **options)
        return super().__torch_function__(func, types, args, kwargs)

    @property
    def _rows(self) -> Tensor:
        return self.features

    def _with(self, rows: Tensor) -> PrototypeLogits:
        return PrototypeLogits(rows, self.prototypes)

    def _moved(self, device: torch.device, dtype: torch.dtype) -> PrototypeLogits:
        if not dtype.is_floating_point:
            raise TypeError(f"{dtype} values of PrototypeLogits: {advice(str(dtype))}")
        return PrototypeLogits(self.features.to(device, dtype), _on(self.prototypes, device))

    def _check_joins(self, other: PrototypeLogits, name: str) -> None:
        if not same_prototypes(self.prototypes, other.prototypes):
            raise ValueError(f"torch.{name} of PrototypeLogits with different prototypes; expected rows of one head")
        if self.prototypes.weight.requires_grad != other.prototypes.weight.requires_grad:
            raise ValueError(
                f"torch.{name} of PrototypeLogits, some detached and some not; expected all or none detached"
            )


def _refuse_another(dims: object, name: str) -> None:
    """Raise TypeError for ``torch.max(logits, other)`` and the like."""
    if isinstance(dims, (Tensor, UnstoredRows, float)):
        raise TypeError(f"{name} of PrototypeLogits and {type(dims).__name__}: {advice(name)}")


# so that torch finds the tensors inside when it walks a module's outputs (DistributedDataParallel, export)
torch.export.register_dataclass(Prototypes)
torch.export.register_dataclass(PrototypeLogits)


def project(prototypes: Prototypes, vector_D: Tensor) -> Tensor:
    """[K] ``<w_k, vector>`` in the dtype of ``vector_D`` ([D], fp32 or fp64), without casting all prototypes at once."""
    refuse_freed(prototypes.weight, prototypes.magnitude)
    block = 8192  # 8 MiB of fp32 at D = 256
    # a CPU multiplies by one vector on one thread, but by two columns on all: 1.9 against 9.5 ms at K = 65,536, two threads
    columns_DC = vector_D[:, None].expand(-1, 2 if vector_D.device.type == "cpu" else 1)
    with no_autocast(vector_D.device):  # the caller's autocast would round to half precision
        parts = [rows.to(vector_D.dtype) @ columns_DC for rows in torch.split(prototypes.weight.detach(), block)]
    projected = torch.cat(parts)[:, 0]
    gain = prototypes.detach().gain(vector_D.dtype)
    return projected if gain is None else projected * gain.to(projected.dtype)


def outside_transforms(method: Callable[Concatenate[Owner, P], Result]) -> Callable[Concatenate[Owner, P], Result]:
    """Decorates a method that changes a module's state: it runs outside ``torch.func``, which must not see the change."""

    @functools.wraps(method)
    def run(owner: Owner, /, *args: P.args, **kwargs: P.kwargs) -> Result:
        if not is_transforming():
            return method(owner, *args, **kwargs)
        plain: Any = [_untransformed(arg) for arg in args]
        named: Any = {name: _untransformed(arg) for name, arg in kwargs.items()}
        with temporarily_clear_interpreter_stack():
            return method(owner, *plain, **named)

    return run


def _untransformed(value: object) -> object:
    if isinstance(value, PrototypeLogits):
        stored = value.prototypes
        magnitude = None if stored.magnitude is None else untransformed(stored.magnitude)
        of = replace(stored, weight=untransformed(stored.weight), magnitude=magnitude)
        return PrototypeLogits(untransformed(value.features), of)
    return untransformed(value) if isinstance(value, Tensor) else value


def _on(prototypes: Prototypes, device: torch.device) -> Prototypes:
    """The same prototypes on a device, differentiable."""
    if prototypes.weight.device == device:
        return prototypes
    magnitude = None if prototypes.magnitude is None else prototypes.magnitude.to(device)
    return replace(prototypes, weight=prototypes.weight.to(device), magnitude=magnitude)
