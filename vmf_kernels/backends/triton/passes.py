"""Launches of the row pass and the column pass.

Legend: R rows, S / T student / teacher rows, K prototypes, D embedding dim; all except results padded to whole tiles.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from vmf_kernels.backends.triton import launch
from vmf_kernels.backends.triton.column_kernels import gather_columns_kernel
from vmf_kernels.backends.triton.prototypes import PackedPrototypes
from vmf_kernels.backends.triton.row_kernels import assign_rows_kernel
from vmf_kernels.backends.triton.tiles import NO_TENSOR_CORES, PROTOTYPES_A_PART, Layout, Tile, split_count
from vmf_kernels.ranks import has_all_prototypes, max_over_ranks, sum_over_ranks

WORKSPACE_BYTES = 64 * 2**20  # of unmerged barycentres; bounds the number of splits
SPLITS_AT_ONCE = 16  # splits that a merging program loads together


class Parts(NamedTuple):
    """The unmerged results of a row pass, one part for each split of the prototypes."""

    statistics: Tensor  # [4, N, R] running maximum, mass, first moment, summed value bias
    barycentre: Tensor  # [N, R, D] unnormalised; without values, any tensor that is not read

    @property
    def splits(self) -> int:
        """N."""
        return self.statistics.shape[1]


class Side(NamedTuple):
    """One network in the column pass."""

    rows: Tensor  # [R, D]
    keys: PackedPrototypes
    offset: Tensor  # [R] base 2


class Columns(NamedTuple):
    """Where the column pass writes."""

    vectors: Tensor | None  # [K, D] fp32 gradient at the effective prototypes
    bias_gradient: Tensor | None  # [K] fp32
    usage: Tensor  # [K] fp32


def padded_rows(rows: int, tiles: list[Tile]) -> int:
    """``rows`` with their padding to whole blocks of every pass that reads them; at least one block."""
    block = max(tile.rows for tile in tiles)  # a multiple of the others: all are powers of two
    return max(1, -(-rows // block)) * block


def shared_out(rows: Tensor, keys: PackedPrototypes, values: PackedPrototypes | None, tile: Tile) -> tuple[int, int]:
    """(N, prototypes of each split except the last) of a row pass with this tile; no split is empty."""
    prototypes, width = keys.weight.shape
    multiprocessors = launch.target_of(rows.device).multiprocessors
    return splits_of(rows.shape[0], prototypes, tile, multiprocessors, width if values is not None else 0)


def splits_of(rows: int, prototypes: int, tile: Tile, multiprocessors: int, width: int) -> tuple[int, int]:
    """As ``shared_out``, from padded sizes.

    Args:
        width: columns of the barycentre; 0 without one.
    """
    prototype_blocks = prototypes // tile.prototypes
    most, part_blocks = prototype_blocks, 0.0
    if width:
        most = max(1, WORKSPACE_BYTES // (rows * width * 4))
        # programs that share a barycentre store a share of it, but each forms all logits: (2 + 2 / parts) / 4 of the products
        part_blocks = PROTOTYPES_A_PART / tile.prototypes * 2 / (1 + tile.parts)
    splits = split_count(rows // tile.rows * tile.parts, prototype_blocks, multiprocessors, most, part_blocks)
    split_blocks = -(-prototype_blocks // splits)
    return -(-prototype_blocks // split_blocks), split_blocks * tile.prototypes


def empty_parts(rows: Tensor, splits: int, values: PackedPrototypes | None) -> Parts:
    """Empty buffers for the results of a row pass."""
    count = rows.shape[0]
    statistics = torch.empty(4, splits, count, dtype=torch.float32, device=rows.device)
    barycentre = statistics if values is None else statistics.new_empty(splits, count, values.layout.width)
    return Parts(statistics, barycentre)


def row_pass(
    rows: Tensor,
    keys: PackedPrototypes,
    values: PackedPrototypes | None,
    name: str,
    tile: Tile,
    group: ProcessGroup | None = None,
) -> Parts:
    """Soft assignment of ``rows`` to ``keys`` with the barycentre of ``values``, unmerged; ``name`` is that of the pass.

    If the prototypes are split over the ranks of a group, the result is one part with the sums over all ranks.
    """
    layout = keys.layout
    splits, split_size = shared_out(rows, keys, values, tile)
    parts = empty_parts(rows, splits, values)
    has_value_bias = name == "teacher" and values is not None and values.has_bias
    kind = "none" if values is None else "keys" if values is keys and tile.parts == 1 else "own"
    launch.run(
        assign_rows_kernel,
        (rows.shape[0] // tile.rows, splits, tile.parts),
        _blocks(rows, tile.rows, layout, tile),
        _blocks(keys.weight, tile.prototypes, layout, tile),
        _blocks((keys if values is None else values).weight, tile.prototypes, layout, tile),
        keys.bias,
        keys.bias if values is None else values.bias,
        keys.temperature,
        *parts,
        rows.shape[0],
        split_size,
        keys.weight.shape[0],
        N_ROWS=tile.rows,
        N_PROTOTYPES=tile.prototypes,
        VALUE_CHUNKS=layout.chunks // tile.parts,
        VALUES=kind,
        HAS_VALUE_BIAS=has_value_bias,
        **_common(layout, tile),
    )
    return merged_over_ranks(parts, group, has_values=values is not None)


def merged_over_ranks(parts: Parts, group: ProcessGroup | None, *, has_values: bool) -> Parts:
    """One part with the sums over all splits of all ranks; ranks exchange one maximum and D + 3 sums per row.

    Without a group, the parts unchanged.
    """
    if has_all_prototypes(group):
        return parts
    top_NR, mass_NR, moment_NR, bias_NR = parts.statistics
    top_R = max_over_ranks(top_NR.amax(dim=0), group)
    shift_NR = top_NR - top_R
    weight_NR = shift_NR.exp2()
    # a split far below the others has weight 0, and its shift may be too large for a product
    moment_NR = moment_NR + torch.where(weight_NR > 0, shift_NR, 0.0) * mass_NR
    sums_R3 = torch.stack([(weight_NR * part).sum(dim=0) for part in (mass_NR, moment_NR, bias_NR)], dim=1)
    if not has_values:
        sums = sum_over_ranks(sums_R3, group)
        return Parts(torch.stack([top_R, *sums.unbind(1)])[:, None], parts.barycentre)
    width = parts.barycentre.shape[2]
    # in place and not as a matrix product, which would be rounded if torch is set to tf32
    barycentre_RD = parts.barycentre.mul_(weight_NR[:, :, None]).sum(dim=0)
    sums = sum_over_ranks(torch.cat([barycentre_RD, sums_R3], dim=1), group)
    barycentre_RD, sums_R3 = sums[:, :width].contiguous(), sums[:, width:]
    return Parts(torch.stack([top_R, *sums_R3.unbind(1)])[:, None].contiguous(), barycentre_RD[None])


def column_pass(
    student: Side | None, teacher: Side, cotangents: Tensor, unit: Tensor, total: Tensor, out: Columns, tile: Tile
) -> None:
    """Equations (5) and (6) over both networks' rows; without a student, only the usage."""
    layout = teacher.keys.layout
    asked = teacher if student is None else student
    blocks = [
        _blocks(matrix, size, layout, tile)
        for matrix, size in (
            (asked.keys.weight, tile.prototypes),
            (asked.rows, tile.rows),
            (teacher.keys.weight, tile.prototypes),
            (teacher.rows, tile.rows),
            (cotangents, tile.rows),
        )
    ]
    launch.run(
        gather_columns_kernel,
        (teacher.keys.weight.shape[0] // tile.prototypes, tile.parts if student is not None else 1),
        *blocks,
        *_sides(asked, teacher, unit, total, out),
        asked.rows.shape[0],
        teacher.rows.shape[0],
        *_sizes(teacher, out),
        N_ROWS=tile.rows,
        N_PROTOTYPES=tile.prototypes,
        VALUE_CHUNKS=layout.chunks // tile.parts if student is not None else layout.chunks,
        HAS_STUDENTS=student is not None,
        **_common(layout, tile),
    )


def _sides(student: Side, teacher: Side, unit: Tensor, total: Tensor, out: Columns) -> list[Tensor]:
    return [
        student.keys.bias,
        teacher.keys.bias,
        student.offset,
        teacher.offset,
        student.keys.temperature,
        teacher.keys.temperature,
        unit,
        total,
        out.usage if out.vectors is None else out.vectors,
        out.usage if out.bias_gradient is None else out.bias_gradient,
        out.usage,
    ]


def _sizes(teacher: Side, out: Columns) -> tuple[int, int]:
    return teacher.keys.prototypes, 0 if out.vectors is None else out.vectors.shape[1]


def _common(layout: Layout, tile: Tile) -> dict[str, Any]:
    return {
        "CHUNK": layout.chunk,
        "CHUNKS": layout.chunks,
        "PRECISION": "ieee" if layout.precision == NO_TENSOR_CORES else "tf32",  # without effect on 16-bit products
        "TMA": tile.tma,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def _blocks(matrix: Tensor, rows: int, layout: Layout, tile: Tile) -> Any:
    """The kernel's argument for loading tiles [rows, chunk] of the matrix: the pointer, or a tensor descriptor."""
    if not tile.tma:
        return matrix
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(matrix, [rows, layout.chunk])
