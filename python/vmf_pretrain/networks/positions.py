"""Positions of tokens: fixed ones, sines and cosines of a place along each axis of a grid; and learned ones on another grid.

Legend: N tokens in raster order, D embedding dimension.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

SLOWEST = 10000.0  # the longest wave is 2 pi times this many tokens, as in the first transformer
COLUMN_FIRST = (1, 0)  # MAE's and I-JEPA's order: the first half of the dimensions tells the column, the second the row

OFFSET = (
    0.1  # patches; DINO adds it to the wanted side, against the rounding of a factor, and uses the factor as it then is
)


def grid_positions(grid: Sequence[int], width: int, axes: Sequence[int]) -> Tensor:
    """[N, D] float32, computed in fp64: for each axis in turn ``[sin(p w_k) | cos(p w_k)]``, p the place along it.

    ``w_k = 10000^(-k / h)`` for k = 0 ... h - 1. Every axis has 2 h dimensions, h = ceil(D / (2 axes)); what exceeds D at the
    end is left out.

    Args:
        grid: tokens along each axis.
        width: D, an even number.
        axes: the order in which the axes are written: COLUMN_FIRST for images, (0, 1, 2) for clips.

    Raises:
        ValueError: ``axes`` is no order of the grid's axes, or ``width`` is odd.
    Source: the published trainers of MAE and I-JEPA (two axes) and of V-JEPA (three axes of the same share).
    """
    if sorted(axes) != list(range(len(grid))) or width % 2:
        raise ValueError(f"axes are {tuple(axes)} and width {width}; expected an order of {len(grid)} axes, and even")
    half = math.ceil(width / (2 * len(grid)))
    waves = SLOWEST ** (-torch.arange(half, dtype=torch.float64) / half)
    places = torch.cartesian_prod(*(torch.arange(length, dtype=torch.float64) for length in grid)).reshape(
        -1, len(grid)
    )
    angles = [places[:, axis, None] * waves for axis in axes]
    parts = [part for angle in angles for part in (angle.sin(), angle.cos())]
    return torch.cat(parts, dim=1)[:, :width].float()


def fix_positions(backbone: nn.Module, grid: Sequence[int], axes: Sequence[int]) -> None:
    """Give a vision transformer fixed positions, which are not trained; those of its prefix tokens are 0, as published."""
    positions = backbone.get_parameter("pos_embed")
    table = grid_positions(grid, positions.shape[-1], axes)
    with torch.no_grad():
        positions.zero_()
        positions[0, positions.shape[1] - len(table) :] = table
    positions.requires_grad_(False)


def resized_as_dino(positions: Tensor, grid: Sequence[int], wanted: Sequence[int]) -> Tensor:
    """[1, N', D] learned positions [1, N, D] of a grid on another one, bicubic without antialiasing.

    Place i of the wanted grid is place ``(i + 0.5) / f - 0.5`` of the old one, ``f = (n' + 0.1) / n`` along each axis.

    Args:
        positions: in raster order.
        grid: rows and columns.
        wanted: rows and columns.
    Source: repositories facebookresearch/dino (vision_transformer.py), bytedance/ibot and facebookresearch/dinov2 (there the
        defaults ``interpolate_offset: 0.1``, ``interpolate_antialias: false``).
    """
    factors = [(new + OFFSET) / old for new, old in zip(wanted, grid, strict=True)]
    picture = positions.reshape(1, *grid, -1).permute(0, 3, 1, 2)
    moved = functional.interpolate(picture, scale_factor=factors, mode="bicubic")
    return moved.permute(0, 2, 3, 1).flatten(1, 2)
