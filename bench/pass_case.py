"""One pass of the Triton backend on its own: what the tuner times and compiles.

Legend: R rows, K prototypes, D embedding dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vmf_kernels.backends.triton import launch
from vmf_kernels.backends.triton.tiles import FEW_ROWS, Layout, Tile, layout_of

PROTOTYPES = 65_536
MANY_ROWS = 3840  # masked patches of a ViT-L/16 batch of 64: 3771 with padding
DTYPES = {"16-bit": torch.bfloat16, "tf32": torch.float32, "ieee": torch.float32}


@dataclass(frozen=True, eq=False)
class PassCase:
    """Inputs of one pass, already packed; unit rows and prototypes near them."""

    name: str  # of the pass, without " few"
    precision: str
    layout: Layout
    rows: Tensor  # [R, D]
    student: Tensor  # [K, D]
    teacher: Tensor  # [K, D]

    @classmethod
    def of(
        cls, name: str, precision: str, width: int, *, device: torch.device, dtype: torch.dtype | None = None
    ) -> PassCase:
        """The case at K = 65,536, in ``dtype`` or the usual one; on the CPU, to be compiled only, in memory nobody touches."""
        layout, base = layout_of(width, precision), name.removesuffix(" few")
        rows = FEW_ROWS if name.endswith(" few") else MANY_ROWS

        def matrix(count: int) -> Tensor:
            empty = torch.empty(count, layout.width, dtype=dtype or DTYPES[precision], device=device)
            return empty if device.type == "cpu" else empty.normal_(std=width**-0.5)

        return cls(base, precision, layout, matrix(rows), matrix(PROTOTYPES), matrix(PROTOTYPES))

    @property
    def operations(self) -> float:
        """Floating-point operations of the products that the equations need, parts not counted twice."""
        products = {"student": 2, "teacher": 2, "scores": 1, "columns": 4, "matched": 3}[self.name]
        return 2.0 * products * self.rows.shape[0] * PROTOTYPES * self.layout.width

    def run(self, tile: Tile) -> None:
        """One launch."""
        from vmf_kernels.backends.triton.passes import Columns, Side, column_pass, matched_column_pass, row_pass
        from vmf_kernels.backends.triton.prototypes import PackedPrototypes

        new = self.rows.new_empty
        bias, temperature = new(PROTOTYPES, dtype=torch.float32), new((), dtype=torch.float64)
        if self.rows.is_cuda:
            bias.zero_()
            temperature.fill_(0.07)
        student, teacher = (
            PackedPrototypes(weight, bias, temperature, PROTOTYPES, self.layout, True)
            for weight in (self.student, self.teacher)
        )
        with launch.on_device(self.rows):
            if self.name == "student":
                row_pass(self.rows, student, student, "student", tile)
            elif self.name == "teacher":
                row_pass(self.rows, teacher, student, "teacher", tile)
            elif self.name == "scores":
                row_pass(self.rows, teacher, None, "scores", tile)
            else:
                offset = torch.full(self.rows.shape[:1], 16.0, device=self.rows.device)
                sides = Side(self.rows, student, offset), Side(self.rows, teacher, offset)
                unit, total = offset.new_ones(()), offset.new_ones(())
                out = Columns(
                    offset.new_empty(PROTOTYPES, self.layout.width),
                    offset.new_empty(PROTOTYPES),
                    offset.new_empty(PROTOTYPES),
                )
                if self.name == "matched":
                    matched_column_pass(*sides, unit, total, out, tile)
                else:
                    column_pass(*sides, self.rows, unit, total, out, tile)

    def median_ms(self, tile: Tile) -> float:
        """Median time on the device, with a cold L2."""
        from triton.testing import do_bench

        median: float = do_bench(lambda: self.run(tile), warmup=20, rep=80, quantiles=[0.5])
        return median
