"""Small sizes and made-up rates, so that nothing is measured where a test does not look at it."""

from __future__ import annotations

import time

import torch

from vmf_bench.inputs import HeadShape, matched_shape
from vmf_bench.plan import MAIN, Case
from vmf_bench.roof import Rates
from vmf_bench.session import Session

CPU = torch.device("cpu")
SHAPES = (HeadShape(3, 2, 4, prototypes=301, dim=32), matched_shape(7, prototypes=301, dim=32))
DTYPES = (torch.float32, torch.bfloat16)
RATES = Rates(mm_size=32, operations=1e10, exponentials=1e8, bytes=1e10)


def session(seconds: float = 60.0, rates: Rates = RATES) -> Session:
    """A run that ends after so many seconds."""
    return Session(CPU, dict.fromkeys(DTYPES, rates), time.monotonic() + seconds)


def case(dtype: torch.dtype = torch.float32, *, compiles: bool = False) -> Case:
    """A main case of multi-crop."""
    return Case(MAIN, SHAPES[0], dtype, weight=1.0, compiles=compiles)
