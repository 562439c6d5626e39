"""Prototypes as the passes read them, and the gradient's way back to what is stored.

Legend: K prototypes, D embedding dim.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from vmf_kernels.backends.triton import launch
from vmf_kernels.backends.triton.prototype_kernels import pack_prototypes_kernel, pull_back_kernel, scale_kernel
from vmf_kernels.backends.triton.tiles import Layout, layout_of, pad_to, precision_of
from vmf_kernels.bessel import difference_coefficients, orders, slope_coefficients
from vmf_kernels.prototypes import LOWEST_BIAS, Prototypes

# [prototypes, D] fp32 elements of a program: 16 a thread and array, enough 16-byte loads in flight to reach memory speed
BLOCK_ELEMENTS = 2048
WARPS = 4
SCALED_AT_ONCE = 4096


class PackedPrototypes(NamedTuple):
    """Effective prototypes, cast to the dtype of the products and padded to whole tiles."""

    weight: Tensor  # [K padded, D padded]
    bias: Tensor  # [K padded] fp32, base 2; the padding's is lower than any
    temperature: Tensor  # [] float64
    prototypes: int  # K
    layout: Layout
    has_bias: bool  # whether the bias is more than zeros and padding


def pack_prototypes(
    prototypes: Prototypes, temperature: Tensor, extra_bias: Tensor | None, dtype: torch.dtype
) -> PackedPrototypes:
    """One pass over the weights: norms, vMF normaliser, cast, padding; arguments as ``vmf_kernels.prototypes.prepare_keys``."""
    weight, layout = _rows(prototypes.weight), layout_of(prototypes.dim, precision_of(dtype))
    align = pad_to(launch.target_of(weight.device))
    padded = -(-prototypes.count // align) * align
    packed = PackedPrototypes(
        torch.empty(padded, layout.width, dtype=dtype, device=weight.device),
        torch.empty(padded, dtype=torch.float32, device=weight.device),
        temperature,
        prototypes.count,
        layout,
        prototypes.has_normalizer or extra_bias is not None,
    )
    columns = _power_of_two(layout.width)
    block = min(align, max(1, BLOCK_ELEMENTS // columns))  # divides the padding
    launch.run(
        pack_prototypes_kernel,
        (-(-padded // block),),
        weight,
        _vector(prototypes.magnitude, weight),
        _vector(extra_bias, weight),
        temperature,
        packed.weight,
        packed.bias,
        prototypes.count,
        prototypes.dim,
        weight.stride(0),
        LOWEST_BIAS,
        N=block,
        COLUMNS=columns,
        WIDTH=layout.width,
        KIND=prototypes.without_vmf().kind,
        VMF=prototypes.has_normalizer,
        HAS_EXTRA_BIAS=extra_bias is not None,
        COEFFICIENTS=tuple(difference_coefficients(orders(prototypes.dim)[0], torch.float32)),
        **_expansion(prototypes.dim),
        num_warps=WARPS,
    )
    return packed


def pull_back(
    prototypes: Prototypes, temperature: Tensor, gradient_KD: Tensor, bias_gradient_K: Tensor
) -> Tensor | None:
    """Gradient at ``w_k`` -> at the stored tensors; as ``vmf_kernels.prototypes.pull_back_to_stored``, in one pass."""
    kind = prototypes.without_vmf().kind
    if kind == "linear" and not prototypes.has_normalizer:
        return None
    weight = _rows(prototypes.weight)
    columns = _power_of_two(prototypes.dim)
    block = max(1, BLOCK_ELEMENTS // columns)
    magnitude_gradient = None if prototypes.magnitude is None else gradient_KD.new_empty(prototypes.count)
    launch.run(
        pull_back_kernel,
        (-(-prototypes.count // block),),
        gradient_KD,
        weight,
        _vector(prototypes.magnitude, weight),
        bias_gradient_K,
        temperature,
        gradient_KD if magnitude_gradient is None else magnitude_gradient,
        prototypes.count,
        prototypes.dim,
        weight.stride(0),
        N=block,
        COLUMNS=columns,
        KIND=kind,
        VMF=prototypes.has_normalizer,
        **_expansion(prototypes.dim),
        num_warps=WARPS,
    )
    return magnitude_gradient


def scale_in_place(gradient: Tensor, factor: Tensor) -> Tensor:
    """``gradient`` (fp32, contiguous) times ``factor`` []; where that is 1 its memory is not touched, nor waited for."""
    assert gradient.is_contiguous(), "gradients are formed contiguous"
    with launch.on_device(gradient):
        launch.run(
            scale_kernel,
            (-(-gradient.numel() // SCALED_AT_ONCE),),
            gradient,
            factor,
            gradient.numel(),
            N=SCALED_AT_ONCE,
            num_warps=WARPS,
        )
    return gradient


def _expansion(dim: int) -> dict[str, Any]:
    """Compile-time numbers of the normaliser: first order, steps down from it, coefficients of the ratio."""
    visited = orders(dim)
    return {
        "ORDER": visited[0],
        "STEPS": len(visited) - 1,
        "SLOPES": tuple(slope_coefficients(visited[0], torch.float32)),
    }


def _rows(matrix: Tensor) -> Tensor:
    """The matrix with elements of a row side by side: a copy where they are not."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _vector(values: Tensor | None, stand_in: Tensor) -> Tensor:
    """[K] contiguous; a pointer that is not read where there are none."""
    return stand_in if values is None else values.reshape(-1).contiguous()


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
