"""Every public name shows in its docstring how it is used, and what it shows is so."""

from __future__ import annotations

import doctest
import importlib
import io
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

COMPAT = Path(__file__).parents[1] / "vmf_kernels" / "compat"
MODULES = ["vmf_kernels", *sorted(f"vmf_kernels.compat.{path.stem}" for path in COMPAT.glob("[a-z]*.py"))]
# what several modules offer, as a drop-in does a class of the library, has one docstring and is looked at in the first of them
PUBLIC = list(
    {
        id(getattr(module, name)): (module, name)
        for module in map(importlib.import_module, reversed(MODULES))
        for name in reversed(getattr(module, "__all__", []))
    }.values()
)[::-1]


def fault_of_example(module: ModuleType | SimpleNamespace, name: str) -> str | None:
    """What is wrong with the example of a module's public name, or None.

    Examples find torch and the public names of their module.
    """
    known = {"torch": torch, **{public: getattr(module, public) for public in module.__all__}}
    found = doctest.DocTestFinder(recurse=False).find(getattr(module, name), name, globs=known)
    if not any(line.want for test in found for line in test.examples):
        return f"{name} has no example that shows a result; expected >>> lines at the end of its docstring"
    printed = io.StringIO()
    runner = doctest.DocTestRunner(verbose=False)
    for test in found:
        runner.run(test, out=printed.write)
    return printed.getvalue() or None


@pytest.mark.parametrize(("module", "name"), PUBLIC, ids=[f"{module.__name__}.{name}" for module, name in PUBLIC])
def test_example_runs(module: ModuleType, name: str) -> None:
    fault = fault_of_example(module, name)
    assert fault is None, fault


def good(x: int) -> int:
    """Twice as much.

    >>> good(2)
    4
    """
    return 2 * x


def silent() -> None:
    """Nothing to compare.

    >>> silent()
    """


def bare() -> None:
    """No example."""


def wrong() -> int:
    """Another value.

    >>> wrong()
    2
    """
    return 1


def failing() -> None:
    """An error.

    >>> failing(1)
    2
    """


@pytest.mark.parametrize(
    ("example", "said"),
    [
        (good, None),
        (silent, "silent has no example that shows a result"),
        (bare, "bare has no example that shows a result"),
        (wrong, "Expected:\n    2\nGot:\n    1\n"),
        (failing, "TypeError: failing() takes 0 positional arguments"),
    ],
)
def test_a_fault_of_an_example_is_found(example: object, said: str | None) -> None:
    """Negative control."""
    name = getattr(example, "__name__", "")
    fault = fault_of_example(SimpleNamespace(__all__=[name], **{name: example}), name)
    assert (said is None and fault is None) or (said is not None and said in str(fault)), f"found {fault!r}"
