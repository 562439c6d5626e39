"""Inputs of small integers that 16 bits hold exactly, made by arithmetic alone: the same on every machine.

Rows are +-1 throughout, keys +-1 in few places: their products are even integers, spread so little that every weight
2^(l - max) and every sum of weights times small integers is a number that fp32 holds, in whatever order it is formed. So a
right kernel gives the exact result, and a wrong index one that is off by at least the smallest weight.

Legend: R rows, K prototypes, D embedding dim.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

LOG2_E = 1.4426950408889634
LOGIT_TERMS = 6  # keys' nonzero places: products from -6 to 6


def hashed(count: int, seed: int) -> Array:
    """[count] uint32 without a pattern, the same ones for a seed (the finaliser of MurmurHash3)."""
    mixed = np.arange(count, dtype=np.uint32) + np.uint32(seed * 0x9E3779B1 & 0xFFFFFFFF)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        mixed = (mixed ^ (mixed >> np.uint32(shift))) * np.uint32(factor)
    return mixed ^ (mixed >> np.uint32(16))


def integers(shape: tuple[int, ...], low: int, high: int, seed: int) -> Array:
    """Integers from low to high, both included, as float64."""
    drawn = hashed(int(np.prod(shape)), seed) % np.uint32(high - low + 1)
    return drawn.astype(np.float64).reshape(shape) + low


def signs(shape: tuple[int, ...], seed: int) -> Array:
    """-1 or 1."""
    return 2 * integers(shape, 0, 1, seed) - 1


def sparse_signs(count: int, dim: int, terms: int, seed: int) -> Array:
    """[count, dim] zeros but for ``terms`` signs a row, one in each of so many equal parts of the columns."""
    edges = np.arange(terms + 1) * dim // terms
    drawn = hashed(count * terms, seed).reshape(count, terms).astype(np.int64)
    places = edges[:-1] + drawn % (edges[1:] - edges[:-1])
    matrix = np.zeros((count, dim))
    np.put_along_axis(matrix, places, signs((count, terms), seed + 1), axis=1)
    return matrix


def padded(matrix: Array, rows: int, columns: int) -> Array:
    """The matrix in the corner of zeros [rows, columns]."""
    whole = np.zeros((rows, columns))
    whole[: matrix.shape[0], : matrix.shape[1]] = matrix
    return whole


def padded_vector(values: Array, count: int, fill: float) -> Array:
    """[count] with ``fill`` behind the values."""
    return np.concatenate([values, np.full(count - len(values), fill)])
