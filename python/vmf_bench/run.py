"""A run from its options to its record: rates, the check, then case after case while there is time."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch

from vmf_bench.attempts import FAULTS, attempt
from vmf_bench.check import check, dtype_name, pairing_of
from vmf_bench.machine import machine
from vmf_bench.measure import STEP_SHARE, least_seconds, measure
from vmf_bench.plan import MAIN, Case, Options, cases, reduced
from vmf_bench.roof import measured_rates
from vmf_bench.session import Session
from vmf_bench.variants import Variant

SCHEMA_VERSION = 1  # of the JSON; raised when a field changes its meaning or goes
REDUCED_WEIGHT = 1.5
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
    needed = least_seconds(case, variants, session, share)
    if needed > session.left():
        session.left_out.append(f"{name}: needs {needed:.0f} s, and {max(session.left(), 0):.0f} s are left")
        return None
    found, outcome = attempt(lambda: measure(case, variants, session, share))
    if found is None:
        session.left_out.append(f"{name}: {outcome['reason']}")
    return found


def has_fault(record: Record) -> bool:
    """Whether one of this library's losses is wrong, or failed where it should run."""
    mine = [*record["checks"], *(row for case in record["cases"] for row in case["rows"] if row["is_ours"])]
    return any(entry["status"] in FAULTS for entry in mine)
