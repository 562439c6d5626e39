"""Logits that are never stored: features and prototypes that stand for their product."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vmf_kernels.prototypes import Prototypes, refuse_freed
from vmf_kernels.unstored import UnstoredRows, advice


@dataclass(eq=False, repr=False)
class PrototypeLogits(UnstoredRows):
    """Stands for ``features @ prototypes.effective_weight().T``, the [..., K] logits of a head, without storing them.

    It behaves as that tensor in what training loops do between a head and its loss: ``shape``, ``dtype``, ``device``,
    ``chunk``, ``split``, ``unbind``, indexing of rows, ``index_select``, ``unsqueeze``, ``squeeze``, ``flatten``,
    ``unflatten``, ``view``, ``reshape``, ``float``, ``half``, ``to``, ``detach``, ``torch.cat``, ``torch.stack``.
    Anything that would need the values raises and names ``materialize()``. A change of dtype is one of the features, so a
    cast to 16 bits rounds them and not the logits.

    Args:
        features: [..., D] L2-normalised bottleneck features.
        prototypes: K prototypes of dim D; logits are not divided by a temperature.

    Raises:
        ValueError: the features' last dim is not D.
        RuntimeError: the prototypes' memory has been freed (``refuse_freed``).
    """

    # a dataclass, because DistributedDataParallel looks for the tensors of a module's output in the fields of one
    features: Tensor
    prototypes: Prototypes

    def __post_init__(self) -> None:
        if not isinstance(self.features, Tensor):
            return  # a tree of something else in the shape of this one, as torch makes them of a module's outputs
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
        magnitude = self.prototypes.magnitude
        stored = [self.features, self.prototypes.weight, *([] if magnitude is None else [magnitude])]
        return any(t.requires_grad for t in stored)

    def materialize(self) -> Tensor:
        """[..., K] the stored logits, differentiable: the memory this class exists to save."""
        dtype = torch.promote_types(self.features.dtype, self.prototypes.weight.dtype)
        # widened first: norms and effective prototypes are as exact as the features are
        prototypes = replace(self.prototypes, weight=self.prototypes.weight.to(dtype))
        return (self.features.to(dtype) @ prototypes.effective_weight().T).to(self.dtype)

    def detach(self) -> PrototypeLogits:
        """Cut off from autograd."""
        return PrototypeLogits(self.features.detach(), self.prototypes.detach())

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


# so that the tensors inside are found wherever torch walks a module's outputs (DistributedDataParallel, export)
torch.export.register_dataclass(Prototypes)
torch.export.register_dataclass(PrototypeLogits)


def project(prototypes: Prototypes, vector_D: Tensor) -> Tensor:
    """[K] ``<w_k, vector>`` in the dtype of ``vector_D`` ([D], fp32 or fp64), without casting all prototypes at once."""
    refuse_freed(prototypes.weight, prototypes.magnitude)
    block = 8192  # 8 MiB of fp32 at D = 256
    # a CPU multiplies by a vector on one thread, by two columns on all: 1.9 against 9.5 ms at K = 65,536 with two threads
    columns_DC = vector_D[:, None].expand(-1, 2 if vector_D.device.type == "cpu" else 1)
    with torch.autocast(vector_D.device.type, enabled=False):  # a region of the caller's would round to half precision
        parts = [rows.to(vector_D.dtype) @ columns_DC for rows in torch.split(prototypes.weight.detach(), block)]
    projected = torch.cat(parts)[:, 0]
    gain = prototypes.detach().gain(vector_D.dtype)
    return projected if gain is None else projected * gain.to(projected.dtype)


def same_prototypes(one: Prototypes, other: Prototypes) -> bool:
    """Whether both stand for one layer, detached or not."""
    if one.kind != other.kind or one.weight.shape != other.weight.shape:
        return False
    pairs = ((one.weight, other.weight), (one.magnitude, other.magnitude))
    return all(a is b or (a is not None and b is not None and a.data_ptr() == b.data_ptr() != 0) for a, b in pairs)


def _on(prototypes: Prototypes, device: torch.device) -> Prototypes:
    """The same prototypes on a device, differentiable."""
    if prototypes.weight.device == device:
        return prototypes
    magnitude = None if prototypes.magnitude is None else prototypes.magnitude.to(device)
    return replace(prototypes, weight=prototypes.weight.to(device), magnitude=magnitude)
