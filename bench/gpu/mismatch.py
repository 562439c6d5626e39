"""Where a result is wrong, so that the fault can be found without the GPU: how many, the first, and a histogram of places."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

FIRST = 12  # wrong elements that are written out
MODULI = (8, 16, 64)  # fragments, tiles of a product, boxes of a copy
TOLERANCE = (
    0.05  # of an element, relative to itself and to the whole's root mean square: 16-bit rounding is a tenth of it
)


def mismatch(got: Tensor, expected: Tensor, width: int) -> dict[str, Any]:
    """What is wrong with a result, for the record; NaN is wrong.

    Args:
        got, expected: [...] of the same shape.
        width: columns of the matrix that their elements are, row by row; what is left at the end counts as one more.
    """
    got, expected = got.detach().double().flatten(), expected.detach().double().flatten()
    scale = expected.nan_to_num().square().mean().sqrt()
    is_right = (got - expected).abs() <= TOLERANCE * (expected.abs() + scale)
    wrong = (~is_right).nonzero().flatten()
    rows, columns = wrong // width, wrong % width
    places = {"row": rows, "column": columns}
    return {
        "wrong": len(wrong),
        "of": got.numel(),
        "not_finite": int((~got.isfinite()).sum()),
        "largest_error": float((got - expected).abs().nan_to_num(nan=float("inf")).max()),
        "rows": [int(rows.min()), int(rows.max())] if len(wrong) else [],
        "first": [
            {"row": i // width, "column": i % width, "got": float(got[i]), "expected": float(expected[i])}
            for i in wrong[:FIRST].tolist()
        ],
        "histogram": {
            f"{name} mod {modulus}": torch.bincount(place % modulus, minlength=modulus).tolist()
            for name, place in places.items()
            for modulus in MODULI
        },
    }
