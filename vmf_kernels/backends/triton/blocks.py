"""Blocks of rows and prototypes, cut into chunks of the embedding dim; used by the row pass and the column pass.

A block [N, D] is a tuple of CHUNKS tiles [N, CHUNK]: the sides of a tile are powers of two, and D = 384 must not cost as much
as 512. Everything is padded to whole tiles before these kernels run (``prototype_kernels``, ``pairing_kernels``), so no load
here needs a mask.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-1e38)  # the first running maximum; finite, because (-inf) - (-inf) would be NaN


@triton.jit
def load_block(
    source,
    i_row,
    i_column,
    N: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    WIDTH: tl.constexpr,
    TMA: tl.constexpr,
):
    """CHUNKS tiles [N, CHUNK] of a [., WIDTH] matrix, starting at row ``i_row`` and column ``i_column``.

    ``source`` is a pointer, or, with TMA, the descriptor of tiles [N, CHUNK].
    """
    block = ()
    for chunk in tl.static_range(CHUNKS):
        column = i_column + chunk * CHUNK
        if TMA:
            block = block + (source.load([i_row, column]),)
        else:
            # 64-bit: a million prototypes of dim 4096 have more than 2^31 elements
            tile = source + tl.cast(i_row, tl.int64) * WIDTH + column
            o_tile = tl.arange(0, N)[:, None] * WIDTH + tl.arange(0, CHUNK)[None, :]
            block = block + (tl.load(tile + o_tile),)
    return block


@triton.jit
def zero_block(N: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    """CHUNKS tiles [N, CHUNK] of zeros, in fp32, the dtype of every sum."""
    block = ()
    for _ in tl.static_range(CHUNKS):
        block = block + (tl.zeros([N, CHUNK], tl.float32),)
    return block


@triton.jit
def inner_products(left, right, CHUNKS: tl.constexpr, PRECISION: tl.constexpr):
    """[N, M] products of the rows of two blocks over D, fp32."""
    product = tl.dot(left[0], right[0].T, input_precision=PRECISION)
    for chunk in tl.static_range(1, CHUNKS):
        product = tl.dot(left[chunk], right[chunk].T, product, input_precision=PRECISION)
    return product


@triton.jit
def add_products(total, weights, block, CHUNKS: tl.constexpr, PRECISION: tl.constexpr):
    """``total + weights @ block``, tile by tile. Weights [N, M] are rounded to the block's dtype; sums stay fp32."""
    result = ()
    b_weights = weights.to(block[0].dtype)
    for chunk in tl.static_range(CHUNKS):
        result = result + (tl.dot(b_weights, block[chunk], total[chunk], input_precision=PRECISION),)
    return result


@triton.jit
def scale_block(block, factor, CHUNKS: tl.constexpr):
    """Each tile times ``factor``, [N, 1] or a scalar."""
    result = ()
    for chunk in tl.static_range(CHUNKS):
        result = result + (block[chunk] * factor,)
    return result
