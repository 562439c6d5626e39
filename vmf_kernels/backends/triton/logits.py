"""Triton passes of the cross-entropy from stored logits: each student logit is read once in forward and once in backward.

Legend: S / T student / teacher rows, G / V teacher / student views, B images, K prototypes. Rows are view-major.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from vmf_kernels.backends.stored.contract import Side, StoredInputs, Sums
from vmf_kernels.backends.triton import launch

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MOST_TEACHER_VIEWS = 8  # each keeps a tile of probabilities in registers; for more, a matrix product would be better


class Tile(NamedTuple):
    """The work of one program. Registers per thread are about the sum of its fp32 arrays [prototypes] over its threads."""

    prototypes: int
    warps: int


class Tiles(NamedTuple):
    """Tiles of the passes, chosen from the registers and instructions that ptxas reports; not measured on a GPU yet."""

    teacher: Tile
    student: Tile
    gradient: Tile


# Forward: one warp per tile, because its sums are then shuffles, 40 instructions per row. With 16 prototypes per thread, these
# are a sixth of the student's instructions, in G + 3 arrays of registers (at G = 2, 96 registers and 20 warps per
# multiprocessor). 32 prototypes would save 17% of the instructions but halve the warps. The teacher has 1 array. The gradient
# sums nothing over prototypes.
TILES = {
    1: Tiles(Tile(1024, 1), Tile(512, 1), Tile(1024, 2)),
    2: Tiles(Tile(1024, 1), Tile(512, 1), Tile(1024, 2)),
    4: Tiles(Tile(1024, 1), Tile(512, 1), Tile(512, 2)),
    8: Tiles(Tile(1024, 1), Tile(256, 1), Tile(512, 2)),
}
MERGED_TILES = 128  # tiles merged at once: K = 65,536 has 64 or 128
PROGRAMS_PER_MULTIPROCESSOR = 64  # 20 to 32 are resident: with two or more waves, programs that end early cost little
ROWS_PER_GROUP = 4  # at least, to share the loading of biases and temperatures
ROWS_PER_SUM = 16  # at least, if a group writes an fp32 sum for each prototype: 4 bytes for 32 that it reads in bf16


class TritonStored:
    """A ``contract.StoredBackend`` on Triton's kernels; logits must have a last stride of 1, weights must be fp32."""

    def unsupported(self, inputs: StoredInputs) -> str | None:
        """Why it cannot run, or None: no kernel for the device, dtype, strides or number of teacher views."""
        reason = launch.unsupported_device(inputs.student.logits.device)
        if reason is not None:
            return reason
        for logits, side in ((inputs.student.logits, "student"), (inputs.teacher.logits, "teacher")):
            if logits.dtype not in DTYPES:
                return f"{side} logits are {logits.dtype}; it takes bfloat16, float16 and float32"
            if logits.shape[1] == 0:
                return "there are no prototypes"
            if logits.shape[1] > 1 and logits.stride(1) != 1:
                return f"{side} logits have strides {tuple(logits.stride())}; it reads rows whose elements are adjacent"
        teacher_views = inputs.view_weights.shape[0]
        if teacher_views > MOST_TEACHER_VIEWS:
            return f"there are {teacher_views} teacher views; it takes at most {MOST_TEACHER_VIEWS}"
        return None

    def forward(self, inputs: StoredInputs) -> Sums:
        """See ``contract.StoredBackend``."""
        student, teacher, pairs, images = inputs
        pairs, images = pairs.contiguous(), images.contiguous()
        with launch.on_device(student.logits):
            teacher_lse, teacher_softmax, teacher_entropy = _teacher_pass(teacher, pairs, images)
            student_lse, student_terms, usage = _student_pass(student, teacher, teacher_softmax, pairs, images)
        loss, student_entropy = student_terms.sum(dim=1, dtype=torch.float64)
        terms = torch.stack([loss, teacher_entropy.sum(dtype=torch.float64), student_entropy])
        return Sums(terms, usage, student_lse, teacher_lse)

    def backward(
        self, inputs: StoredInputs, loss_gradient: Tensor, student_lse: Tensor, teacher_lse: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See ``contract.StoredBackend``."""
        from vmf_kernels.backends.triton import logit_kernels as kernels

        student, teacher, view_weights, image_weights = inputs
        (teacher_views, views), (rows, count) = view_weights.shape, student.logits.shape
        images, tiles = rows // views, _tiles(teacher_views)
        least = (ROWS_PER_GROUP if student.bias is None else ROWS_PER_SUM) / (views + teacher_views)
        step, groups = _groups(images, least, tiles.gradient, student.logits)
        pairs = view_weights.contiguous()
        gradient = torch.empty_like(student.logits, memory_format=torch.contiguous_format)
        bias_gradients = None if student.bias is None else pairs.new_empty(groups, count)
        with launch.on_device(student.logits):
            launch.run(
                kernels.gradient_kernel,
                (_tile_count(count, tiles.gradient), groups),
                loss_gradient,
                *(*_pointers(student), student_lse, *_pointers(teacher), teacher_lse),
                *(pairs, pairs.sum(dim=0), image_weights.contiguous(), gradient, bias_gradients),
                *(images, count, views, step),
                G=teacher_views,
                WHOLE=count % tiles.gradient.prototypes == 0,
                BLOCK_K=tiles.gradient.prototypes,
                num_warps=tiles.gradient.warps,
            )
        return gradient, pairs.new_zeros(count) if bias_gradients is None else bias_gradients.sum(dim=0)


def _teacher_pass(teacher: Side, pairs: Tensor, image_weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exp [B, G] of the teacher's rows, its summands maximum and log-mass [2, B, G], and weighted entropy [T]."""
    from vmf_kernels.backends.triton import logit_kernels as kernels

    (rows, count), teacher_views = teacher.logits.shape, pairs.shape[0]
    images, tile = rows // teacher_views, _tiles(teacher_views).teacher
    step, groups = _groups(rows, ROWS_PER_GROUP, tile, teacher.logits)
    tile_count = _tile_count(count, tile)
    partials = pairs.new_empty(3, rows, tile_count)
    launch.run(
        kernels.teacher_tiles_kernel,
        (tile_count, groups),
        *(*_pointers(teacher), partials, rows, count, step),
        WHOLE=count % tile.prototypes == 0,
        BLOCK_K=tile.prototypes,
        num_warps=tile.warps,
    )
    softmax, entropy = pairs.new_empty(2, images, teacher_views), pairs.new_empty(rows)
    lse = torch.empty_like(softmax[0])
    launch.run(
        kernels.merge_teacher_kernel,
        (rows,),
        *(partials, pairs.sum(dim=1), image_weights, softmax, lse, entropy, images, tile_count),
        G=teacher_views,
        BLOCK_T=MERGED_TILES,
        num_warps=1,
    )
    return lse, softmax, entropy


def _student_pass(
    student: Side, teacher: Side, teacher_softmax: Tensor, pairs: Tensor, image_weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exp [B, V] of the student's rows, their weighted loss and entropy [2, S], and the usage's sum [K]."""
    from vmf_kernels.backends.triton import logit_kernels as kernels

    (teacher_views, views), (rows, count) = pairs.shape, student.logits.shape
    images, tile = rows // views, _tiles(teacher_views).student
    step, groups = _groups(images, ROWS_PER_SUM / (views + teacher_views), tile, student.logits)
    tile_count = _tile_count(count, tile)
    partials, usage = pairs.new_empty(4, rows, tile_count), pairs.new_empty(groups, count)
    teacher_sums = pairs.new_empty(teacher_views * images, tile_count)
    launch.run(
        kernels.student_tiles_kernel,
        (tile_count, groups),
        *(*_pointers(student), *_pointers(teacher), teacher_softmax, pairs, pairs.sum(dim=1), image_weights),
        *(partials, teacher_sums, usage, images, count, views, step),
        G=teacher_views,
        WHOLE=count % tile.prototypes == 0,
        BLOCK_K=tile.prototypes,
        num_warps=tile.warps,
    )
    lse, terms = pairs.new_empty(images, views), pairs.new_empty(2, rows)
    launch.run(
        kernels.merge_student_kernel,
        (rows,),
        *(partials, teacher_sums, pairs, pairs.sum(dim=0), image_weights, lse, terms, images, tile_count, views),
        G=teacher_views,
        BLOCK_T=MERGED_TILES,
        num_warps=1,
    )
    return lse, terms, usage.sum(dim=0)


def _pointers(side: Side) -> tuple[Tensor, int, Tensor | None, Tensor]:
    """The kernels' arguments for one network: logits, row stride, bias, temperature."""
    bias = None if side.bias is None else side.bias.reshape(-1).contiguous()
    return side.logits, side.logits.stride(0), bias, side.temperature


def _tiles(teacher_views: int) -> Tiles:
    return next(tiles for most, tiles in TILES.items() if teacher_views <= most)


def _tile_count(prototypes: int, tile: Tile) -> int:
    return math.ceil(prototypes / tile.prototypes)


def _groups(items: int, least: float, tile: Tile, logits: Tensor) -> tuple[int, int]:
    """(items in a group, groups): enough programs for the device, but so few that the overhead of each stays small.

    Args:
        items: number of images, or of rows.
        least: smallest number of items in a group, except the last.
        tile: of each program of a group.
        logits: [rows, K], on the device.
    """
    multiprocessors = launch.target_of(logits.device).multiprocessors
    wanted = math.ceil(PROGRAMS_PER_MULTIPROCESSOR * multiprocessors / _tile_count(logits.shape[1], tile))
    size = max(math.ceil(items / wanted), math.ceil(least))
    return size, math.ceil(items / size)
