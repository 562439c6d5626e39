"""One call: the stages of a plan in order, each within its limit, and how each went; a failure ends its stage only."""

from __future__ import annotations

import json
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench.gpu.environment import clocks, environment
from bench.gpu.jobs import LEAST_SECONDS, Entry, Work, perform
from bench.gpu.plan import Stage, is_wanted, seconds_for
from bench.gpu.record import Record, attempt
from bench.gpu.settings import Settings

SCHEMA = "vmf_kernels head on a GPU, 2"
BESIDE_AT_ONCE = 4


def drive(settings: Settings, plan: tuple[Stage, ...], earlier: Path | None = None) -> Record:
    """Every stage that is wanted, as long as there is time.

    Args:
        settings: of all stages; the deadline is the call's.
        plan: ``plan.FIRST`` or another.
        earlier: ``head.json`` of a call before, which this one goes on with.
    """
    record = opened(settings, earlier)
    running: dict[str, Future[Entry]] = {}
    with ThreadPoolExecutor(BESIDE_AT_ONCE) as pool:
        for place, stage in enumerate(plan):
            if not is_wanted(stage, record.data):
                say(f"{stage.name}: left out, it needs {stage.needs}", settings)
                continue
            if stage.is_timed:
                settle(running, settings, record)
            seconds = seconds_for(place, plan, record.data, settings.seconds_left())
            work, least = Work(settings, record, stage.name, seconds), min(stage.seconds, LEAST_SECONDS)
            if stage.beside and not settings.dry:  # torch.compile in two threads is more than some versions bear
                running[stage.name] = pool.submit(timed, work, least)
            else:
                put(stage.name, settings, record, timed(work, least))
        settle(running, settings, record)
    record.put("calls", settings.call, "clocks_after", value=clocks())
    record.put("clocks_after", value=record.data["calls"][settings.call]["clocks_after"])
    return record


def opened(settings: Settings, earlier: Path | None) -> Record:
    """The record of the call, with what an earlier one found; of other sources, all of that goes under "before"."""
    record = Record(settings.out / "head.json")
    before: dict[str, Any] = json.loads(earlier.read_text()) if earlier is not None else {}
    here, now = environment(), clocks()
    if before and before["environment"].get("sources") != here["sources"]:
        before = {"before": before}
    record.data = {"stages": {}, "results": {}, "calls": {}} | before
    record.data |= {"schema": SCHEMA, "dry_run": settings.dry, "backend": settings.backend}
    record.data |= {"environment": here, "clocks_before": now}
    record.data["calls"][settings.call] = {"environment": here, "clocks_before": now}
    record.save()
    for left in (settings.log, settings.journal):
        left.unlink(missing_ok=True)
    return record


def settle(running: dict[str, Future[Entry]], settings: Settings, record: Record) -> None:
    """Wait for what runs beside."""
    while running:
        name = next(iter(running))
        put(name, settings, record, running.pop(name).result())


def timed(work: Work, least: float) -> Entry:
    """What the stage's job returns, or why it failed or, with less time than the least, was not started; how long it took."""
    if work.seconds < least:
        reason = f"{max(work.seconds, 0):.0f} s left, it is not started under {least:.0f}"
        return {"status": "skipped", "reason": reason, "seconds": 0.0}
    start = time.monotonic()
    result, outcome = attempt(lambda: perform(work))
    return outcome | (result or {}) | {"seconds": round(time.monotonic() - start, 1)}


def put(stage: str, settings: Settings, record: Record, entry: Entry) -> None:
    """Record and print how a stage went, and why where it is not ok."""
    record.put("stages", stage, value=entry)
    reason = str(entry.get("reason", "")).strip().splitlines()[-1:]
    say(f"{stage}: {entry['status']}, {entry['seconds']} s{''.join(f'; {line}' for line in reason)}", settings)


def say(line: str, settings: Settings) -> None:
    """Print a line, and put it in the log."""
    print(line, flush=True)
    with settings.log.open("a") as log:
        log.write(f"[{settings.call}] {line}\n")
