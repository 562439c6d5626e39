"""The variants of first light: a table of every kernel by backend, family, dtype and embedding dim.

Nothing here imports torch: the program that starts the processes need not wait for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

ELEMENTS = ("bf16", "fp16")
# rows: without values, the keys as values, values of their own; columns, and the usage alone
PASSES = ("rows-scores", "rows-keys", "rows-own", "columns", "usage")
BESIDE = ("pack", "pull-back")
MOST_TELLING_DIMS = (256, 128, 384, 64)  # what is run first, as time may end
# of a rehearsal on the CPU: Triton's interpreter is slow
TOY_DIMS, TOY_ELEMENT = {"cuda": (64, 384), "triton": (24,)}, "fp16"


class Kernels(NamedTuple):
    """One implementation of ``operator.Kernels``; where its module has no such attribute, its variants are absent."""

    module: str
    attribute: str
    backend: str  # what --kernels calls it
    families: tuple[str, ...]
    dims: tuple[int, ...]


WIDTHS = (64, 128, 192, 256, 384)
CUDA = "vmf_kernels.backends.cuda.passes"
KERNELS = {
    "cuda": Kernels(CUDA, "CUDA", "cuda", PASSES + BESIDE, WIDTHS),
    "cuda-clusters": Kernels(CUDA, "CUDA_CLUSTERS", "cuda", PASSES, WIDTHS),
    "triton": Kernels(
        "vmf_kernels.backends.triton.operator",
        "TRITON",
        "triton",
        (*PASSES, *BESIDE, "merge"),
        (24, 64, 128, 256, 384),
    ),
}


class Variant(NamedTuple):
    """One kernel."""

    kernels: str  # a name in KERNELS
    family: str
    element: str  # of the products
    dim: int  # embedding dim; a width of the CUDA kernels, whose cases have narrower dims as well

    @property
    def name(self) -> str:
        """For example "cuda/rows-own/bf16/256"."""
        return "/".join(map(str, self))


def parsed(name: str) -> Variant:
    """The variant of a name.

    Raises:
        ValueError: there is none.
    """
    for variant in variants("all"):
        if variant.name == name:
            return variant
    raise ValueError(f"no variant {name!r}; expected a name such as cuda/rows-own/bf16/256")


def variants(backend: str, only: Iterable[str] = (), *, toy: bool = False) -> list[Variant]:
    """Of "cuda", "triton" or "all"; the most telling first. ``only`` keeps those whose names hold one of the words.

    In a rehearsal (``toy``) without such words few.
    """
    found = sorted(_of(backend), key=_place)
    if only:
        return [one for one in found if any(word in one.name for word in only)]
    return [one for one in found if not toy or _is_toy(one)]


def _is_toy(variant: Variant) -> bool:
    return variant.element == TOY_ELEMENT and variant.dim in TOY_DIMS[KERNELS[variant.kernels].backend]


def _of(backend: str) -> Iterator[Variant]:
    for name, kernels in KERNELS.items():
        if backend in ("all", kernels.backend):
            for family in kernels.families:
                for element in ELEMENTS[:1] if family == "merge" else ELEMENTS:  # parts are fp32, whatever the rows are
                    yield from (Variant(name, family, element, dim) for dim in kernels.dims)


def _place(variant: Variant) -> tuple[int, ...]:
    telling = MOST_TELLING_DIMS.index(variant.dim) if variant.dim in MOST_TELLING_DIMS else len(MOST_TELLING_DIMS)
    return list(KERNELS).index(variant.kernels), telling, ELEMENTS.index(variant.element)
