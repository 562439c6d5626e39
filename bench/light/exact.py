"""The exact results of the passes, in float64 on the host, and the allowed rounding errors.

Everything is formed from integers and powers of two, so that rounding takes it nowhere; the allowance is for an exponential
that is off by its last bits.

Legend: R rows, S / T student / teacher rows, K prototypes, D embedding dim, N splits.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from bench.light.inputs import Array

LOWEST = -1e38  # a first running maximum
RELATIVE = 2.0**-17  # of the sum of absolute terms: 14 rises of a maximum, each with 2 ulp of an exponential


class Exact(NamedTuple):
    """One tensor: what it is to be, and by how much an element may differ."""

    value: Array
    allowed: Array
    axes: tuple[str, ...]


def row_pass(
    logits_RK: Array, values_KD: Array | None, value_bias_K: Array | None, splits: int, size: int
) -> dict[str, Exact]:
    """Of base-2 logits in parts of ``size`` prototypes: the statistics, and the barycentre where there are values."""
    parts = [
        _part(logits_RK[:, first : first + size], _cut(values_KD, first, size), _cut(value_bias_K, first, size))
        for first in range(0, splits * size, size)
    ]
    statistics, scale = (np.stack([part[i] for part in parts], axis=1) for i in (0, 1))
    result = {"statistics": Exact(statistics, RELATIVE * scale, ("statistic", "split", "row"))}
    if values_KD is not None:
        sums, scale = (np.stack([part[i] for part in parts]) for i in (2, 3))
        result["barycentre"] = Exact(sums, RELATIVE * scale, ("split", "row", "column"))
    return result


def _cut(matrix: Array | None, first: int, size: int) -> Array | None:
    return None if matrix is None else matrix[first : first + size]


def _part(logits_RK: Array, values_KD: Array | None, value_bias_K: Array | None) -> tuple[Array, ...]:
    """([4, R] statistics, their sums of absolute terms, [R, D] barycentre, likewise) of one split, which may be empty."""
    rows, none = logits_RK.shape[0], np.zeros((logits_RK.shape[0], 0))
    top_R = logits_RK.max(axis=1, initial=np.float32(LOWEST))
    deviation = logits_RK - top_R[:, None]
    p = np.exp2(deviation)
    moment = p * deviation
    bias = np.zeros(p.shape[1]) if value_bias_K is None else value_bias_K
    statistics = np.stack([top_R, p.sum(axis=1), moment.sum(axis=1), p @ bias])
    scale = np.stack([np.zeros(rows), p.sum(axis=1), -moment.sum(axis=1), p @ abs(bias)])
    if values_KD is None:
        return statistics, scale, none, none
    sums = p @ values_KD
    return statistics, scale, sums, np.broadcast_to(p.sum(axis=1)[:, None] * abs(values_KD).max(initial=0), sums.shape)


class Network(NamedTuple):
    """One side of a column pass: [K, R] weights ``2^(l - offset)``, and the [R, D] rows they weigh."""

    weights: Array
    values: Array


def column_pass(
    student: Network | None, teacher: Network, factor: np.float32, unit: float, total: float
) -> dict[str, Exact]:
    """Usage alone without a student, else also the vectors and the bias gradient; ``factor`` is of the vectors."""
    mass_K = teacher.weights.sum(axis=1)
    result = {"usage": Exact(mass_K / unit / total, RELATIVE * mass_K / unit / total, ("prototype",))}
    if student is None:
        return result
    student_mass_K = student.weights.sum(axis=1)
    beta, scale = student_mass_K - mass_K, student_mass_K + mass_K
    result["bias_gradient"] = Exact(beta / unit, RELATIVE * scale / unit, ("prototype",))
    sums = student.weights @ student.values + teacher.weights @ teacher.values
    # one product in fp32, as in the kernel
    vectors = (factor * sums.astype(np.float32)).astype(np.float64)
    most = student_mass_K * abs(student.values).max() + mass_K * abs(teacher.values).max()
    allowed = np.broadcast_to(RELATIVE * float(factor) * most[:, None], vectors.shape)
    result["vectors"] = Exact(vectors, allowed, ("prototype", "column"))
    return result


def merged(statistics: Array, barycentre: Array, weight_R: Array, unit: float) -> dict[str, Exact]:
    """The result of ``rows.merge_teachers`` for these parts; logarithms are rounded, so it is near and not exact."""
    tops, masses, moments, biases = statistics
    top_R = tops.max(axis=0)
    decay = np.exp2(tops - top_R)
    mass = (decay * masses).sum(axis=0)
    shift = np.where(decay > 0, tops - top_R, 0.0)
    moment = (decay * (moments + shift * masses)).sum(axis=0)
    log_mass = np.log2(mass)
    with np.errstate(divide="ignore"):
        offset = top_R + log_mass - np.log2(unit * weight_R)
    entropy = weight_R * (log_mass - moment / mass) * np.log(2)
    expected_bias = (decay * biases).sum(axis=0) / mass * np.log(2)
    sums = (decay[:, :, None] * barycentre).sum(axis=0) / mass[:, None]
    return {
        "offset": near(offset, ("row",)),
        "entropy": near(entropy, ("row",)),
        "expected_bias": near(expected_bias, ("row",)),
        "barycentre": near(sums, ("row", "column")),
        "log_sum_exp": near((top_R + log_mass) * np.log(2), ("row",)),
    }


def near(value: Array, axes: tuple[str, ...], relative: float = 2.0**-15) -> Exact:
    """Allows for several roundings in fp32 of numbers near 1."""
    return Exact(value, relative * np.maximum(1.0, np.abs(np.where(np.isfinite(value), value, 0.0))), axes)
