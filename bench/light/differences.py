"""Where a tensor is wrong, and the pattern of wrong elements: enough to find the fault without the GPU.

Of first light's kernels on exact inputs, and of a pass whose result is not that of another backend (``bench.gpu.passes``).

Legend: a wrong element is one further from the exact result than allowed, or NaN.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import numpy as np

from bench.light.exact import Exact
from bench.light.inputs import Array

FIRST = 8  # mismatches that are printed
MODULI = (8, 16, 64)
CLASSED = ("row", "column", "prototype")  # axes whose indices kernels compute with
UNEVEN = 2.0  # times the least number of wrong elements in a class that the most must have, to be a pattern
MOVED_AMONG = 2048  # rows or columns that are looked for elsewhere
GROUP_ROWS, BOX = 64, 64  # of csrc/cuda: a warpgroup's rows of a block of 128, a box's columns


class Difference(NamedTuple):
    """A wrong tensor."""

    case: str
    tensor: str
    got: Array
    expected: Array
    wrong: Array  # flat indices
    report: dict[str, Any]  # for the record; every part is short


def compared(case: str, tensor: str, got: Array, exact: Exact) -> Difference | None:
    """The difference from the exact result; None if all elements are right.

    Raises:
        ValueError: the shapes differ.
    """
    if got.shape != exact.value.shape:
        raise ValueError(f"{case}: {tensor} has shape {got.shape}; expected {exact.value.shape}")
    error = errors(got, exact)
    is_wrong = ~(error <= exact.allowed)
    if not is_wrong.any():
        return None
    wrong = np.flatnonzero(is_wrong)
    return Difference(case, tensor, got, exact.value, wrong, _report(case, tensor, got, exact, wrong))


def errors(got: Array, exact: Exact) -> Array:
    """Absolute errors: 0 where both are the same infinity, NaN where one is NaN."""
    with np.errstate(invalid="ignore"):
        return np.where(got == exact.value, 0.0, np.abs(got - exact.value))


def _report(case: str, tensor: str, got: Array, exact: Exact, wrong: Array) -> dict[str, Any]:
    places = np.stack(np.unravel_index(wrong, got.shape), axis=1)
    finite = errors(got, exact).ravel()[wrong]
    largest = np.nanmax(finite) if not np.isnan(finite).all() else float("nan")
    return {
        "case": case,
        "tensor": tensor,
        "axes": exact.axes,
        "shape": got.shape,
        "wrong": len(wrong),
        "of": got.size,
        "nan": int(np.isnan(got).sum()),
        "largest_error": float(largest),
        "first": [
            {"at": place.tolist(), "got": float(got[tuple(place)]), "expected": float(exact.value[tuple(place)])}
            for place in places[:FIRST]
        ],
        "classes": {
            axis: found
            for i, axis in enumerate(exact.axes)
            if axis in CLASSED and (found := classes(places[:, i], got.shape[i]))
        },
        "hints": list(hints(got, exact, places)),
    }


def classes(places: Array, size: int) -> dict[str, str]:
    """For each modulus with a pattern which classes of an axis' indices are wrong, such as {"64": "32-63"} or their counts."""
    found = {}
    for modulus in MODULI:
        if size < modulus:
            continue
        counts = np.bincount(places % modulus, minlength=modulus)
        if counts.max() >= UNEVEN * max(counts.min(), 1):
            found[str(modulus)] = ranges(np.flatnonzero(counts)) if not counts.min() else " ".join(map(str, counts))
    return found


def present(places: Array) -> Array:
    """The different ones of small non-negative integers, in order; without sorting millions."""
    return np.flatnonzero(np.bincount(places))


