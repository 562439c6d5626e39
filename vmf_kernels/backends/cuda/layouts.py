"""How prototypes and rows are padded for the streaming passes of csrc/cuda.

Legend: K prototypes, D embedding dim.
"""

from __future__ import annotations

import torch

from vmf_kernels.backends.triton.tiles import Layout, precision_of

WIDTHS = (64, 128, 192, 256, 384)  # padded embedding dims that the passes are compiled for
MAX_DIM = WIDTHS[-1]
PAD_TO = 256  # prototypes are padded to this, a multiple of every tile


def width_of(dim: int) -> int:
    """D with its padding. D must be at most ``MAX_DIM``."""
    return next(width for width in WIDTHS if dim <= width)


def layout_of(dim: int, dtype: torch.dtype) -> Layout:
    """The width of D, cut for Triton's merge into chunks of the largest power of two that divides it."""
    width = width_of(dim)
    chunk = width & -width
    return Layout(chunk, width // chunk, precision_of(dtype))
