"""The test stand of one variant: its tensors on the device, poisoned buffers for results, launches that report progress.

Legend: R rows, K prototypes, D embedding dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.light.differences import Difference, compared, errors
from bench.light.exact import Exact
from bench.light.inputs import LOG2_E, Array, padded_vector
from bench.light.variants import Variant
from vmf_kernels.backends.cuda import binding
from vmf_kernels.backends.cuda import layouts as cuda_layouts
from vmf_kernels.backends.triton import launch, tiles
from vmf_kernels.backends.triton.prototypes import PackedPrototypes
from vmf_kernels.prototypes import LOWEST_BIAS

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# bits of a NaN that no kernel writes
POISON = 0x7FBADBAD
GUARD = 4096  # elements before and after each result, that nothing may write to
LAUNCHES, TOY_LAUNCHES = 3, 2  # of each case: they have to agree to the bit
LOWEST = float(np.float32(2 * LOWEST_BIAS * LOG2_E))  # the bias of padding
MANY, FEW = 4096, tiles.FEW_ROWS  # rows a tile is asked for

Say = Callable[[str, str], None]  # (state, case)
Launch = Callable[[], Mapping[str, Tensor]]


class Stand:
    """One variant on one device.

    Attributes:
        variant: which one.
        kernels: an ``operator.Kernels``.
        toy: whether it is a rehearsal on the CPU, at sizes of a test.
        differences, notes: what was found wrong.
        cases, tensors: names of what was tried and compared.
        largest_error: how far off a right element was.
    """

    def __init__(self, variant: Variant, kernels: Any, device: torch.device, say: Say) -> None:
        self.variant, self.kernels, self.device, self.say = variant, kernels, device, say
        self.dtype = DTYPES[variant.element]
        self.toy = device.type == "cpu"
        self.is_cuda = variant.kernels != "triton"
        self.differences, self.notes = list[Difference](), list[str]()
        self.cases, self.tensors, self.largest_error = list[str](), set[str](), 0.0
        self._buffers = list[tuple[str, Tensor, int]]()

    def layout(self, dim: int) -> tiles.Layout:
        """How the kernels pad and cut an embedding dim."""
        if self.is_cuda:
            return cuda_layouts.layout_of(dim, self.dtype)
        return tiles.layout_of(dim, tiles.precision_of(self.dtype))

    @property
    def padding(self) -> int:
        """The number that K is padded to a multiple of."""
        return cuda_layouts.PAD_TO if self.is_cuda else tiles.pad_to(launch.target_of(self.device))

    def tile(self, name: str, layout: tiles.Layout, rows: int = MANY) -> tiles.Tile:
        """Of a pass."""
        features = torch.empty(0, layout.width, dtype=self.dtype, device=self.device)
        tile: tiles.Tile = self.kernels.tile(name, features, layout, rows)
        return tile

    def keys_of_tile(self, tile: tiles.Tile, layout: tiles.Layout, *, own_values: bool) -> int:
        """Prototypes of a step of a row pass."""
        if self.is_cuda:
            size: int = binding.module().prototype_tile(width=layout.width, own_values=own_values)
            return size
        return tile.prototypes

    def matrix(self, values: Array) -> Tensor:
        """In the dtype of the products."""
        return torch.from_numpy(values).to(self.dtype).to(self.device)

    def floats(self, values: Array | float) -> Tensor:
        """In fp32."""
        return torch.from_numpy(np.asarray(values, dtype=np.float32)).to(self.device)

    def temperature(self, scale: float) -> Tensor:
        """[] such that base-2 logits are so many times the products."""
        return torch.tensor(LOG2_E / scale, dtype=torch.float64, device=self.device)

    def packed(self, keys_KD: Array, bias_K: Array, scale: float, layout: tiles.Layout, has_bias: bool = True) -> Any:
        """Keys [K padded, width] as the passes read them; ``bias_K`` is without padding."""
        bias = self.floats(padded_vector(bias_K, len(keys_KD), LOWEST))
        return PackedPrototypes(self.matrix(keys_KD), bias, self.temperature(scale), len(bias_K), layout, has_bias)

    def poisoned(self, name: str, *shape: int) -> Tensor:
        """A buffer for an fp32 result, between two guards."""
        count = math.prod(shape)
        bits = torch.full((count + 2 * GUARD,), POISON, dtype=torch.int32, device=self.device)
        self._buffers.append((name, bits, count))
        return bits.view(torch.float32)[GUARD : GUARD + count].view(shape)

    def run(self, case: str, call: Launch, exact: Mapping[str, Exact]) -> None:
        """Launch some times, compare every result; what is wrong is kept."""
        self.cases.append(case)
        self.say("compiling", case)
        first = self._launched(case, call)
        self._compare(case, first, exact)
        for repeat in range(2, (TOY_LAUNCHES if self.toy else LAUNCHES) + 1):
            again = self._launched(case, call)
            changed = [name for name in first if not torch.equal(_bits(first[name]), _bits(again[name]))]
            if changed:
                self.notes.append(f"{case}: launch {repeat} gives another {' and '.join(changed)} than launch 1")
                self._compare(f"{case}, launch {repeat}", {name: again[name] for name in changed}, exact)

    def _launched(self, case: str, call: Launch) -> dict[str, Tensor]:
        self._buffers.clear()
        results = dict(call())
        self.say("launched", case)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.say("returned", case)
        for name, bits, count in self._buffers:
            outside = torch.cat([bits[:GUARD], bits[GUARD + count :]])
            if touched := int((outside != POISON).sum()):
                self.notes.append(f"{case}: {touched} elements before or after {name} are written to")
        return results

    def _compare(self, case: str, results: Mapping[str, Tensor], exact: Mapping[str, Exact]) -> None:
        self.tensors |= results.keys()
        for name, tensor in results.items():
            got = tensor.detach().to("cpu", torch.float64).numpy()
            difference = compared(case, name, got, exact[name])
            if difference is not None:
                self.differences.append(difference)
            else:
                self.largest_error = max(self.largest_error, float(errors(got, exact[name]).max(initial=0.0)))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.int32 if tensor.element_size() == 4 else torch.int16)
