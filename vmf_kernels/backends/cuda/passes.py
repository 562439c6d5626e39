"""The row pass and the column pass of csrc/cuda, launched.

Legend: R rows, K prototypes, D embedding dim; all but results padded to whole tiles.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributed import ProcessGroup

from vmf_kernels.backends.contract import LossInputs
from vmf_kernels.backends.cuda import binding
from vmf_kernels.backends.cuda.layouts import PAD_TO
from vmf_kernels.backends.cuda.prototypes import pack_prototypes, pull_back
from vmf_kernels.backends.triton.passes import Columns, Parts, Side, empty_parts, merged_over_ranks, shared_out
from vmf_kernels.backends.triton.prototypes import PackedPrototypes
from vmf_kernels.backends.triton.tiles import Layout, Tile


class CudaKernels:
    """``Kernels`` of the operator, from csrc/cuda."""

    pack_prototypes = staticmethod(pack_prototypes)
    pull_back = staticmethod(pull_back)

    def tile(self, name: str, features: Tensor, layout: Layout, rows: int | None = None) -> Tile:
        """The same for every pass, so that the rows or prototypes of one serve all."""
        return Tile(binding.module().row_tile(), PAD_TO)

    def column_name(self, inputs: LossInputs, layout: Layout) -> str:
        """There is but one."""
        return "columns"

    def row_pass(
        self,
        rows: Tensor,
        keys: PackedPrototypes,
        values: PackedPrototypes | None,
        name: str,
        tile: Tile,
        group: ProcessGroup | None = None,
    ) -> Parts:
        """As ``backends.triton.passes.row_pass``."""
        width = keys.layout.width
        own_values = values is not None and values is not keys
        block = Tile(tile.rows, binding.module().prototype_tile(width=width, own_values=own_values))
        splits, split_size = shared_out(rows, keys, values, block)
        parts = empty_parts(rows, splits, values)
        has_value_bias = name == "teacher" and values is not None and values.has_bias
        binding.module().row_pass(
            binding.queue(rows),
            element=binding.element(rows.dtype),
            width=width,
            rows=rows.shape[0],
            prototypes=keys.weight.shape[0],
            splits=splits,
            split_size=split_size,
            features=binding.address(rows),
            keys=binding.address(keys.weight),
            values=binding.address(None if values is None else values.weight),
            bias=binding.address(keys.bias),
            value_bias=binding.address(values.bias if values is not None and has_value_bias else None),
            temperature=binding.address(keys.temperature),
            statistics=binding.address(parts.statistics),
            barycentre=binding.address(None if values is None else parts.barycentre),
        )
        return merged_over_ranks(parts, group, has_values=values is not None)

    def column_pass(
        self,
        student: Side | None,
        teacher: Side,
        cotangents: Tensor,
        unit: Tensor,
        total: Tensor,
        out: Columns,
        tile: Tile,
    ) -> None:
        """As ``backends.triton.passes.column_pass``."""
        keys = teacher.keys
        binding.module().column_pass(
            binding.queue(teacher.rows),
            _side(student),
            _side(teacher),
            element=binding.element(teacher.rows.dtype),
            width=keys.layout.width,
            prototypes=keys.weight.shape[0],
            prototype_count=keys.prototypes,
            dim=0 if out.vectors is None else out.vectors.shape[1],
            cotangents=binding.address(None if student is None else cotangents),
            unit=binding.address(unit),
            total=binding.address(total),
            vectors=binding.address(out.vectors),
            bias_gradient=binding.address(out.bias_gradient),
            usage=binding.address(out.usage),
        )


CUDA = CudaKernels()


def _side(side: Side | None) -> Any:
    if side is None:
        return binding.module().Side(rows=0, keys=0, features=0, bias=0, offset=0, temperature=0)
    return binding.module().Side(
        rows=side.rows.shape[0],
        keys=binding.address(side.keys.weight),
        features=binding.address(side.rows),
        bias=binding.address(side.keys.bias),
        offset=binding.address(side.offset),
        temperature=binding.address(side.keys.temperature),
    )
