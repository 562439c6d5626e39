"""Runs stages as separate processes: a crash, a hang or a lost device ends one stage, not the run.

The output of a process goes to the call's log at once, so a call that is cut off leaves it there.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.gpu.settings import ROOT, Settings

INTERRUPT_SECONDS = 8  # for a process to write what it has after SIGINT
REAP_SECONDS = 10  # for a killed process to be gone
READER_SECONDS = 2  # for the last lines of a process that has ended: one that it left behind may hold the pipe
START_SECONDS = 6.0  # of a stage's process, until it can look at the clock: it imports torch
LOOK_SECONDS = 1.0  # between two looks at what a stage has recorded
TAIL = 4000  # characters of a failed process's output that go on record
HANG_MARK = "Timeout (0:"  # of faulthandler: it ended a process in which no Python would run, ``hang``
SANITIZER_ERROR = 9  # exit code of compute-sanitizer when it found something
HOPPER = (9, 0)  # whose own instructions have a target of their own
CUDA_BIN = Path("/usr/local/cuda/bin")

Keep = Callable[[dict[str, Any]], None]


class Ended(NamedTuple):
    """How a process ended."""

    code: int | None  # None: stopped at its limit
    output: str
    answered: bool = True  # to the interrupt at its limit, as far as it got one

    @property
    def hung(self) -> bool:
        """Whether Python no longer ran in it, as under a kernel that never ends; a slow process answers."""
        return self.code != 0 and (not self.answered or HANG_MARK in self.output)

    def status(self) -> dict[str, Any]:
        """For the record: ok, failed, timed out or hung, with the end of the output where that helps."""
        if self.code == 0:
            return {"status": "ok", "exit_code": 0}
        status = "hung" if self.hung else "timed out" if self.code is None else "failed"
        return {"status": status, "exit_code": self.code, "reason": self.output[-TAIL:]}


class Running:
    """A process in a session of its own, the checkout on its path; each line goes to the log after the stage's name."""

    def __init__(self, command: list[str], title: str, log: Path, **environment: str) -> None:
        path = os.pathsep.join([str(ROOT), str(ROOT / "python"), *filter(None, [os.environ.get("PYTHONPATH")])])
        variables = os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"} | environment
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        )
        self.reader = threading.Thread(target=self._copy, args=(title, log), daemon=True)
        self.reader.start()

    def _copy(self, title: str, log: Path) -> None:
        assert self.process.stdout is not None
        with log.open("a") as file:
            for line in iter(self.process.stdout.readline, b""):
                text = line.decode(errors="replace").rstrip("\n")
                self.lines.append(text)
                file.write(f"[{title}] {text}\n")
                file.flush()

    def finish(self, seconds: float, look: Callable[[], None] = lambda: None) -> Ended:
        """Wait so long, looking now and then; then interrupt, then kill the process and what it started."""
        end, code, answered = time.monotonic() + max(seconds, 0.1), None, True
        while code is None and (left := end - time.monotonic()) > 0:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = self.process.wait(timeout=min(left, LOOK_SECONDS))
            look()
        if code is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(timeout=INTERRUPT_SECONDS)
            except subprocess.TimeoutExpired:
                answered = False
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # compile workers outlive their parent otherwise
        with contextlib.suppress(subprocess.TimeoutExpired):  # the driver may hold one whose kernel hangs
            self.process.wait(REAP_SECONDS)
        self.reader.join(READER_SECONDS)
        look()
        return Ended(code, "\n".join(self.lines), answered)


def stage_command(stage: str, settings: Settings, part: Path, seconds: float, skip: tuple[str, ...]) -> list[str]:
    """This program, for one stage."""
    command = [sys.executable, "-m", "bench.gpu", settings.call, "--stage", stage, "--part", str(part)]
    command += ["--seconds", f"{max(seconds - START_SECONDS, 1.0):.0f}", "--backend", settings.backend]
    command += ["--out", str(settings.out)]
    command += [word for name in skip for word in ("--skip", name)]
    return command + (["--dry-run"] if settings.dry else [])


def run_stage_in_child(
    stage: str, settings: Settings, seconds: float, skip: tuple[str, ...] = (), keep: Keep = lambda part: None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """How the stage's process ended, and what it had recorded; ``keep`` gets that too whenever there is more of it."""
    with tempfile.TemporaryDirectory() as folder:
        part, seen = Path(folder) / "part.json", [""]

        def look() -> None:
            text = part.read_text() if part.exists() else ""
            if text != seen[0]:
                seen[0] = text
                keep(json.loads(text))

        running = Running(stage_command(stage, settings, part, seconds, skip), stage, settings.log)
        ended = running.finish(seconds, look)
        return ended.status(), json.loads(seen[0]) if seen[0] else {}


def run_build(settings: Settings, seconds: float) -> dict[str, Any]:
    """The compiled modules of this checkout, the CUDA one for this GPU only."""
    if settings.dry:
        return {"status": "not available", "reason": "a dry run builds nothing"}
    major, minor = torch.cuda.get_device_capability()
    arch = f"{major}{minor}" + ("a" if (major, minor) == HOPPER else "")
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    path = os.pathsep.join([os.environ.get("PATH", ""), str(CUDA_BIN)])
    variables = {"VMF_CUDA_ARCHS": arch, "VMF_REQUIRE_CUDA": "1", "PATH": path}
    return Running(command, "build", settings.log, **variables).finish(seconds).status() | {"arch": arch}


def run_sanitizer(
    settings: Settings, seconds: float, title: str, backend: str, *, tool: str = "memcheck", dim: int = 64
) -> dict[str, Any]:
    """A tool of compute-sanitizer on one small loss of an embedding dim, each tensor in an allocation of its own."""
    program = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=str(CUDA_BIN))
    if program is None:
        return {"status": "not available", "reason": "compute-sanitizer is not on PATH"}
    command = [program, "--tool", tool, "--error-exitcode", str(SANITIZER_ERROR)]
    command += [sys.executable, "-m", "bench.gpu.sanitizer_case", settings.device.type, backend, str(dim)]
    ended = Running(command, title, settings.log, PYTORCH_NO_CUDA_MEMORY_CACHING="1").finish(seconds)
    return ended.status() | {"found_errors": ended.code == SANITIZER_ERROR, "output": ended.output[-TAIL:]}
