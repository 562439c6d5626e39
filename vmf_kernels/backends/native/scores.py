"""Logits of rows against one network's prototypes, and their softmax over the prototypes of all ranks.

Legend: R rows, K prototypes, D embedding dim.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from vmf_kernels.backends.base_two import LOG2_E
from vmf_kernels.backends.native import module
from vmf_kernels.prototypes import Prototypes, prepare_bias, refuse_freed
from vmf_kernels.ranks import has_all_prototypes, max_over_ranks, sum_over_ranks

LEAST_FACTOR, LARGEST_FACTOR = 2.0**-40, 2.0**40  # far beyond the inverse temperatures that are used in practice
PIECE_BYTES = 24 * 2**20  # glibc keeps memory below 32 MiB; 96 MiB in one piece cost 27 ms of page faults per step
MOST_PIECES = 64  # the module takes no more


class NativeKeys(NamedTuple):
    """Prepared prototypes: base-2 ``logit_k(x) = gain_k factor <weight_k, row_factor x> + bias_k``; ``w_k = gain_k weight_k``.

    Unless the norms are free, a score finds norms and gains, beside its products.
    """

    weight: Tensor  # [K, D] fp32, bf16 or fp16, elements of a row adjacent
    norms: str  # "linear", "normalized" or "weight_norm"
    magnitude: Tensor | None  # [K] or [K, 1] fp32
    row_factor: float
    factor: float
    bias: Tensor | None  # [K] nats, as ``Keys.bias``, but not bounded below
    scale: tuple[float, float]  # two factors of the inverse temperature, as ``split_scale``
    other_bias: Tensor | None = None  # [K] base 2, of a second softmax of the same products
    found: Tensor | None = None  # [2, K] receives norms of the stored rows, and gains; None if only scores need them

    @property
    def prototypes(self) -> int:
        """K."""
        return self.weight.shape[0]

    def keeping_gains(self) -> NativeKeys:
        """The same with room for norms and gains, which a gathering pass by itself needs."""
        return self if self.norms == "linear" else self._replace(found=module.new(2, self.prototypes))


class Softmax(NamedTuple):
    """Sums over the prototypes, base 2."""

    sums: Tensor  # [3, R] top = max l, mass = sum 2^(l - top), moment = sum 2^(l - top) (l - top)

    @property
    def log_sum_exp(self) -> Tensor:
        """[R] base 2."""
        return self.sums[0] + self.sums[1].log2()

    def merged_over_ranks(self, group: ProcessGroup | None) -> Softmax:
        """The same over the prototypes of all ranks; ranks exchange one maximum and two sums per row."""
        if has_all_prototypes(group):
            return self
        own_top, mass, moment = self.sums
        top = max_over_ranks(own_top.clone(), group)
        shift = own_top - top
        decay = shift.exp2()
        # a rank far below the others has weight 0, and its shift may be too large for a product
        moment = decay * (moment + torch.where(decay > 0, shift, 0.0) * mass)
        return Softmax(torch.cat([top[None], sum_over_ranks(torch.stack([decay * mass, moment]), group)]))


def native_keys(
    prototypes: Prototypes,
    temperature: Tensor,
    extra_bias: Tensor | None,
    products: torch.dtype,
    *,
    also_without_extra: bool = False,
) -> NativeKeys:
    """As ``vmf_kernels.prototypes.prepare_keys``, for products of this dtype.

    ``also_without_extra`` adds a second softmax of the same rows, whose bias lacks ``extra_bias``.
    """
    refuse_freed(prototypes.weight, prototypes.magnitude)
    weight, magnitude = prototypes.weight, prototypes.magnitude
    scale = 1 / temperature.item()
    bias, other_bias = _biases(prototypes, temperature, extra_bias, also_without_extra)
    # scale the rows, where its rounding errors average out over the dims; but not bf16 rows, which are exact as they are
    row_factor, factor = split_scale(scale * LOG2_E)
    if products == torch.bfloat16:
        row_factor, factor = 1.0, row_factor * factor
    return NativeKeys(
        _rows_apart(weight),
        prototypes.kind.removesuffix("_vmf"),
        None if magnitude is None else module.fp32(magnitude),
        row_factor,
        factor,
        bias,
        split_scale(scale),
        other_bias,
    )


def _rows_apart(weight: Tensor) -> Tensor:
    """The matrix with adjacent elements in a row and rows that do not overlap; a copy if they do, as in an expanded matrix."""
    count, dim = weight.shape
    if weight.stride(1) == 1 and (count < 2 or weight.stride(0) >= dim) and not weight.is_neg():
        return weight
    return weight.resolve_neg().contiguous()


def _biases(
    prototypes: Prototypes, temperature: Tensor, extra_bias: Tensor | None, also_without_extra: bool
) -> tuple[Tensor | None, Tensor | None]:
    """[K] the bias in nats, and in base 2 without ``extra_bias`` if that is asked for; None for 0."""
    if not prototypes.has_normalizer:
        bias = None if extra_bias is None else module.fp32(extra_bias)
        return bias, bias.new_zeros(bias.numel()) if also_without_extra and bias is not None else None
    bias = prepare_bias(prototypes, temperature, extra_bias, torch.float32)
    if not also_without_extra or extra_bias is None:
        return bias, None
    own = prepare_bias(prototypes, temperature, None, torch.float32)
    assert own is not None
    return bias, in_base_2(own)


def in_base_2(bias: Tensor) -> Tensor:
    """[K] the bias of a second softmax, or the one beside it: finite in base 2, because their difference is taken."""
    lowest = torch.finfo(torch.float32).min
    return (bias.clamp(min=lowest) * LOG2_E).clamp(min=lowest)


def split_scale(number: float) -> tuple[float, float]:
    """(factor, power of two) whose product is ``number``: itself and 1, or, for an extreme number, a factor of order one.

    Multiplying or dividing by an extreme number on the way to a moderate result would overflow, or give 0 or NaN.
    """
    if LEAST_FACTOR <= number <= LARGEST_FACTOR or not math.isfinite(number):
        return number, 1.0
    if number == 0:  # of an infinite temperature
        return 1.0, 0.0
    mantissa, exponent = math.frexp(number)
    return 2 * mantissa, 2.0 ** (exponent - 1)


class Logits(NamedTuple):
    """Base-2 logits of a chunk of rows, [K, columns], in pieces with an equal number of prototypes.

    An allocator returns larger pieces to the system and maps them again each time, with a page fault for every 4 KiB.
    """

    pieces: list[Tensor]
    first: int  # the first column of the rows in question

    @classmethod
    def empty(cls, prototypes: int, columns: int) -> Logits:
        """Room for ``columns``, a multiple of the padding."""
        size = min(prototypes, max(PIECE_BYTES // (4 * max(columns, 1)), -(-prototypes // MOST_PIECES)))
        return cls(
            [module.new(min(size, prototypes - k), columns) for k in range(0, prototypes, size)],
            0,
        )

    def from_column(self, first: int) -> Logits:
        """The same memory, further to the right."""
        return self._replace(first=first)


NOT_STORED = Logits([], 0)


def score_task(rows_RD: Tensor, keys: NativeKeys, softmax: Softmax | None, logits: Logits = NOT_STORED) -> Any:
    """The module's form of a score; its tensors must outlive it. Without a softmax, it is for the module's ``step``."""
    return module.built().Score(
        weight=keys.weight,
        bias=keys.bias,
        features=rows_RD,
        uniform=keys.factor,
        row_factor=keys.row_factor,
        logits=logits,
        sums=None if softmax is None else softmax.sums,
        other_bias=keys.other_bias,
        norms=keys.norms,
        magnitude=keys.magnitude,
        found=keys.found,
    )


def score(rows_RD: Tensor, keys: NativeKeys, products: torch.dtype, logits: Logits = NOT_STORED) -> Softmax:
    """Softmax of rows over this rank's prototypes.

    Args:
        rows_RD: [R, D] fp32 contiguous.
        keys: K prototypes.
        products: torch.float32 or torch.bfloat16.
        logits: receives the base-2 logits, in ``padded(R)`` columns.
    """
    native, run = module.built(), module.execution(products)
    result = Softmax(module.new(3, len(rows_RD)))
    task = score_task(rows_RD, keys, result, logits)
    memory, start = module.workspace(native.score_workspace(task, run))
    native.score(task, run, start)
    del memory
    return result
