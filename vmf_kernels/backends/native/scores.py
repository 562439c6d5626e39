"""Logits of rows against one network's prototypes, and their softmax over the prototypes of all ranks.

Legend: R rows, K prototypes, D embedding dim.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from vmf_kernels.backends.native import module
from vmf_kernels.prototypes import Prototypes, prepare_keys
from vmf_kernels.ranks import count_ranks, max_over_ranks, sum_over_ranks

LOG2_E = 1.4426950408889634
LN_2 = math.log(2.0)
LEAST_FACTOR, LARGEST_FACTOR = 2.0**-40, 2.0**40  # of temperatures that are used, with much to spare
PIECE_BYTES = 24 * 2**20  # glibc keeps what is below 32 MiB; 96 MiB in one piece cost 27 ms of page faults a step
MOST_PIECES = 64  # that the module takes


class NativeKeys(NamedTuple):
    """Prepared prototypes: base-2 ``logit_k(x) = multiplier_k <weight_k, row_factor x> + bias_k``."""

    weight: Tensor  # [K, D] fp32, bf16 or fp16, elements of a row side by side
    gain: Tensor | None  # [K] w_k = gain_k weight_k
    row_factor: Tensor  # []
    factor: float  # of the multiplier
    multiplier: Tensor  # [K] gain_k factor
    bias: Tensor | None  # [K] nats, as ``Keys.bias``
    bias_base_2: Tensor | None  # [K]
    scale: tuple[float, float]  # two factors of the inverse temperature, as ``split_scale``

    @property
    def prototypes(self) -> int:
        """K."""
        return self.weight.shape[0]


class Softmax(NamedTuple):
    """Sums over the prototypes, base 2."""

    top: Tensor  # [R] max l
    mass: Tensor  # [R] sum 2^(l - top)
    moment: Tensor  # [R] sum 2^(l - top) (l - top)

    @property
    def log_sum_exp(self) -> Tensor:
        """[R] base 2."""
        return self.top + self.mass.log2()

    @property
    def entropy(self) -> Tensor:
        """[R] nats."""
        return (self.mass.log2() - self.moment / self.mass) * LN_2

    def merged_over_ranks(self, group: ProcessGroup | None) -> Softmax:
        """The same over the prototypes of all ranks: one maximum and two sums a row are exchanged."""
        if group is None or count_ranks(group) == 1:
            return self
        top = max_over_ranks(self.top.clone(), group)
        shift = self.top - top
        decay = shift.exp2()
        # a rank far below the others weighs 0, and its shift is too large to multiply with
        moment = decay * (self.moment + torch.where(decay > 0, shift, 0.0) * self.mass)
        return Softmax(top, *sum_over_ranks(torch.stack([decay * self.mass, moment]), group))


def native_keys(
    prototypes: Prototypes, temperature: Tensor, extra_bias: Tensor | None, products: torch.dtype
) -> NativeKeys:
    """As ``vmf_kernels.prototypes.prepare_keys``, for products of this dtype."""
    keys = prepare_keys(prototypes, temperature, extra_bias, torch.float32)
    weight = keys.weight if keys.weight.stride(1) == 1 else keys.weight.contiguous()
    # in the rows the roundings of the scale average out over the dims; but bf16 rows are exact as they are
    of_rows, factor = split_scale(keys.scale * LOG2_E)
    if products == torch.bfloat16:
        of_rows, factor = 1.0, of_rows * factor
    row_factor = keys.scale.new_tensor(of_rows)
    # NaN for an infinite gain: the effective prototype has infinities of both signs, and its products are NaN
    gain = keys.scale.new_ones(len(weight)) if keys.gain is None else keys.gain + 0 * keys.gain
    multiplier = gain * factor
    base_2 = None if keys.bias is None else (keys.bias * LOG2_E).contiguous()
    return NativeKeys(weight, keys.gain, row_factor, factor, multiplier, keys.bias, base_2, split_scale(keys.scale))


def split_scale(scale: Tensor) -> tuple[float, float]:
    """(factor, power of two) whose product the scale [] is: itself and 1, or of order one and the rest where it is extreme.

    What is multiplied by an extreme number on the way to a moderate result overflows, and divided by it comes out as 0 or NaN.
    """
    number = float(scale)
    if LEAST_FACTOR <= number <= LARGEST_FACTOR or not math.isfinite(number):
        return number, 1.0
    if number == 0:  # of an infinite temperature
        return 1.0, 0.0
    mantissa, exponent = math.frexp(number)
    return 2 * mantissa, 2.0 ** (exponent - 1)


class Logits(NamedTuple):
    """Base-2 logits of a chunk of rows, [K, columns], in pieces that hold so many prototypes each.

    An allocator gives large pieces back to the system and maps them anew each time, with a page fault for every 4 KiB.
    """

    pieces: list[Tensor]
    first: int  # column that the rows in question start at

    @classmethod
    def empty(cls, prototypes: int, columns: int) -> Logits:
        """Room for ``columns``, a multiple of the padding."""
        size = min(prototypes, max(PIECE_BYTES // (4 * max(columns, 1)), -(-prototypes // MOST_PIECES)))
        return cls(
            [torch.empty(min(size, prototypes - k), columns) for k in range(0, prototypes, size)],
            0,
        )

    def from_column(self, first: int) -> Logits:
        """The same memory, further to the right."""
        return self._replace(first=first)

    def for_module(self) -> Any:
        """As the module takes them; this must outlive the result."""
        return module.built().Logits(
            pieces=[piece.data_ptr() + self.first * piece.itemsize for piece in self.pieces],
            prototypes=len(self.pieces[0]) if self.pieces else 1,
            stride=self.pieces[0].stride(0) if self.pieces else 0,
        )


NOT_STORED = Logits([], 0)


def score(rows_RD: Tensor, keys: NativeKeys, products: torch.dtype, logits: Logits = NOT_STORED) -> Softmax:
    """Softmax of rows over this rank's prototypes.

    Args:
        rows_RD: [R, D] fp32 contiguous.
        keys: K prototypes.
        products: torch.float32 or torch.bfloat16.
        logits: where the base-2 logits go, ``padded(R)`` columns of them.
    """
    native, run = module.built(), module.execution(products)
    scaled_RD = rows_RD * keys.row_factor
    result = Softmax(*torch.empty(3, len(rows_RD), dtype=torch.float32).unbind())
    task = native.Score(
        weight=module.weight_of(keys.weight),
        multiplier=module.address(keys.multiplier),
        bias=module.address(keys.bias_base_2),
        features=module.address(scaled_RD),
        rows=len(rows_RD),
        logits=logits.for_module(),
        top=result.top.data_ptr(),
        mass=result.mass.data_ptr(),
        moment=result.moment.data_ptr(),
    )
    memory = module.run_with_workspace(run, native.score_workspace(task, run))
    native.score(task, run)
    del memory
    return result
