"""What a case is: one call, described by words and numbers, so that a line of text makes it again.

Every field has its choices, the simplest first. The command draws from them at random, the tests through hypothesis; both make
a failing case smaller by going back to simpler choices.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

MOST_PRODUCTS = 1 << 20  # rows x prototypes x dim of a case: some ms for each of the computations that are compared
SEEDS = 1 << 16


@dataclass(frozen=True)
class Case:
    """One call. Each function uses some of the fields; the others keep their defaults, the simplest choices.

    ``inputs.py`` says what the words mean.
    """

    function: str
    backend: str = ""
    seed: int = 0  # of the random numbers
    images: int = 1
    teacher_views: int = 1
    student_views: int = 1
    prototypes: int = 2
    dim: int = 2
    teacher_dim: int = 0  # 0 is the student's
    kind: str = "linear"
    dtype: str = "fp32"  # of rows or logits
    stored: str = "same"  # dtype of the prototypes; "same" is that of the rows
    student_temperature: float = 1.0
    teacher_temperature: float = 1.0
    rows: str = "unit"
    norms: str = "unit"
    bias: str = "none"
    pairs: str = "uniform"
    weights: str = "none"
    layout: str = "contiguous"
    upstream: float = 1.0  # the loss's incoming gradient
    learns: str = "all"  # what requires a gradient
    again: str = "no"  # whether the bits of a second call are compared
    option: str = ""  # of the function: a metric, a centring rule
    steps: int = 1
    topk: int = 1

    def __str__(self) -> str:
        """``function=...,field=value``: the fields that differ from their defaults."""
        given = (f for f in fields(self) if f.name == "function" or getattr(self, f.name) != f.default)
        return ",".join(f"{f.name}={getattr(self, f.name)}" for f in given)

    @classmethod
    def parse(cls, text: str) -> Case:
        """The case of a line that ``str`` gave.

        Raises:
            ValueError: a field is unknown or its value of another type.
        """
        types = {f.name: f.type for f in fields(cls)}
        values: dict[str, Any] = {}
        for part in text.split(","):
            name, _, value = part.partition("=")
            if name not in types:
                raise ValueError(f"case has a field {name!r}; expected one of {', '.join(types)}")
            values[name] = {"int": int, "float": float, "str": str}[str(types[name])](value)
        return cls(**values)

    @property
    def products(self) -> int:
        """Rows x prototypes x dim of the larger network."""
        return (
            self.images
            * max(self.teacher_views, self.student_views)
            * self.prototypes
            * max(self.dim, self.teacher_dim)
        )


CHOICES: dict[str, Sequence[Any]] = {
    "images": (1, 2, 3, 0, 5, 16, 33),
    "teacher_views": (1, 2, 3, 9),
    "student_views": (1, 2, 3, 10),
    "prototypes": (2, 1, 3, 7, 16, 17, 33, 64, 65, 127, 129, 300, 1000, 2049, 4099),
    "dim": (2, 3, 5, 8, 16, 17, 31, 64, 100, 256, 512),
    "teacher_dim": (0, 0, 0, 2, 13, 64),
    "kind": ("linear", "normalized", "weight_norm", "linear_vmf", "weight_norm_vmf"),
    "dtype": ("fp32", "fp64", "bf16", "fp16"),
    "stored": ("same", "same", "fp32", "fp64", "bf16", "fp16"),
    "student_temperature": (1.0, 0.1, 0.04, 0.01, 1e-4, 30.0, 1e6),
    "teacher_temperature": (1.0, 0.04, 0.07, 0.01, 1e-4, 30.0, 1e6),
    "rows": (
        "unit", "unit", "unit", "free", "zero", "some_zero", "tiny", "huge", "identical", "at_prototypes", "spike", "denormal",
        "nan", "inf", "-inf",
    ),
    "norms": (
        "unit", "unit", "free", "free", "some_zero", "zero", "tiny", "huge", "spread", "duplicates", "denormal", "spike", "nan",
        "inf",
    ),
    "bias": ("none", "none", "normal", "normal", "huge", "one", "-inf", "nan"),
    "pairs": ("uniform", "uniform", "ones", "different", "one_hot", "zero", "some_zero", "tiny", "large"),
    "weights": ("none", "uniform", "some_zero", "zero"),
    "layout": ("contiguous", "contiguous", "transposed", "sliced", "offset", "expanded", "negated"),
    "upstream": (1.0, 2.5, -1.0, 65536.0, 0.0),
    "learns": ("all", "all", "all", "rows", "prototypes", "nothing"),
    "again": ("no", "no", "no", "repeat", "threads"),
}  # fmt: skip


def simplest(name: str) -> Any:
    """The default of a field."""
    return next(f.default for f in fields(Case) if f.name == name)


def affordable(case: Case, most: int = MOST_PRODUCTS) -> Case:
    """The case, with its largest sizes made smaller, choice by choice, until it is cheap enough."""
    while case.products > most:
        sizes = {
            name: sorted(CHOICES[name]) for name in ("images", "student_views", "teacher_views", "prototypes", "dim")
        }
        smaller = {n: [c for c in choices if c < getattr(case, n)] for n, choices in sizes.items()}
        name = max((n for n in smaller if smaller[n]), key=lambda n: getattr(case, n))
        case = replace(case, **{name: smaller[name][-1]})
        if case.teacher_dim > case.dim:
            case = replace(case, teacher_dim=0)
    return case


def drawn(function: str, backend: str, choices: dict[str, Sequence[Any]], pick: random.Random) -> Case:
    """A case whose fields are picked from the choices; half of the fields, by chance, keep the simplest.

    With every field at random, nearly every case would have something that is not finite, which hides all else.
    """
    plain = pick.random()
    chosen = {name: pick.choice(values) for name, values in choices.items() if pick.random() > plain or name in ALWAYS}
    return Case(function, backend, pick.randrange(SEEDS), **chosen)


ALWAYS = ("prototypes", "dim", "kind", "dtype", "student_views", "teacher_views", "images", "option")


def simpler(case: Case, choices: dict[str, Sequence[Any]]) -> Iterator[Case]:
    """The case with one field after the other at each of its simpler choices, the simplest first."""
    for name, values in choices.items():
        now = getattr(case, name)
        order = list(dict.fromkeys([*([simplest(name)] if simplest(name) != "" else []), *values]))
        for value in order[: order.index(now)] if now in order else order:
            yield replace(case, **{name: value})
    if case.seed:
        yield replace(case, seed=0)
