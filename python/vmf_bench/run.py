"""A run from its options to its record: rates, the check, then case after case while there is time."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch

from vmf_bench.attempts import FAULTS, attempt
from vmf_bench.check import check, dtype_name, pairing_of
from vmf_bench.errors import LeftOutError
from vmf_bench.machine import free_gib, machine
from vmf_bench.measure import STEP_SHARE, fitting, measure
from vmf_bench.plan import MAIN, Case, Options, cases, reduced
from vmf_bench.roof import measured_rates
from vmf_bench.session import Session
from vmf_bench.variants import Variant

SCHEMA_VERSION = 2  # of the JSON; raised when a field changes its meaning or goes
REDUCED_WEIGHT = 1.5
# of all student rows in fp32 that the published loss has at its peak, by counting for 2 of 10 crops: logits, logits over
# temperature, 1.8 of log-probabilities and 1.8 of targets, both for every pair, and the gradient by view and joined: 7.6.
# The "extra_mib" of its row is what it took.
COPIES_OF_LOGITS = 8
SLACK = 2.0  # seconds kept for writing

Record = dict[str, Any]


def run(options: Options, variants: Mapping[str, Variant], say: Callable[[Record], None]) -> Record:
    """Everything that was found.

    Args:
        options: what to measure.
        variants: which losses.
        say: is called with the record whenever there is more in it.
    """
    start = time.monotonic()
    record: Record = {"schema_version": SCHEMA_VERSION, "machine": machine(), "device": options.device.type}
    record |= {
        "budget_seconds": options.seconds,
        "checks": check(variants, options.dtypes, options.device),
        "cases": [],
    }
    say(record)
    rates = {dtype: measured_rates(dtype, options.device) for dtype in options.dtypes}
    record["rates"] = {dtype_name(dtype): asdict(rate) for dtype, rate in rates.items()}
    session = Session(options.device, rates, start + options.seconds - SLACK)
    record["left_out"] = session.left_out
    waiting = list(cases(options))
    while waiting:
        case, *waiting = waiting
        session.waiting = waiting
        share = session.left() * case.weight / sum(other.weight for other in (case, *waiting))
        found = _measured(case, variants, session, share)
        torch.compiler.reset()  # or the next size would count as a recompilation, of which there is a limit
        if found is None:
            continue
        record["cases"].append(found)
        say(record)
        if case.part == MAIN and session.products_seconds(case) > STEP_SHARE * share:
            operations = STEP_SHARE * share * rates[case.dtype].operations
            waiting.insert(0, reduced(case, operations, REDUCED_WEIGHT))
    record["seconds"] = round(time.monotonic() - start, 1)
    return record


def _measured(case: Case, variants: Mapping[str, Variant], session: Session, share: float) -> Record | None:
    """The record of a case, or None: then ``session.left_out`` says why."""
    shape = case.shape
    name = f"{case.part}: {pairing_of(shape)} {shape.name} in {dtype_name(case.dtype)}"

    def action() -> Record:
        names = fitting(case, variants, session, share)
        if not names:
            raise LeftOutError(f"{max(session.left(), 0):.0f} s are left, which is too short")
        needed, free = stored_gib(case), free_gib(session.device)  # which fails on a GPU that a loss has lost
        if needed > free:
            raise LeftOutError(f"needs {needed:.0f} GiB of memory, and {free:.0f} GiB are free")
        return measure(case, variants, session, share, names)

    found, outcome = attempt(action)
    if found is None:
        session.left_out.append(f"{name}: {outcome['reason']}")
    return found


def stored_gib(case: Case) -> float:
    """Memory of the published loss at a size, about: logits, log-probabilities of every pair, and their gradients."""
    rows = case.shape.student_rows + case.shape.teacher_rows
    return COPIES_OF_LOGITS * rows * case.shape.prototypes * torch.float32.itemsize / 2**30


def has_fault(record: Record) -> bool:
    """Whether one of this library's losses is wrong, or failed where it should run."""
    mine = [*record["checks"], *(row for case in record["cases"] for row in case["rows"] if row["is_ours"])]
    return any(entry["status"] in FAULTS for entry in mine)
