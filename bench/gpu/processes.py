"""Stages as processes of their own: a crash, a hang or a lost device ends one of them, not the run."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import torch

from bench.gpu.settings import ROOT, Settings

INTERRUPT_SECONDS = 8  # for a process to write what it has after SIGINT
TAIL = 4000  # characters of a failed process's output that go on record
NO_TESTS = 5  # exit code of pytest when none is selected
SANITIZER_ERROR = 9  # exit code of compute-sanitizer when it found something
HOPPER = (9, 0)  # whose own instructions have a target of their own
CUDA_BIN = Path("/usr/local/cuda/bin")


class Ended(NamedTuple):
    """How a process ended."""

    code: int | None  # None: stopped at its limit
    output: str

    def status(self) -> dict[str, Any]:
        """For the record: ok, failed or timed out, with the end of the output where that helps."""
        if self.code == 0:
            return {"status": "ok", "exit_code": 0}
        status = "timed out" if self.code is None else "failed"
        return {"status": status, "exit_code": self.code, "reason": self.output[-TAIL:]}


def start(command: list[str], log: Path, **environment: str) -> subprocess.Popen[bytes]:
    """A process in a session of its own, output into a file, the checkout on its path."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "python")])
    variables = os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"} | environment
    with log.open("wb") as file:
        return subprocess.Popen(
            command, cwd=ROOT, env=variables, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )


def finish(process: subprocess.Popen[bytes], log: Path, seconds: float) -> Ended:
    """Wait so long; then interrupt, then kill the process and what it started."""
    code: int | None
    try:
        code = process.wait(timeout=max(seconds, 0.1))
    except subprocess.TimeoutExpired:
        code = None
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=INTERRUPT_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # compile workers outlive their parent otherwise
    process.wait()
    return Ended(code, log.read_text(errors="replace"))


@contextlib.contextmanager
def log_file(settings: Settings, title: str) -> Iterator[Path]:
    """A file for one process's output, appended to the run's log when it has ended."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "log"
        path.touch()
        try:
            yield path
        finally:
            with (settings.out / "log.txt").open("a") as whole:
                whole.write(f"===== {title}\n{path.read_text(errors='replace')}\n")


def stage_command(stage: str, settings: Settings, part: Path, seconds: float, skip: tuple[str, ...]) -> list[str]:
    """This program, for one stage."""
    command = [sys.executable, "-m", "bench.gpu", "--stage", stage, "--part", str(part), "--seconds", f"{seconds:.0f}"]
    command += ["--backend", settings.backend, "--out", str(settings.out)]
    command += [word for name in skip for word in ("--skip", name)]
    return command + (["--dry-run"] if settings.dry else [])


def run_stage_in_child(
    stage: str, settings: Settings, seconds: float, skip: tuple[str, ...] = ()
) -> tuple[dict[str, Any], dict[str, Any]]:
    """How the stage's process ended, and what it had recorded until then."""
    with log_file(settings, stage) as log:
        part = log.with_name("part.json")
        command = stage_command(stage, settings, part, seconds, skip)
        ended = finish(start(command, log), log, seconds)
        return ended.status(), json.loads(part.read_text()) if part.exists() else {}


def run_build(settings: Settings, seconds: float) -> dict[str, Any]:
    """The compiled modules of this checkout, the CUDA one for this GPU only."""
    if settings.dry:
        return {"status": "not available", "reason": "a dry run builds nothing"}
    major, minor = torch.cuda.get_device_capability()
    arch = f"{major}{minor}" + ("a" if (major, minor) == HOPPER else "")
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    with log_file(settings, "build") as log:
        ended = finish(start(command, log, VMF_CUDA_ARCHS=arch, VMF_REQUIRE_CUDA="1"), log, seconds)
    return ended.status() | {"arch": arch}


def run_tests(settings: Settings, seconds: float, name: str, *paths: str) -> dict[str, Any]:
    """``pytest -m gpu`` on the paths: exit code and counts; a test that fails is a result, not the end."""
    report = settings.out / f"{name.replace(' ', '-')}.xml"
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "-p", "no:cacheprovider"]
    command += [f"--junitxml={report}", "--continue-on-collection-errors", *paths]
    if importlib.util.find_spec("pytest_benchmark") is None:
        command += ["-o", "addopts=-ra --strict-markers"]  # the configured options name that plugin's
    if importlib.util.find_spec("jsonargparse") is None:
        command.append("--ignore=tests/pretrain")  # a machine to measure on need not have what the trainer needs
    report.unlink(missing_ok=True)
    with log_file(settings, name) as log:
        ended = finish(start(command, log), log, seconds)
    status = ended.status() | ({"status": "no tests"} if ended.code == NO_TESTS else {})
    result = status | {"last_line": (ended.output.strip().splitlines() or [""])[-1]}
    return result | (junit_counts(report) if report.exists() else {})


def junit_counts(report: Path) -> dict[str, Any]:
    """Numbers of tests, failures, errors and skips, and who failed."""
    root = ElementTree.parse(report).getroot()
    suites = list(root.iter("testsuite"))
    counts = {
        key: sum(int(suite.get(key, 0)) for suite in suites) for key in ("tests", "failures", "errors", "skipped")
    }
    failed = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in root.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    return {**counts, "failed": failed}


def run_sanitizer(settings: Settings, seconds: float, backend: str) -> dict[str, Any]:
    """compute-sanitizer's memcheck on one small loss, each tensor in an allocation of its own."""
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=str(CUDA_BIN))
    if tool is None:
        return {"status": "not available", "reason": "compute-sanitizer is not on PATH"}
    command = [tool, "--tool", "memcheck", "--error-exitcode", str(SANITIZER_ERROR)]
    command += [sys.executable, "-m", "bench.gpu.sanitizer_case", settings.device.type, backend]
    with log_file(settings, f"sanitizer {backend}") as log:
        ended = finish(start(command, log, PYTORCH_NO_CUDA_MEMORY_CACHING="1"), log, seconds)
    return ended.status() | {"found_errors": ended.code == SANITIZER_ERROR, "output": ended.output[-TAIL:]}
