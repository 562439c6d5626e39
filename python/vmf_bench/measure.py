"""One case: every loss is prepared, compared with the published one, and then timed in rounds together with torch.mm."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, replace
from typing import Any

import torch

from vmf_bench.agreement import Outcome, outcome_of, relative_errors
from vmf_bench.attempts import attempt
from vmf_bench.check import dtype_name, expected_outcome, pairing_of, refuse_disagreement
from vmf_bench.errors import LeftOutError
from vmf_bench.inputs import HeadInputs
from vmf_bench.machine import part
from vmf_bench.memory import peak_extra_mib
from vmf_bench.peers.peer import Compile, Loss, eager
from vmf_bench.plan import Case
from vmf_bench.roof import roof_of, square_product
from vmf_bench.session import Session
from vmf_bench.timing import Measure, Step, Stopwatch, Times, rotated, rounds_within, training_step
from vmf_bench.variants import BASELINE, Variant

MM = "torch.mm"
LEAST_ROUNDS, ENOUGH_ROUNDS, MOST_ROUNDS = 3, 9, 25
LEAST_SECONDS = 1.0  # of rounds, if these are short and the case is late
RUNS = 3 + LEAST_ROUNDS  # of each loss, at the least; before the rounds to compare it, for its memory, to warm up
WARM_UPS = {"cpu": 1, "cuda": 3}
STEP_SHARE = 0.04  # of a case's time that one step may take: it is run some seven times, and others wait
KEPT_SHARE = 0.55  # of the time that is left when a case starts, which compilations leave alone if others need it
ROUNDS_SHARE = 0.2  # of a case's time, at the least

Row = dict[str, Any]


def static(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled for the sizes at hand, as a training run has one."""
    return torch.compile(function, dynamic=False)


class Measurement:
    """A case while it is measured.

    Args:
        case: sizes and dtype.
        session: of the run.
        share: seconds that the case may take, about.
    """

    def __init__(self, case: Case, session: Session, share: float) -> None:
        self.case, self.session, self.share = case, session, share
        self.start, self.left_at_start = time.monotonic(), session.left()
        self.inputs = HeadInputs.of(case.shape, device=session.device, dtype=case.dtype)
        self.expected = expected_outcome(self.inputs)
        self.rows: dict[str, Row] = {}
        self.steps: dict[str, Step] = {}
        self.stopwatch = Stopwatch(session.device)  # before a loss may lose the device, and with it the rows
        self.mm_seconds: list[float] = []  # of the rounds
        self.mm_reason: str | None = None  # why there are none

    def add(self, name: str, variant: Variant) -> None:
        """Prepare a loss, compare it, and take its memory; its row says what came of it."""
        row: Row = {"title": variant.title, "is_ours": variant.is_ours, "on": part(self.session.device)}
        loss, outcome = attempt(lambda: self._prepared(name, variant, row))
        self.inputs.clear_gradients()
        self.session.prepared(name, outcome["status"])
        self.rows[name] = {"name": name, **row, **outcome}
        if loss is not None:
            self.steps[name] = training_step(loss, self.inputs)

    def _prepared(self, name: str, variant: Variant, row: Row) -> Loss:
        self._refuse_slow_products(variant)
        if variant.compiles and not self.case.compiles:
            raise LeftOutError("it is compiled for the main sizes only")
        self._refuse_compilation(variant)
        loss, outcome = self._first_step(name, variant, row)
        expected, entropy = self.expected
        if variant.omits_teacher_entropy:
            outcome["loss"] = outcome["loss"] + entropy
        row["relative_errors"] = relative_errors(outcome, expected)
        refuse_disagreement(row["relative_errors"], self.case.dtype)
        del outcome
        row["extra_mib"] = peak_extra_mib(training_step(loss, self.inputs), self.inputs)
        return loss

    def _first_step(self, name: str, variant: Variant, row: Row) -> tuple[Loss, Outcome]:
        """The loss, and what its first step gives; either may compile, and the session learns how long both took."""
        start, whole = time.monotonic(), False
        try:
            loss = variant.prepare(self.inputs, static if variant.compiles else eager)
            prepared = time.monotonic()
            outcome = outcome_of(loss, self.inputs)
            whole = True
        finally:
            end = time.monotonic()
            row["prepare_seconds"] = round(end - start, 2)
            if variant.compiles:
                self.session.compiled(end - start, whole=whole)
        if not variant.compiles:
            self.session.remember(name, self.case, end - prepared)  # until it is warm
        return loss, outcome

    def _refuse_slow_products(self, variant: Variant) -> None:
        """Raise LeftOutError where a processor without 16-bit products would take all the time."""
        session, dtype = self.session, self.case.dtype
        if is_slow(variant, self.case, session, self.share):
            seconds = session.products_seconds(self.case)
            rate = f"torch.mm reaches {session.rates[dtype].operations / 1e9:.2g} Gop/s in {dtype_name(dtype)} here"
            raise LeftOutError(f"{rate}, so a step would take {seconds:.2g} s or more")

    def _refuse_compilation(self, variant: Variant) -> None:
        """Raise LeftOutError where compiling would leave too little time for the sizes that wait."""
        seconds = self.session.compilation
        if variant.compiles and self.session.left() - seconds < min(
            self._needed_later(), KEPT_SHARE * self.left_at_start
        ):
            raise LeftOutError(f"compiling takes about {seconds:.0f} s and would not fit the time")

    def _needed_later(self) -> float:
        """Seconds of the rounds of this case, and of those that wait, with the losses that run here."""
        cases = [self.case, *self.session.waiting]
        return sum(RUNS * self.session.predicted(name, case) for case in cases for name in self.steps)

    def time(self) -> None:
        """Time everything that is prepared: each round runs all of it once, so that all meet the same neighbours.

        What fails is run no more, and its row says why.
        """
        steps, size = dict(self.steps), self.session.rates[self.case.dtype].mm_size
        product, outcome = attempt(lambda: square_product(size, self.case.dtype, self.session.device))
        self.mm_reason = outcome.get("reason")
        if product is not None:
            steps[MM] = product
        total = sum(self._warm_up(steps, name) for name in list(steps))
        if not steps:
            return
        left = max(self.start + self.share - time.monotonic(), ROUNDS_SHARE * self.share)
        least = min(max(int(1e3 * LEAST_SECONDS / total), LEAST_ROUNDS), ENOUGH_ROUNDS)
        rounds = rounds_within(left, total, least=least, most=MOST_ROUNDS)
        for name, milliseconds in self._rounds(steps, rounds).items():
            seconds = [value / 1e3 for value in milliseconds]
            if name == MM:
                self.mm_seconds = seconds
            else:
                self.rows[name]["seconds"] = seconds
        self.inputs.clear_gradients()

    def _warm_up(self, steps: dict[str, Step], name: str) -> float:
        """Milliseconds of a step; 0 of one that fails."""
        runs = WARM_UPS[self.session.device.type]
        milliseconds = self._run(lambda step: self.stopwatch.warm_up(step, runs), steps, name)
        if milliseconds is not None and name in self.rows:
            self.session.remember(name, self.case, milliseconds / 1e3)
        return milliseconds or 0.0

    def _rounds(self, steps: dict[str, Step], rounds: int) -> dict[str, list[float]]:
        """Milliseconds of every round, of the steps that never failed."""
        times: dict[str, list[float]] = {name: [] for name in steps}
        for turn in range(rounds):
            for name in rotated(steps, turn):
                milliseconds = self._run(self.stopwatch.device_milliseconds, steps, name)
                if milliseconds is not None:
                    times[name].append(milliseconds)
        return {name: times[name] for name in steps}

    def _run(self, measure: Measure, steps: dict[str, Step], name: str) -> float | None:
        """Milliseconds of a step; None of one that fails, which is taken off the list."""
        milliseconds, outcome = attempt(lambda: measure(steps[name]))
        if milliseconds is None:
            del steps[name]
            if name == MM:
                self.mm_reason = outcome["reason"]
            else:
                self.rows[name] |= outcome
        return milliseconds

    def record(self) -> dict[str, Any]:
        """What is written: every round's seconds, and what follows from them."""
        shape, rates = self.case.shape, self.session.rates[self.case.dtype]
        if self.mm_seconds:  # or the rate of the run's start has to do, and the footer says so
            rates = replace(rates, operations=2 * rates.mm_size**3 / statistics.median(self.mm_seconds))
        roof = roof_of(shape, self.case.dtype, self.session.device.type, rates)
        baseline = self.rows.get(BASELINE, {}).get("seconds")
        for row in self.rows.values():
            if "seconds" not in row:
                continue
            times = Times.of(row["seconds"])
            row |= {"median": times.median, "p10": times.p10, "p90": times.p90}
            row["operations_per_second"] = roof.operations / times.median
            row["share_of_mm"] = roof.parts["products"] / times.median
            row["share_of_roof"] = roof.seconds / times.median
            row["speedup"] = statistics.median(baseline) / times.median if baseline else None
        sizes = {name: getattr(shape, name) for name in ("student_rows", "teacher_rows", "prototypes", "dim")}
        what = {"part": self.case.part, "pairing": pairing_of(shape), "dtype": dtype_name(self.case.dtype), **sizes}
        product = {"mm_seconds": self.mm_seconds, "mm_reason": self.mm_reason}
        return {**what, "rates": asdict(rates), "roof": asdict(roof), **product, "rows": list(self.rows.values())}


