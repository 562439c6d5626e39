"""The GPU tests in several processes, each with a share; one that loses the device or hangs is started again without that test.

Memory: a test's peak is the dense truth in fp64, 6.2 to 7.3 times its rows x K x 8 bytes (counted on a CPU at smaller K):
at most 6.9 GB, for 1000/1000 rows and K = 65,536. With a context of 0.6 GB eight such at once take 60 GB of a card of 80;
12 processes of first light beside them less than 1 GB each, and in the second call two that compile 0.12 of the card each.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from bench.gpu import share
from bench.gpu.hang import HANG_SECONDS
from bench.gpu.processes import TAIL, Ended, Running
from bench.gpu.settings import Settings

CUDA_TESTS = ("tests/gpu/test_cuda.py",)
MEMORY_TESTS = ("tests/gpu/test_memory.py",)  # takes up to 40 GB at once, and counts what others must not touch
OTHER_TESTS = tuple(f"tests/gpu/test_{name}.py" for name in ("accuracy", "capture", "devices", "losses", "training"))
OTHER_TESTS += ("tests/backends/test_triton_logits.py", "tests/bench/test_gpu.py")  # where some lie beside others
PATHS = {"cuda": CUDA_TESTS, "gpu": OTHER_TESTS, "memory": MEMORY_TESTS}
PROCESSES = {"cuda": 8, "gpu": 7, "memory": 1}  # "gpu" runs beside two processes that compile and one of errors
TEST_GB, CONTEXT_GB = 6.9, 0.6  # most of one test, of one process
DRY_RUN_TESTS = ("tests/test_pairing.py",)  # has none for a GPU: pytest says so in seconds
TEST_SECONDS = 25.0  # most for one test: Triton compiles an fp32 pass in 2 to 12 s
MOST_STARTS = 8  # of one share
NO_TESTS = 5  # exit code of pytest when none is selected


def run(settings: Settings, name: str, seconds: float) -> dict[str, Any]:
    """``pytest -m gpu`` on some of the files, ``name`` of ``PATHS``.

    Returns:
        a status, counts by outcome, and who failed, lost the device or hung; a test that fails is a result, not the end.
    """
    stage, end = f"tests {name}", time.monotonic() + seconds
    paths, count = (DRY_RUN_TESTS, 1) if settings.dry else (PATHS[name], PROCESSES[name])
    with ThreadPoolExecutor(count) as pool:
        jobs = [
            pool.submit(run_share, command_of(stage, settings, f"{index}/{count}", paths), settings, stage, index, end)
            for index in range(count)
        ]
        ends = [job.result() for job in jobs]
    return judged(ends, list(share.entries(settings.journal, stage)))


def command_of(stage: str, settings: Settings, part: str, paths: tuple[str, ...]) -> list[str]:
    """One share's pytest, without the options and the plug-ins of this project's other tests: they cost seconds a start."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "-rf", "-o", "addopts=", "-p", "no:cacheprovider"]
    command += ["-p", "bench.gpu.share", "--share", part, "--journal", str(settings.journal), "--stage", stage]
    command += ["--test-seconds", f"{TEST_SECONDS:.0f}", "--hang-seconds", f"{HANG_SECONDS:.0f}"]
    return [*command, "--continue-on-collection-errors", *paths]


def run_share(command: list[str], settings: Settings, stage: str, index: int, end: float) -> Ended:
    """Start a share, and start it again after a test that ended it; how the last process ended."""
    journal = settings.journal
    for _ in range(MOST_STARTS):
        running = Running(command, f"{stage} {index}", settings.log, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
        ended = running.finish(end - time.monotonic())
        mine = [entry for entry in share.entries(journal, stage) if entry["share"] == index and "test" in entry]
        if not mine or mine[-1]["outcome"] not in ("started", "lost the device"):
            break  # it came to its end, or never to a test
        if mine[-1]["outcome"] == "started":
            outcome = "hung" if ended.hung else "out of time" if ended.code is None else "ended the process"
            share.write(
                journal, stage, share=index, test=mine[-1]["test"], outcome=outcome, reason=ended.output[-TAIL:]
            )
        if ended.code is None:
            break
    return ended


def judged(ends: list[Ended], entries: list[dict[str, Any]]) -> dict[str, Any]:
    """The stage's entry, from how the shares ended and what the journal says."""
    selected = {entry["share"]: entry["selected"] for entry in entries if "selected" in entry}
    outcomes = {entry["test"]: entry["outcome"] for entry in entries if "test" in entry}  # the last word counts
    counts = Counter(outcomes.values())
    left, total = counts["started"] + counts["out of time"], sum(selected.values())
    bad = sorted(test for test, outcome in outcomes.items() if outcome not in ("passed", "skipped", "out of time"))
    result = {
        "tests": len(outcomes) - left,
        "selected": total,
        "not_run": total - len(outcomes) + left,
        "skipped": counts["skipped"],
        "failures": len(bad),
        "failed": bad,
        "hung": sorted(test for test, outcome in outcomes.items() if outcome == "hung"),
        "lost_the_device": sorted(test for test, outcome in outcomes.items() if outcome == "lost the device"),
    }
    unfinished = [ended for ended in ends if ended.code not in (0, NO_TESTS)]
    if not total and not unfinished:
        return {"status": "no tests"} | result
    if bad or any(ended.code is not None for ended in unfinished):
        reason = "\n".join(ended.output[-TAIL // len(ends) :] for ended in unfinished)
        return {"status": "failed", "reason": reason} | result
    if result["not_run"]:
        return {"status": "timed out", "reason": f"{result['not_run']} of {total} tests were not reached"} | result
    return {"status": "ok"} | result
