"""Packs prototypes for the passes and pulls gradients back to the stored tensors.

Legend: K prototypes, D embedding dim.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from vmf_kernels.backends.triton import launch
from vmf_kernels.backends.triton.prototype_kernels import (
    bias_kernel,
    pack_networks_kernel,
    pack_prototypes_kernel,
    pull_back_kernel,
    scale_kernel,
)
from vmf_kernels.backends.triton.tiles import Layout, layout_of, pad_to, precision_of
from vmf_kernels.bessel import difference_coefficients, orders, slope_coefficients
from vmf_kernels.prototypes import LOWEST_BIAS, Prototypes

# [prototypes, D] fp32 elements per program: 16 per thread and array, enough 16-byte loads in flight for full memory speed
BLOCK_ELEMENTS = 2048
WARPS = 4
SCALED_AT_ONCE = 4096
BIASES_AT_ONCE = 256


class Network(NamedTuple):
    """One network's prototypes, and what makes logits of their products with rows."""

    prototypes: Prototypes
    temperature: Tensor  # [] float64
    bias: Tensor | None = None  # [K] nats added to the logits

    @property
    def has_bias(self) -> bool:
        """Whether anything is added to the products."""
        return self.prototypes.has_normalizer or self.bias is not None


class PackedPrototypes(NamedTuple):
    """Effective prototypes, cast to the dtype of the products and padded to whole tiles."""

    weight: Tensor  # [K padded, D padded]
    bias: Tensor  # [K padded] fp32, base 2; that of the padding is lower than any other
    temperature: Tensor  # [] float64
    prototypes: int  # K
    layout: Layout
    has_bias: bool  # whether the bias is more than zeros and padding
    norm: Tensor | None = None  # [K padded] fp32, if it is kept for other biases (``with_bias``)


