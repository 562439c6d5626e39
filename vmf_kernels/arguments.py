"""Checks and conversions of arguments that several operators share.

Legend: R rows, K prototypes, D embedding dim.
"""

from __future__ import annotations

from numbers import Integral

import torch
from torch import Tensor

from vmf_kernels.prototypes import Prototypes
from vmf_kernels.tensors import is_readable


def is_whole(value: object) -> bool:
    """Whether a count is an int of Python or of numpy. A function of its own, as type checkers take neither for Integral."""
    return isinstance(value, Integral)


def temperature_tensor(value: float | Tensor, name: str, device: torch.device) -> Tensor:
    """[] float64 temperature on ``device``: a tensor, so that a schedule neither recompiles nor re-captures.

    Raises:
        ValueError: not positive (a CUDA tensor is not checked, because that would wait for the device), or not one element.
    """
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name} has {value.numel()} elements; expected 1")
        if is_readable(value) and not value.item() > 0:
            raise ValueError(f"{name} is {value.item()}; expected a number > 0")
        if value.ndim == 0 and value.dtype == torch.float64 and value.device == device and not value.requires_grad:
            return value
        return value.detach().reshape(()).to(device=device, dtype=torch.float64)
    if not value > 0:
        raise ValueError(f"{name} is {value}; expected a number > 0")
    return torch.scalar_tensor(value, dtype=torch.float64, device=device)


def check_features(features: Tensor, prototypes: Prototypes, name: str) -> None:
    """Raise ValueError unless ``features`` is a floating-point [R, D] matrix that fits the prototypes."""
    if not isinstance(prototypes, Prototypes):
        raise ValueError(
            f"{name} prototypes are a {type(prototypes).__name__}; expected Prototypes, for example "
            "linear_prototypes(weight)"
        )
    if hasattr(prototypes.weight, "placements"):
        raise ValueError(
            f"{name} prototypes are sharded (a DTensor): they are read outside the head's forward pass; expected "
            "head.unshard() before, or prototypes of weight.full_tensor()"
        )
    if features.ndim != 2 or not features.is_floating_point():
        raise ValueError(
            f"{name} features are {features.dtype} of shape {tuple(features.shape)}; "
            "expected a floating-point matrix [rows, D]"
        )
    if features.shape[1] != prototypes.dim:
        raise ValueError(
            f"{name} features have {features.shape[1]} columns but the {name} prototypes have "
            f"{prototypes.dim}; both must be the embedding dim D"
        )
    if features.device != prototypes.weight.device:
        raise ValueError(
            f"{name} features are on {features.device} but the {name} prototypes on "
            f"{prototypes.weight.device}; expected one device"
        )


def check_bias(bias: Tensor | None, count: int, name: str) -> None:
    """Raise ValueError unless ``bias`` is None or has one element for each of ``count`` prototypes."""
    if bias is not None and bias.numel() != count:
        raise ValueError(f"{name} has {bias.numel()} elements; expected one for each of the {count} prototypes")


def in_autocast_dtype(features: Tensor) -> Tensor:
    """The features as a linear last layer would see them: under autocast on a GPU, fp32 features are cast to its dtype.

    On a CPU, fp32 features keep fp32 products, also under autocast.
    """
    kind = features.device.type
    if kind == "cuda" and features.dtype == torch.float32 and torch.is_autocast_enabled(kind):
        return features.to(torch.get_autocast_dtype(kind))
    return features
