"""Launches of the row pass and the column pass of csrc/cuda.

Legend: R rows, K prototypes, D embedding dim; everything except results is padded to whole tiles.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from vmf_kernels.backends.cuda import binding
from vmf_kernels.backends.cuda.layouts import PAD_TO
from vmf_kernels.backends.cuda.prototypes import pack_networks, pack_prototypes, pull_back
from vmf_kernels.backends.triton.passes import Columns, Parts, Side, empty_parts, merged_over_ranks, shared_out
from vmf_kernels.backends.triton.prototypes import PackedPrototypes
from vmf_kernels.backends.triton.tiles import Layout, Tile


class CudaKernels:
    """``Kernels`` of the operator, from csrc/cuda.

    Args:
        blocks_in_cluster: 1, or 2: then pairs of blocks of threads stream keys and values together where possible
            (csrc/cuda/stream.h). The results are the same.
    """

    pack_prototypes = staticmethod(pack_prototypes)
    pack_networks = staticmethod(pack_networks)
    pull_back = staticmethod(pull_back)

    def __init__(self, blocks_in_cluster: int = 1) -> None:
        self.blocks_in_cluster = blocks_in_cluster

    def tile(self, name: str, features: Tensor, layout: Layout, rows: int | None = None) -> Tile:
        """The same tile for every pass, so that all passes can share packed rows and prototypes."""
        return Tile(binding.module().row_tile(), PAD_TO)

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
        column_parts = 1 if values is None else binding.module().column_parts(width=width)
        block = Tile(tile.rows, binding.module().prototype_tile(width=width, own_values=own_values), column_parts)
        splits, split_size = shared_out(rows, keys, values, block)
        parts = empty_parts(rows, splits, values)
        has_value_bias = name == "teacher" and values is not None and values.has_bias
        at, element, padded = rows.device, rows.dtype, keys.weight.shape[0]
        binding.module().row_pass(
            binding.queue(rows),
            element=binding.element(element),
            width=width,
            rows=rows.shape[0],
            prototypes=padded,
            splits=splits,
            split_size=split_size,
            features=binding.address(rows, at, rows.shape[0] * width, element),
            keys=binding.address(keys.weight, at, padded * width, element),
            values=binding.address(None if values is None else values.weight, at, padded * width, element),
            bias=binding.address(keys.bias, at, padded),
            value_bias=binding.address(values.bias if values is not None and has_value_bias else None, at, padded),
            temperature=binding.address(keys.temperature, at, 1, torch.float64),
            statistics=binding.address(parts.statistics, at, 4 * splits * rows.shape[0]),
            barycentre=binding.address(
                None if values is None else parts.barycentre, at, splits * rows.shape[0] * width
            ),
            blocks_in_cluster=self.blocks_in_cluster,
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
        keys, at, element = teacher.keys, teacher.rows.device, teacher.rows.dtype
        count, dim = keys.prototypes, 0 if out.vectors is None else out.vectors.shape[1]
        binding.module().column_pass(
            binding.queue(teacher.rows),
            _side(student),
            _side(teacher),
            element=binding.element(element),
            width=keys.layout.width,
            prototypes=keys.weight.shape[0],
            prototype_count=count,
            dim=dim,
            cotangents=binding.address(None if student is None else cotangents, at, teacher.rows.numel(), element),
            unit=binding.address(unit, at, 1),
            total=binding.address(total, at, 1),
            vectors=binding.address(out.vectors, at, count * dim),
            bias_gradient=binding.address(out.bias_gradient, at, count),
            usage=binding.address(out.usage, at, count),
            blocks_in_cluster=self.blocks_in_cluster,
        )


CUDA = CudaKernels()
CUDA_CLUSTERS = CudaKernels(blocks_in_cluster=2)  # no backend uses them until they have been measured


def _side(side: Side | None) -> Any:
    if side is None:
        return binding.module().Side(rows=0, keys=0, features=0, bias=0, offset=0, temperature=0)
    at, element, width = side.rows.device, side.rows.dtype, side.keys.layout.width
    rows, padded = side.rows.shape[0], side.keys.weight.shape[0]
    return binding.module().Side(
        rows=rows,
        keys=binding.address(side.keys.weight, at, padded * width, element),
        features=binding.address(side.rows, at, rows * width, element),
        bias=binding.address(side.keys.bias, at, padded),
        offset=binding.address(side.offset, at, rows),
        temperature=binding.address(side.keys.temperature, at, 1, torch.float64),
    )