def ranges(numbers: Array) -> str:
    """0 1 2 5 -> "0-2 5"."""
    runs = np.split(numbers, np.flatnonzero(np.diff(numbers) != 1) + 1) if len(numbers) else []
    return " ".join(f"{run[0]}" if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def hints(got: Array, exact: Exact, places: Array) -> Iterator[str]:
    """What some patterns mean; a few words each."""
    axes = dict(zip(exact.axes, places.T, strict=True))
    if np.isnan(got.ravel()).all():
        yield "never written"
    for axis in axes.keys() & {"row", "prototype"}:
        yield from _halves(axis, axes[axis], got.shape[exact.axes.index(axis)])
    if "column" in axes:
        boxes, width = present(axes["column"] // BOX), got.shape[-1]
        if 0 < len(boxes) < -(-width // BOX):
            yield f"only 64-column boxes {ranges(boxes)}: the values' leading offset"
        if present(axes["column"] % 2).tolist() == [1]:
            yield "only odd columns: halves of a pair"
    for axis in sorted(axes.keys() & {"split", "statistic"}):
        i = exact.axes.index(axis)
        if len(wrong := present(axes[axis])) < got.shape[i]:
            yield f"only {axis} {ranges(wrong)} of {got.shape[i]}"
    yield from _factor(got, exact, places)
    if got.ndim >= 2:
        yield from (text for axis in (-1, -2) for text in moved(got, exact, axis))


def _halves(axis: str, indices: Array, size: int) -> Iterator[str]:
    if size >= 2 * GROUP_ROWS and len(groups := present(indices // GROUP_ROWS % 2)) == 1:
        yield f"only {axis}s of warpgroup {groups[0]} (index // 64 odd or even)"
    if len(halves := present(indices // 8 % 2)) == 1 and size >= 16:
        yield f"only {axis}s {8 * halves[0]}-{8 * halves[0] + 7} of 16: one half h of the fragment"


def _factor(got: Array, exact: Exact, places: Array) -> Iterator[str]:
    """Whether the wrong elements are the exact ones times one number."""
    at = tuple(places.T)
    value, found = exact.value[at], got[at]
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = (found / value)[value != 0].astype(np.float32)
    if len(ratios) and np.isfinite(ratios[0]) and (ratios == ratios[0]).all():
        yield f"every wrong element is {ratios[0]:g} times the exact one"


def moved(got: Array, exact: Exact, axis: int) -> Iterator[str]:
    """Whether whole rows or columns, in all other axes, hold what belongs to others: what a wrong address looks like."""
    size = got.shape[axis]
    if not 1 < size <= MOVED_AMONG:
        return
    lines, expected = (np.moveaxis(x, axis, 0).astype(np.float32).reshape(size, -1) for x in (got, exact.value))
    owners: dict[bytes, int] = {}
    for i in range(size):
        owners.setdefault((expected[i] + 0.0).tobytes(), i)  # + 0.0: one zero
    pairs = [(i, owners.get((lines[i] + 0.0).tobytes())) for i in range(size)]
    elsewhere = [f"{i}<-{j}" for i, j in pairs if j is not None and not np.array_equal(lines[i], expected[i])]
    if elsewhere:
        more = f" and {len(elsewhere) - FIRST} more" if len(elsewhere) > FIRST else ""
        yield f"{exact.axes[axis]}s hold what belongs to others: {' '.join(elsewhere[:FIRST])}{more}"


def verdict(tensors: Collection[str], wrong: Collection[str]) -> str:
    """Which half of a pass to inspect, given which of its results are wrong; "" if that tells nothing."""
    weighted = {"barycentre", "vectors"} & set(tensors)  # what the second product forms
    if not weighted or not wrong:
        return ""
    if set(wrong) <= weighted:
        return "logits are right, the second product is not: values, weights' fragments, or their slots"
    return "the weights themselves are wrong: first product, biases or offsets, or scale"


def in_words(report: dict[str, Any]) -> str:
    """A report in a line."""
    first = "; ".join(f"{one['at']} got {one['got']:g} expected {one['expected']:g}" for one in report["first"])
    words = f"{report['case']}: {report['tensor']} {report['wrong']} of {report['of']} wrong"
    words += f", {report['nan']} NaN, largest error {report['largest_error']:.3g}, first {first}"
    for axis, by_modulus in report["classes"].items():
        words += "".join(f", {axis} mod {modulus}: {which}" for modulus, which in by_modulus.items())
    return words + "".join(f" | {hint}" for hint in report["hints"])
