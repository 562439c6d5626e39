"""A plug-in of pytest: a share of the tests in a process that a lost device or a hang ends, and a journal of what it did.

    pytest -p bench.gpu.share --share 2/8 --journal tests.jsonl --stage "tests cuda" --test-seconds 20 ...

Runs every eighth test from the second on, less those in the journal: a share that is started again goes on after the test
that ended it. The journal has a line when a test starts and one when it ends. A test that is slow fails; one in which no Python
runs any more has the process ended, and so has one after which the device no longer answers: later tests would fail with it.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.gpu.hang import HANG_SECONDS

LOST = 3  # exit code where the device no longer answers
REASON_LENGTH = 1500
STDERR = os.dup(2)  # before pytest captures it: what ``faulthandler`` writes as it ends the process is for the log


class SlowTestError(Exception):
    """A test took longer than it may, and its kernels came to an end."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options named above."""
    group = parser.getgroup("share of the tests")
    group.addoption("--share", default="0/1", help="I/N: the tests whose place is I modulo N")
    group.addoption("--journal", type=Path, required=True, help="file of one JSON object a line, appended to")
    group.addoption("--stage", default="tests", help="name of the run in the journal")
    group.addoption("--test-seconds", type=float, default=60.0, help="limit of one test")
    group.addoption("--hang-seconds", type=float, default=HANG_SECONDS, help="after it, without any Python")


def entries(journal: Path, stage: str) -> Iterator[dict[str, Any]]:
    """Lines of a stage."""
    for line in journal.read_text().splitlines() if journal.exists() else ():
        entry: dict[str, Any] = json.loads(line)
        if entry["stage"] == stage:
            yield entry


def write(journal: Path, stage: str, **entry: Any) -> None:
    """Append a line in one piece: other shares write to the same file."""
    with journal.open("a") as file:
        file.write(json.dumps({"stage": stage, **entry}) + "\n")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Share(config), "share")


class Share:
    """What one process runs."""

    def __init__(self, config: pytest.Config) -> None:
        self.index, self.count = map(int, config.getoption("share").split("/"))
        self.journal, self.stage = config.getoption("journal"), config.getoption("stage")
        self.seconds, self.hang_seconds = config.getoption("test_seconds"), config.getoption("hang_seconds")
        self.reports: list[pytest.TestReport] = []

    def put(self, **entry: Any) -> None:
        """A line of this share."""
        write(self.journal, self.stage, share=self.index, **entry)

    @pytest.hookimpl(trylast=True)  # after -m has taken its choice
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Keep this share, less what the journal has."""
        mine = items[self.index :: self.count]
        done = {entry["test"] for entry in entries(self.journal, self.stage) if "test" in entry}
        self.put(selected=len(mine))
        left = [item for item in mine if item.nodeid not in done]
        config.hook.pytest_deselected(items=[item for item in items if item not in left])
        items[:] = left

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        """One test between its two lines."""
        self.put(test=item.nodeid, outcome="started")
        self.reports = []
        faulthandler.dump_traceback_later(self.seconds + self.hang_seconds, exit=True, file=STDERR)
        try:
            result = yield
        finally:
            faulthandler.cancel_dump_traceback_later()
        self.put(test=item.nodeid, **outcome_of(self.reports))
        if (reason := lost_device()) is not None:
            self.put(test=item.nodeid, outcome="lost the device", reason=reason[-REASON_LENGTH:])
            os.write(STDERR, f"{item.nodeid} lost the device: {reason}\n".encode())
            os._exit(LOST)
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, object, object]:
        """The test itself, interrupted at its limit if Python still runs."""

        def ring(_signal: int, _frame: object) -> None:
            raise SlowTestError(f"took more than {self.seconds:.0f} s")

        previous = signal.signal(signal.SIGALRM, ring)
        signal.setitimer(signal.ITIMER_REAL, self.seconds)
        try:
            return (yield)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, previous)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Collect set-up, call and tear-down of the test."""
        self.reports.append(report)


def outcome_of(reports: list[pytest.TestReport]) -> dict[str, Any]:
    """Outcome, seconds, and the end of the reason where it is not passed."""
    seconds = round(sum(report.duration for report in reports), 2)
    bad = next((report for report in reports if report.outcome != "passed"), None)
    if bad is None:
        return {"outcome": "passed", "seconds": seconds}
    return {"outcome": bad.outcome, "seconds": seconds, "reason": bad.longreprtext[-REASON_LENGTH:]}


def lost_device() -> str | None:
    """Why the GPU no longer answers this process, or None; torch is not imported for it."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        return str(error)
    return None
