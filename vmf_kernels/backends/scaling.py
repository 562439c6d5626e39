"""A gradient computed in forward, times the incoming one, in place."""

from __future__ import annotations

import torch
from torch import Tensor

from vmf_kernels.backends.triton.launch import unsupported_device


def scale_in_place(gradient: Tensor, scale: Tensor) -> Tensor:
    """``gradient`` times ``scale`` (a [] tensor), in place; on a GPU its memory is not touched if the scale is 1."""
    if gradient.dtype != torch.float32 or gradient.device.type != "cuda" or unsupported_device(gradient.device):
        return gradient.mul_(scale.to(gradient.dtype))
    from vmf_kernels.backends.triton import prototypes

    return prototypes.scale_in_place(gradient, scale)
