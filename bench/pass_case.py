"""One pass on its own, on Triton's kernels or on others: what the tuner times and compiles.

Legend: R rows, K prototypes, D embedding dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vmf_kernels.backends.triton import launch
from vmf_kernels.backends.triton.tiles import FEW_ROWS, ROW_PASSES, Layout, Tile, layout_of

PROTOTYPES = 65_536
MANY_ROWS = 3840  # masked patches of a ViT-L/16 batch of 64: 3771 with padding
TEMPERATURE = 0.07
BASE_2_OF_K = 16.0  # log-sum-exp of rows that no prototype attracts
DTYPES = {"16-bit": torch.bfloat16, "tf32": torch.float32, "ieee": torch.float32}


@dataclass(frozen=True, eq=False)
class PassCase:
    """Inputs of one pass, already packed; unit rows and prototypes near them."""

    name: str  # of the pass, without " few"
    precision: str
    layout: Layout
    rows: Tensor  # [R, D]
    keys: tuple[Any, Any]  # PackedPrototypes of the student and the teacher
    offset: Tensor  # [R] of the column passes
    unit: Tensor  # [] 1
    out: Any  # Columns: where the column passes write

    @classmethod
    def of(
        cls, name: str, precision: str, width: int, *, device: torch.device, dtype: torch.dtype | None = None
    ) -> PassCase:
        """The case at K = 65,536, in ``dtype`` or the usual one; on the CPU, to be compiled only, in memory nobody touches."""
        from vmf_kernels.backends.triton.passes import Columns
        from vmf_kernels.backends.triton.prototypes import PackedPrototypes

        layout, base = layout_of(width, precision), name.removesuffix(" few")
        rows = FEW_ROWS if name.endswith(" few") else MANY_ROWS

        def matrix(count: int) -> Tensor:
            empty = torch.empty(count, layout.width, dtype=dtype or DTYPES[precision], device=device)
            return empty if device.type == "cpu" else empty.normal_(std=width**-0.5)

        def column(count: int, value: float) -> Tensor:
            return torch.full((count,), value, device=device)

        temperature = torch.full((), TEMPERATURE, dtype=torch.float64, device=device)
        bias = column(PROTOTYPES, 0.0)
        keys = [PackedPrototypes(matrix(PROTOTYPES), bias, temperature, PROTOTYPES, layout, True) for _ in range(2)]
        vectors = torch.empty(PROTOTYPES, layout.width, device=device)
        out = Columns(vectors, torch.empty_like(bias), torch.empty_like(bias))
        unit = torch.ones((), device=device)
        return cls(base, precision, layout, matrix(rows), (keys[0], keys[1]), column(rows, BASE_2_OF_K), unit, out)

    def run(self, tile: Tile, kernels: Any = None) -> Any:
        """One launch; what it leaves behind: ``passes.Parts`` or ``passes.Columns``.

        Args:
            tile: of the pass, one that the kernels take.
            kernels: an ``operator.Kernels``; None for Triton's.
        """
        from vmf_kernels.backends.triton.operator import TRITON
        from vmf_kernels.backends.triton.passes import Side

        student, teacher, unit, kernels = *self.keys, self.unit, kernels or TRITON
        with launch.on_device(self.rows):
            if self.name in ROW_PASSES:
                keys = student if self.name == "student" else teacher
                values = None if self.name == "scores" else student
                return kernels.row_pass(self.rows, keys, values, self.name, tile)
            sides = Side(self.rows, student, self.offset), Side(self.rows, teacher, self.offset)
            kernels.column_pass(*sides, self.rows, unit, unit, self.out, tile)
            return self.out

    def results(self, tile: Tile, kernels: Any = None) -> dict[str, Tensor]:
        """What the pass computes by name, whatever the tile and the kernels: merged rows, or the gradient at the prototypes."""
        from vmf_kernels.backends.triton.rows import merge_log_sum_exp, merge_teachers

        left = self.run(tile, kernels)
        if self.name not in ROW_PASSES:
            return {"vectors": left.vectors, "usage": left.usage}
        if self.name == "scores":
            return {"log_sum_exp": merge_log_sum_exp(left, None)}
        weight = torch.ones_like(self.offset)
        merged = merge_teachers(left, weight, self.unit, self.layout, has_value_bias=False)
        return {"barycentre": merged.barycentre}

    @property
    def operations(self) -> float:
        """Floating-point operations of the products that the equations need, parts not counted twice."""
        products = {"student": 2, "teacher": 2, "scores": 1, "columns": 4}[self.name]
        return 2.0 * products * self.rows.shape[0] * PROTOTYPES * self.layout.width

    def median_ms(self, tile: Tile) -> float:
        """Median time on the device, from a graph: the short passes take less than their launch does on the host."""
        from triton.testing import do_bench_cudagraph

        median: float = do_bench_cudagraph(lambda: self.run(tile), rep=60, quantiles=[0.5])
        return median


def relative_error(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Of ``PassCase.results``, all tensors together, in the 2-norm."""
    one, other = (torch.cat([tensor.flatten() for tensor in each.values()]) for each in (got, expected))
    return float((one - other).norm() / other.norm())
