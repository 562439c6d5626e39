"""Processes that try variants. One that hangs or dies is ended, reported, and replaced.

Each process tries one variant after the other, as starting one takes longer than a variant does. It is only trusted as long as
all it gave was right: after anything else a new one takes its place, and a variant that came out wrong in a process that had
tried others before is tried again in a new one. So nothing is spoiled by what ran before it.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

# Seconds that a state may last. Counted from the launch, compiling does not make a kernel look hung, nor does a busy machine.
LIMITS = {"starting": 120.0, "ready": 30.0, "preparing": 90.0, "compiling": 90.0, "launched": 10.0, "returned": 90.0}
TAIL = 1500  # characters of a dead process's messages that go on record
FAILED_STARTS = 3  # after which, if none has started, no other process is
REAP_SECONDS = 10.0  # for a killed process to be gone: the driver may hold one whose kernel hangs

TRUSTED = ("right", "absent", "unavailable")  # after which a process goes on
REPEATED = ("wrong", "failed", "died")  # what may be another variant's doing

Result = dict[str, Any]
Report = Callable[[str, Result], None]


class Orders(NamedTuple):
    """How processes are started, and how long each state may last."""

    command: list[str]
    environment: Mapping[str, str]
    folder: Path  # of their messages
    limits: Mapping[str, float] = LIMITS


class Child:
    """One process."""

    def __init__(self, orders: Orders, number: int) -> None:
        self.log = orders.folder / f"{number}.log"
        with self.log.open("wb") as messages:
            self.process = subprocess.Popen(
                orders.command,
                env=dict(orders.environment),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=messages,
                text=True,
                start_new_session=True,
            )
        self.limits, self.tried = orders.limits, 0
        self.state, self.case, self.since = "starting", "", time.monotonic()
        self.said = queue.Queue[str | None]()  # None: it has closed its end
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said.put(line)
        self.said.put(None)

    def attempt(self, name: str, deadline: float) -> Result:
        """The result of one variant: what the process says, or that it hung, died, or was not reached in time."""
        self.tried += 1
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it is dead: which shows at once
            self.process.stdin.write(f"{name}\n")
            self.process.stdin.flush()
        while True:
            limit = self.since + self.limits[self.state]
            try:
                line = self.said.get(timeout=max(min(limit, deadline) - time.monotonic(), 0.01))
            except queue.Empty:
                if time.monotonic() >= deadline:
                    return {"status": "not reached", "reason": f"no time left, {self._where()}"}
                if time.monotonic() >= limit:
                    return {"status": "hung" if self.state == "launched" else "slow", "reason": self._where()}
                continue
            if line is None and self.state == "starting":  # no variant's doing
                self._code()
                reason = f"the process does not start: {''.join(self._last_words().splitlines()[-1:])}"
                return {"status": "unavailable", "reason": reason}
            if line is None:
                return {"status": "died", "reason": f"{self._where()}; exit code {self._code()}: {self._last_words()}"}
            said = json.loads(line)
            self.state, self.case, self.since = said["state"], said.get("case", ""), time.monotonic()
            if self.state == "done":
                self.state = "ready"
                result: Result = said["result"]
                return result

    def end(self) -> None:
        """Kill it and all that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(REAP_SECONDS)

    def _where(self) -> str:
        lasted = time.monotonic() - self.since
        return f"{self.state} {f'({self.case}) ' if self.case else ''}for {lasted:.1f} s"

    def _code(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.process.wait(REAP_SECONDS)
        return None

    def _last_words(self) -> str:
        return self.log.read_text(errors="replace").strip()[-TAIL:]


class Crew:
    """A number of processes that share the variants."""

    def __init__(self, orders: Orders, workers: int, deadline: float) -> None:
        self.orders, self.workers, self.deadline = orders, workers, deadline
        self._lock, self._started, self._children = threading.Lock(), 0, set[Child]()
        self._failed_starts, self._has_started = 0, False

    def run(self, names: list[str], report: Report) -> None:
        """Try all, in their order; ``report`` gets each result, one at a time."""
        waiting = queue.Queue[str]()
        for name in names:
            waiting.put(name)
        threads = [
            threading.Thread(target=self._work, args=(waiting, report)) for _ in range(min(self.workers, len(names)))
        ]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            self.end()
            for thread in threads:  # where this was interrupted: they report what was not reached
                if thread.ident is not None:
                    thread.join()

    def end(self) -> None:
        """Kill every process that is left, and start no other."""
        self.deadline = min(self.deadline, time.monotonic())
        for child in list(self._children):
            child.end()

    def _work(self, waiting: queue.Queue[str], report: Report) -> None:
        child: Child | None = None
        while True:
            try:
                name = waiting.get_nowait()
            except queue.Empty:
                break
            if time.monotonic() >= self.deadline:
                self._put(report, name, {"status": "not reached", "reason": "no time left"})
                continue
            if self._failed_starts >= FAILED_STARTS and not self._has_started:
                self._put(report, name, {"status": "unavailable", "reason": "no process starts"})
                continue
            child = child or self._start()
            result, child = self._attempt(child, name)
            self._put(report, name, result)
        if child is not None:
            self._end(child)

    def _attempt(self, child: Child, name: str) -> tuple[Result, Child | None]:
        """The result, and the process if it is still to be trusted; what may be another variant's doing is tried again."""
        result, had_others = child.attempt(name, self.deadline), child.tried > 1
        self._has_started |= child.state != "starting"
        self._failed_starts += child.state == "starting"
        if result["status"] in TRUSTED and child.process.poll() is None:
            return result, child
        self._end(child)
        if time.monotonic() >= self.deadline:  # and it may have been killed for that
            return result | ({"status": "not reached"} if result["status"] == "died" else {}), None
        if not had_others or result["status"] not in REPEATED:
            return result, None
        alone, kept = self._attempt(self._start(), name)
        if alone["status"] == "not reached":
            return result, None
        before = {key: result[key] for key in ("status", "reason") if key in result}
        return alone | {"after_others": before}, kept

    def _put(self, report: Report, name: str, result: Result) -> None:
        with self._lock:
            report(name, result)

    def _start(self) -> Child:
        with self._lock:
            self._started += 1
            number = self._started
        child = Child(self.orders, number)
        self._children.add(child)
        return child

    def _end(self, child: Child) -> None:
        child.end()
        self._children.discard(child)
