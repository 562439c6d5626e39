"""Runs cases until one fails, and makes that one small."""

from __future__ import annotations

import os
import random
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch

from tests.backends.interpreted import correct_bf16
from tests.backends.quicker_interpreter import install
from tests.fuzz.cases import Case, affordable, drawn, simpler
from tests.fuzz.subjects.subject import Subject
from tests.fuzz.subjects.table import SUBJECTS

SHRINKING_S = 20.0


@dataclass
class Report:
    """What ran, and what failed: the smallest case found of each failure, and what is wrong with it."""

    ran: Counter[str] = field(default_factory=Counter)
    failures: list[tuple[Case, list[str]]] = field(default_factory=list)


def faults_of(case: Case) -> list[str]:
    """What is wrong with a case's results; an error that no case may raise is one of the faults."""
    try:
        with _interpreter(case.backend):
            return SUBJECTS[case.function].faults(case)
    except Exception as error:  # whatever it is, it is what is looked for
        at = traceback.extract_tb(error.__traceback__)[-1]
        return [f"{type(error).__name__} at {at.filename.rsplit('/', 1)[-1]}:{at.lineno}: {str(error)[:300]}"]


def _interpreter(backend: str) -> AbstractContextManager[None]:
    """Without a GPU, Triton's interpreter with bf16 as on one; it is chosen before the kernels are first imported."""
    if backend != "triton" or torch.cuda.is_available():
        return nullcontext()
    os.environ["TRITON_INTERPRET"] = "1"
    install()
    return correct_bf16()


def cases_of(subjects: dict[str, Subject], seed: int, backend: str | None = None) -> Iterator[Case]:
    """Cases without end, in the same order for the same seed: the subjects in turn."""
    pick = random.Random(seed)
    while True:
        for name, subject in subjects.items():
            named = pick.choice(subject.backends) if backend is None else backend
            yield affordable(drawn(name, named, dict(subject.choices), pick))


def run(
    cases: Iterator[Case],
    *,
    count: int,
    seconds: float,
    most_failures: int = 1,
    tell: Callable[[str], None] = lambda line: None,
) -> Report:
    """Run at most so many cases for at most so long; stop at ``most_failures`` different ones."""
    report, end = Report(), time.monotonic() + seconds
    while sum(report.ran.values()) < count and time.monotonic() < end and len(report.failures) < most_failures:
        case = next(cases)
        report.ran[case.function] += 1
        if found := faults_of(case):
            tell(f"fails: {case}\n  " + "\n  ".join(found))
            report.failures.append(smallest(case, found))
    return report


def smallest(case: Case, found: list[str], seconds: float = SHRINKING_S) -> tuple[Case, list[str]]:
    """The case with as many fields at simpler choices as still leave it with the same kind of fault."""
    choices, end, kind = dict(SUBJECTS[case.function].choices), time.monotonic() + seconds, kind_of(found)
    smaller = True
    while smaller and time.monotonic() < end:
        smaller = False
        for other in simpler(case, choices):
            if time.monotonic() < end and kind_of(again := faults_of(other)) & kind:
                case, found, smaller = other, again, True
                break
    return case, found


def kind_of(found: list[str]) -> set[str]:
    """Of each fault the words before its numbers: what a smaller case must share with a larger one."""
    return {fault.partition(" error ")[0].partition(" is ")[0].partition(": ")[0] for fault in found}
