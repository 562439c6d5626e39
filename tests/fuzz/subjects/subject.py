"""What a function under test is to the command and the tests."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tests.fuzz.cases import CHOICES, Case


@dataclass(frozen=True)
class Subject:
    """A function and how its cases are judged.

    Attributes:
        faults: what is wrong with a case's results, a sentence each; empty if nothing is.
        choices: of each field that the function uses, the simplest first.
        backends: names to draw from; "" where there is none.
    """

    faults: Callable[[Case], list[str]]
    choices: Mapping[str, Sequence[Any]]
    backends: Sequence[str] = ("",)


def choices_of(*names: str, **others: Sequence[Any]) -> dict[str, Sequence[Any]]:
    """The choices of these fields of ``CHOICES``, and others of their own."""
    return {name: CHOICES[name] for name in names} | others
