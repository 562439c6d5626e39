"""The record of a case, its environment, and the differences between two runs.

A record of a tensor is its dtype, its shape and the SHA-256 of its bytes, with the number itself where there is just one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import platform
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

PROPERTIES = ("mutual_information", "largest")  # of results, computed from their fields
CANNOT_RUN = "cannot run here"  # what the library says of a backend that the machine or the installation lacks


class Case(NamedTuple):
    """Something to run whose results are recorded."""

    name: str
    covers: tuple[str, ...]  # public names, those of a drop-in after its module: "dinov2.DINOLoss"
    run: Callable[[], Any]  # tensors in mappings, sequences and dataclasses, at any depth


class Results(NamedTuple):
    """Records by case and quantity, and why the other cases were not run."""

    cases: dict[str, dict[str, str]]
    skipped: dict[str, str]


def run_cases(cases: Iterable[Case]) -> Results:
    """All cases, each from a seed of its own, so that none depends on those before it.

    A case is skipped only where the library says that the backend it asks for cannot run here.
    """
    results = Results({}, {})
    for case in cases:
        assert case.name not in results.cases, f"two cases are called {case.name}"
        torch.manual_seed(zlib.crc32(case.name.encode()))
        try:
            results.cases[case.name] = dict(records_of(case.run()))
        except RuntimeError as error:
            if CANNOT_RUN not in str(error):
                raise
            results.skipped[case.name] = str(error)
    return results


def records_of(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """(dotted name, record) of everything in ``value``."""
    if isinstance(value, np.ndarray):
        yield name, record_of(torch.tensor(value))  # copied: torch warns of arrays that are read-only
    elif isinstance(value, Tensor):
        yield name, record_of(value)
    elif isinstance(value, float):
        yield name, value.hex()
    elif value is None or isinstance(value, (bool, int, str)):
        yield name, repr(value)
    else:
        for key, part in _parts(value).items():
            yield from records_of(part, f"{name}.{key}" if name else str(key))


def record_of(tensor: Tensor) -> str:
    """Dtype, shape and SHA-256 of the bytes."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    digest = hashlib.sha256(flat.view(torch.uint8).numpy().tobytes()).hexdigest()
    shown = f" ({flat.item()!r})" if flat.numel() == 1 else ""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} {digest}{shown}"


def environment() -> dict[str, str]:
    """What bits depend on besides the code: files of different environments are not compared."""
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "triton": _version_of_triton(),
        "CPU": _cpu_model(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
    }


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """One line for each difference between two files; those of the environment alone where there are any."""
    elsewhere = [
        f"{name} is {one!r} before and {other!r} after: bits can only be compared in one environment"
        for name, one, other in _pairs(before["environment"], after["environment"])
        if one != other
    ]
    return elsewhere or list(_different_cases(before, after))


def newcomers(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """One line for each case that there could not be before, since it exercises a name that was not public."""
    return [f"{name}: new, as {', '.join(new)} is" for name, new in _new_cases(before, after).items()]


def missing_names(cases: Sequence[Case], public: Sequence[str]) -> list[str]:
    """Public names that no case exercises.

    Raises:
        ValueError: a case says that it covers a name which is not public.
    """
    covered = {name for case in cases for name in case.covers}
    unknown = sorted(covered - set(public))
    if unknown:
        raise ValueError(f"cases cover {', '.join(unknown)}, which are not public names; expected those of __all__")
    return sorted(set(public) - covered)


def _parts(value: Any) -> dict[Any, Any]:
    if isinstance(value, Mapping):
        return dict(value)
    if dataclasses.is_dataclass(value):
        parts = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return parts | {name: getattr(value, name) for name in PROPERTIES if hasattr(value, name)}
    if hasattr(value, "_asdict"):
        return dict(value._asdict())
    if isinstance(value, Sequence):
        return dict(enumerate(value))
    raise TypeError(f"a case returned a {type(value).__name__}; expected tensors, numbers, and what holds them")


def _new_cases(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, list[str]]:
    """The names that were not public before, by the cases that exercise them."""
    known = {*before["public"]}
    new = {name: [each for each in after["covers"].get(name, ()) if each not in known] for name in after["cases"]}
    return {name: names for name, names in new.items() if names}


def _different_cases(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    for name, one, other in _pairs(before["skipped"], after["skipped"]):
        if one is None or other is None:
            yield f"{name}: run {'before' if one is None else 'after'} only; on the other side: {one or other}"
    known = {*before["skipped"], *after["skipped"], *_new_cases(before, after)}
    for name, records, others in _pairs(before["cases"], after["cases"]):
        if records is None or others is None:
            if name not in known:
                yield f"{name}: the case is missing {'before' if records is None else 'after'}"
            continue
        for quantity, one, other in _pairs(records, others):
            if one != other:
                yield f"{name}: {quantity}: {one or 'missing'} -> {other or 'missing'}"


def _pairs(one: Mapping[str, Any], other: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    for name in dict.fromkeys([*one, *other]):
        yield name, one.get(name), other.get(name)


def _cpu_model() -> str:
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def _version_of_triton() -> str:
    if find_spec("triton") is None:
        return "none"
    import triton

    return str(triton.__version__)
