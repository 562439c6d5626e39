"""A fault that is put into the tree, for tests to notice."""

from __future__ import annotations

from typing import NamedTuple


class Mutation(NamedTuple):
    """A text that is in a file once, what takes its place, and the test files that have to notice."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    marker: str = "quick"  # of the tests; what is compiled, or needs ranks, is not in the quick loop


def mutated(text: str, mutation: Mutation) -> str:
    """The file's text with the fault; ValueError unless what it replaces is there once."""
    count = text.count(mutation.old)
    if count != 1:
        raise ValueError(f"{mutation.file} has {mutation.old!r} {count} times; expected once, for {mutation.name!r}")
    return text.replace(mutation.old, mutation.new)