def pack_prototypes(network: Network, dtype: torch.dtype, *, keeps_norms: bool = False) -> PackedPrototypes:
    """One pass over the weights: norms, vMF normaliser, cast, padding; as ``vmf_kernels.prototypes.prepare_keys``.

    Args:
        network: whose prototypes.
        dtype: of the products.
        keeps_norms: for ``with_bias``.
    """
    prototypes, temperature, bias = network
    weight, packed = _rows(prototypes.weight), _empty(network, dtype)
    if keeps_norms:
        packed = packed._replace(norm=torch.empty_like(packed.bias))
    launch.run(
        pack_prototypes_kernel,
        (-(-packed.bias.shape[0] // _block(packed)),),
        weight,
        _vector(prototypes.magnitude, weight),
        _vector(bias, weight),
        temperature,
        packed.weight,
        packed.bias,
        packed.bias if packed.norm is None else packed.norm,
        prototypes.count,
        prototypes.dim,
        weight.stride(0),
        LOWEST_BIAS,
        N=_block(packed),
        COLUMNS=_power_of_two(packed.layout.width),
        WIDTH=packed.layout.width,
        KIND=prototypes.without_vmf().kind,
        VMF=prototypes.has_normalizer,
        HAS_EXTRA_BIAS=bias is not None,
        KEEPS_NORMS=packed.norm is not None,
        **_constant(prototypes.dim),
        num_warps=WARPS,
    )
    return packed


def pack_networks(student: Network, teacher: Network, dtype: torch.dtype) -> tuple[PackedPrototypes, PackedPrototypes]:
    """``pack_prototypes`` of both, which must have the same K and D, in one launch. Only the teacher may have a bias."""
    assert student.bias is None, "the kernel adds none to the student's logits"
    prototypes, others = student.prototypes, teacher.prototypes
    rows, other_rows = _rows(prototypes.weight), _rows(others.weight)
    packed, other = _empty(student, dtype), _empty(teacher, dtype)
    launch.run(
        pack_networks_kernel,
        (-(-packed.bias.shape[0] // _block(packed)), 2),
        rows,
        _vector(prototypes.magnitude, rows),
        student.temperature,
        packed.weight,
        packed.bias,
        rows.stride(0),
        other_rows,
        _vector(others.magnitude, other_rows),
        _vector(teacher.bias, other_rows),
        teacher.temperature,
        other.weight,
        other.bias,
        other_rows.stride(0),
        prototypes.count,
        prototypes.dim,
        LOWEST_BIAS,
        N=_block(packed),
        COLUMNS=_power_of_two(packed.layout.width),
        WIDTH=packed.layout.width,
        STUDENT_KIND=prototypes.without_vmf().kind,
        TEACHER_KIND=others.without_vmf().kind,
        STUDENT_VMF=prototypes.has_normalizer,
        TEACHER_VMF=others.has_normalizer,
        HAS_EXTRA_BIAS=teacher.bias is not None,
        **_constant(prototypes.dim),
        num_warps=WARPS,
    )
    return packed, other


def with_bias(packed: PackedPrototypes, network: Network) -> PackedPrototypes:
    """The same prototypes at another temperature or with another bias: a pass over K numbers. Norms must have been kept."""
    assert packed.norm is not None, "packed without keeping the norms"
    prototypes, temperature, extra_bias = network
    bias = torch.empty_like(packed.bias)
    block = min(BIASES_AT_ONCE, pad_to(launch.target_of(bias.device)))  # divides the padding
    launch.run(
        bias_kernel,
        (bias.shape[0] // block,),
        packed.norm,
        packed.norm if extra_bias is None else _vector(extra_bias, packed.norm),
        temperature,
        bias,
        prototypes.count,
        LOWEST_BIAS,
        N=block,
        VMF=prototypes.has_normalizer,
        HAS_EXTRA_BIAS=extra_bias is not None,
        **_constant(prototypes.dim),
        num_warps=WARPS,
    )
    return packed._replace(bias=bias, temperature=temperature, has_bias=network.has_bias)


def pull_back(
    prototypes: Prototypes, temperature: Tensor, gradient_KD: Tensor, bias_gradient_K: Tensor
) -> Tensor | None:
    """From the gradient at ``w_k`` to that at the stored tensors, in one pass; as ``prototypes.pull_back_to_stored``."""
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
    """``gradient`` (fp32, contiguous) times ``factor`` [], in place. If the factor is 1, its memory is not touched."""
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


def _empty(network: Network, dtype: torch.dtype) -> PackedPrototypes:
    """Empty buffers for packed prototypes."""
    prototypes = network.prototypes
    layout, device = layout_of(prototypes.dim, precision_of(dtype)), prototypes.weight.device
    align = pad_to(launch.target_of(device))
    padded = -(-prototypes.count // align) * align
    return PackedPrototypes(
        torch.empty(padded, layout.width, dtype=dtype, device=device),
        torch.empty(padded, dtype=torch.float32, device=device),
        network.temperature,
        prototypes.count,
        layout,
        network.has_bias,
    )


def _block(packed: PackedPrototypes) -> int:
    """Number of prototypes per packing program; divides the padding."""
    align = pad_to(launch.target_of(packed.weight.device))
    return min(align, max(1, BLOCK_ELEMENTS // _power_of_two(packed.layout.width)))


def _constant(dim: int) -> dict[str, Any]:
    """Compile-time constants of the normaliser."""
    return {"COEFFICIENTS": tuple(difference_coefficients(orders(dim)[0], torch.float32)), **_expansion(dim)}


def _expansion(dim: int) -> dict[str, Any]:
    """Compile-time constants of its derivative: first order, number of steps down from it, coefficients of the ratio."""
    visited = orders(dim)
    return {
        "ORDER": visited[0],
        "STEPS": len(visited) - 1,
        "SLOPES": tuple(slope_coefficients(visited[0], torch.float32)),
    }


def _rows(matrix: Tensor) -> Tensor:
    """The matrix with adjacent elements in a row; a copy if they are not."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _vector(values: Tensor | None, stand_in: Tensor) -> Tensor:
    """[K] contiguous; for None, ``stand_in``, which the kernel does not read."""
    return stand_in if values is None else values.reshape(-1).contiguous()


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