def measure(
    case: Case, variants: Mapping[str, Variant], session: Session, share: float, fitting: Collection[str] | None = None
) -> dict[str, Any]:
    """The record of a case, measured in about ``share`` seconds.

    Args:
        case, variants, session: what to measure, and where.
        share: seconds.
        fitting: names of the losses that fit the time, compiled ones aside; all for None.
    """
    measurement = Measurement(case, session, share)
    for name, variant in variants.items():
        if variant.timed:
            fits = fitting is None or name in fitting or variant.compiles or not session.may_run(name)
            fits = fits or is_slow(variant, case, session, share)  # which says more
            measurement.add(name, variant if fits else variant._replace(prepare=_no_time))
    measurement.time()
    return measurement.record()


def _no_time(inputs: HeadInputs, compile_: Compile) -> Loss:
    raise LeftOutError("there is no time for it at this size")


def fitting(case: Case, variants: Mapping[str, Variant], session: Session, share: float) -> list[str]:
    """Names of the losses that fit the time that is left, the baseline first and then the quickest; compiled ones aside.

    None fits where the baseline does not, by which all are compared.
    """
    wanted = [name for name, variant in variants.items() if variant.timed and not variant.compiles]
    wanted = [name for name in wanted if session.may_run(name) and not is_slow(variants[name], case, session, share)]
    wanted.sort(key=lambda name: (name != BASELINE, session.predicted(name, case)))
    left = session.left() - session.predicted(
        BASELINE, replace(case, dtype=torch.float32)
    )  # what all are compared with
    found = []
    for name in wanted:
        left -= RUNS * session.predicted(name, case)
        if left < 0:
            break
        found.append(name)
    return found


def is_slow(variant: Variant, case: Case, session: Session, share: float) -> bool:
    """Whether a processor without 16-bit products would take all the time for a loss."""
    in_16_bits = variant.multiplies_16_bits and case.dtype.itemsize == 2
    return in_16_bits and session.products_seconds(case) > STEP_SHARE * share
