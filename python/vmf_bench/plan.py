"""Which sizes are measured, in the order in which they matter if time is short.

Legend: K prototypes, D embedding dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from vmf_bench.errors import BenchError
from vmf_bench.inputs import HeadShape, matched_shape
from vmf_bench.roof import operations_of

CROPS = 10
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DEFAULT_ROWS = {"cpu": 160, "cuda": 640}
DEFAULT_PROTOTYPES = {"cpu": 16_384, "cuda": 65_536}
DEFAULT_DIM = 256
QUICK_ROWS, QUICK_PROTOTYPES = 40, 2048
LEAST_PROTOTYPES, LEAST_DIM = 16, 16  # Triton's products are at least as wide
REDUCED_PROTOTYPES = 128  # at the least
FACTORS = (1 / 4, 4, 1 / 2, 2)  # of rows and of K in the scaling curves, the ends first
MAIN, REDUCED, ROWS, PROTOTYPES = "main", "reduced", "rows", "prototypes"  # parts
BUDGET_SECONDS, QUICK_SECONDS = 145.0, 40.0


@dataclass(frozen=True)
class Case:
    """One size in one dtype."""

    part: str
    shape: HeadShape
    dtype: torch.dtype
    weight: float  # its part of the time that is left, relative to the cases after it
    compiles: bool = False  # whether losses that torch.compile has to compile take part


@dataclass(frozen=True)
class Options:
    """What was asked for; sizes are those of the main case."""

    device: torch.device
    rows: int
    prototypes: int
    dim: int
    dtypes: tuple[torch.dtype, ...]
    seconds: float  # for everything

    @classmethod
    def of(
        cls,
        *,
        rows: int | None = None,
        prototypes: int | None = None,
        dim: int | None = None,
        dtype: str | None = None,
        quick: bool = False,
        device: torch.device | None = None,
    ) -> Options:
        """Checked, with what was not asked for filled in for the device: a GPU where torch sees one.

        Raises:
            BenchError: a size is too small or no multiple of what it has to be.
        """
        chosen = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        kind = chosen.type
        names = (
            [dtype] if dtype else sorted(DTYPES, reverse=kind != "cuda")
        )  # bf16 first on GPUs, where training uses it
        options = cls(
            chosen,
            rows if rows is not None else QUICK_ROWS if quick else DEFAULT_ROWS[kind],
            prototypes if prototypes is not None else QUICK_PROTOTYPES if quick else DEFAULT_PROTOTYPES[kind],
            dim if dim is not None else DEFAULT_DIM,
            tuple(DTYPES[name] for name in names),
            QUICK_SECONDS if quick else BUDGET_SECONDS,
        )
        options.check()
        return options

    def check(self) -> None:
        """Raise BenchError unless the sizes make sense."""
        if self.rows < CROPS or self.rows % CROPS:
            raise BenchError(f"--rows got {self.rows}; expected a positive multiple of {CROPS}, the crops of an image.")
        if self.prototypes < LEAST_PROTOTYPES:
            raise BenchError(f"--prototypes got {self.prototypes}; expected {LEAST_PROTOTYPES} or more.")
        if self.dim < LEAST_DIM or self.dim % 8:
            raise BenchError(f"--dim got {self.dim}; expected a multiple of 8 from {LEAST_DIM} up.")


def cases(options: Options) -> Iterator[Case]:
    """Both pairings in every dtype, then multi-crop in the first dtype with other numbers of rows and of prototypes."""
    sizes = {"prototypes": options.prototypes, "dim": options.dim}
    crops, patches = (
        HeadShape(options.rows // CROPS, student_views=CROPS, **sizes),
        matched_shape(options.rows, **sizes),
    )
    first, *others = options.dtypes
    yield Case(MAIN, crops, first, 6.0, compiles=True)
    yield Case(MAIN, patches, first, 3.0, compiles=True)
    for dtype in others:
        yield Case(MAIN, crops, dtype, 2.0, compiles=options.device.type == "cuda")
        yield Case(MAIN, patches, dtype, 1.5, compiles=options.device.type == "cuda")
    for factor in FACTORS:
        weight = 1.0 if factor > 1 else 0.5
        if crops.images * factor >= 1:
            yield Case(ROWS, replace(crops, images=int(crops.images * factor)), first, weight)
        if crops.prototypes * factor >= LEAST_PROTOTYPES:
            yield Case(PROTOTYPES, replace(crops, prototypes=int(crops.prototypes * factor)), first, weight)


def reduced(case: Case, operations: float, weight: float) -> Case:
    """The case with K halved until a step's products take no more than so many operations."""
    shape = case.shape
    while operations_of(shape) > operations and shape.prototypes >= 2 * REDUCED_PROTOTYPES:
        shape = replace(shape, prototypes=shape.prototypes // 2)
    return replace(case, part=REDUCED, shape=shape, weight=weight, compiles=False)
