"""Packs prototypes for the passes and pulls gradients back to the stored tensors, with csrc/cuda/prototypes.cu.

Legend: K prototypes, D embedding dim.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from vmf_kernels.backends.cuda import binding
from vmf_kernels.backends.cuda.layouts import PAD_TO, layout_of
from vmf_kernels.backends.triton.prototypes import Network, PackedPrototypes
from vmf_kernels.bessel import difference_coefficients, orders, slope_coefficients
from vmf_kernels.prototypes import LOWEST_BIAS, Prototypes

STORED = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def pack_prototypes(network: Network, dtype: torch.dtype, *, keeps_norms: bool = False) -> PackedPrototypes:
    """Pack the prototypes of one network; as ``vmf_kernels.backends.triton.prototypes.pack_prototypes``."""
    one = _Packing(network, dtype, keeps_norms=keeps_norms)
    binding.module().pack_prototypes([one.described()], binding.queue(one.weight))
    return one.packed


def pack_networks(student: Network, teacher: Network, dtype: torch.dtype) -> tuple[PackedPrototypes, PackedPrototypes]:
    """Pack the prototypes of both networks in one launch; as ``vmf_kernels.backends.triton.prototypes.pack_networks``."""
    one, other = _Packing(student, dtype), _Packing(teacher, dtype)
    binding.module().pack_prototypes([one.described(), other.described()], binding.queue(one.weight))
    return one.packed, other.packed


class _Packing:
    """One network's stored and packed prototypes. It keeps the tensors that it points to alive until the launch."""

    def __init__(self, network: Network, dtype: torch.dtype, *, keeps_norms: bool = False) -> None:
        prototypes, temperature, bias = network
        layout = layout_of(prototypes.dim, dtype)
        padded = -(-prototypes.count // PAD_TO) * PAD_TO
        new = prototypes.weight.new_empty
        self.packed = PackedPrototypes(
            new(padded, layout.width, dtype=dtype),
            new(padded, dtype=torch.float32),
            temperature,
            prototypes.count,
            layout,
            network.has_bias,
            new(padded, dtype=torch.float32) if keeps_norms else None,
        )
        self.prototypes, self.weight = prototypes, _rows(prototypes.weight)
        self.magnitude, self.extra_bias = _vector(prototypes.magnitude), _vector(bias)

    def described(self) -> Any:
        """The module's description of this network."""
        packed, at = self.packed, self.weight.device
        padded, width = packed.weight.shape
        return binding.module().Packing(
            _stored(self.prototypes, self.weight, self.magnitude, packed.temperature),
            element=binding.element(packed.weight.dtype),
            width=width,
            padded=padded,
            lowest_bias=LOWEST_BIAS,
            extra_bias=binding.address(self.extra_bias, at, self.prototypes.count),
            packed=binding.address(packed.weight, at, padded * width, packed.weight.dtype),
            bias=binding.address(packed.bias, at, padded),
            norm=binding.address(packed.norm, at, padded),
        )


def pull_back(
    prototypes: Prototypes, temperature: Tensor, gradient_KD: Tensor, bias_gradient_K: Tensor
) -> Tensor | None:
    """From the gradient at ``w_k`` to that at the stored tensors, in one pass; as ``prototypes.pull_back_to_stored``."""
    if prototypes.kind == "linear":
        return None
    assert gradient_KD.is_contiguous(), "gradients are formed contiguous"
    weight, magnitude = _rows(prototypes.weight), _vector(prototypes.magnitude)
    magnitude_gradient = None if magnitude is None else gradient_KD.new_empty(prototypes.count)
    binding.module().pull_back(
        _stored(prototypes, weight, magnitude, temperature),
        binding.queue(weight),
        bias_gradient=binding.address(bias_gradient_K, weight.device, prototypes.count),
        gradient=binding.address(gradient_KD, weight.device, prototypes.count * prototypes.dim),
        magnitude_gradient=binding.address(magnitude_gradient, weight.device, prototypes.count),
    )
    return magnitude_gradient


def _stored(prototypes: Prototypes, weight: Tensor, magnitude: Tensor | None, temperature: Tensor) -> Any:
    at = weight.device
    return binding.module().StoredPrototypes(
        stored=getattr(binding.module().Stored, STORED[weight.dtype]),
        kind=getattr(binding.module().Kind, prototypes.without_vmf().kind),
        count=prototypes.count,
        dim=prototypes.dim,
        stride=weight.stride(0),
        weight=binding.address(weight, at, prototypes.count * prototypes.dim, weight.dtype, prototypes.dim),
        magnitude=binding.address(magnitude, at, prototypes.count),
        temperature=binding.address(temperature if prototypes.has_normalizer else None, at, 1, torch.float64),
        expansion=_expansion(prototypes.dim),
    )


@functools.cache
def _expansion(dim: int) -> Any:
    """The constants of the normaliser: first order, number of steps down from it, coefficients."""
    visited = orders(dim)
    return binding.module().Expansion(
        order=visited[0],
        steps=len(visited) - 1,
        coefficients=difference_coefficients(visited[0], torch.float32),
        slopes=slope_coefficients(visited[0], torch.float32),
    )


def _rows(matrix: Tensor) -> Tensor:
    """The matrix with adjacent elements in a row, in a dtype that the kernels read; a copy if it is not so already."""
    matrix = matrix if matrix.dtype in STORED else matrix.float()
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _vector(values: Tensor | None) -> Tensor | None:
    """[K] fp32, contiguous."""
    return None if values is None else values.reshape(-1).float().contiguous()
