"""The benchmark of a GPU, one JSON: build, tests, sanitizer, ceilings, errors, passes, the head's loss against its baselines.

    bash bench/run_gpu.sh [OUT_DIR]
    python -m bench.gpu --dry-run --out OUT_DIR     every stage at toy sizes on the CPU, in seconds; measures nothing
    python -m bench.report OUT_DIR/head.json

Each stage is a process with a limit (in a dry run a call); ``head.json`` is rewritten whenever something becomes known.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench.gpu import ceilings, counters, errors, head, passes, processes
from bench.gpu.environment import clocks, environment, slug
from bench.gpu.losses import BESIDE
from bench.gpu.record import Record, attempt
from bench.gpu.settings import ROOT, Settings
from bench.gpu.tables import gpu_table, short_table

Job = Callable[[], dict[str, Any]]

SCHEMA = "vmf_kernels head on a GPU, 1"
TOTAL_SECONDS = 510.0
LIMITS = {"build": 120.0, "tests": 180.0, "tests cuda": 120.0, "sanitizer": 120.0, "compile": 150.0}
LIMITS |= {"errors": 60.0, "ceilings": 30.0, "passes": 45.0, "counters": 60.0}
COUNTERS_AFTER = 3  # stages: before the less wanted workloads
CUDA_TESTS = "tests/gpu/test_cuda.py"  # in a process of their own: new kernels may hang, or take the device with them
HEAD_LIMIT = 80.0
LEAST_HEAD_SECONDS = 30.0
MORE_THAN_A_SHARE = 2.0
LEAST_SECONDS = 12.0  # below which no stage is started: importing torch takes a good part of it
COMPILERS = 3  # processes that compile baselines while the tests run
DRY_RUN_TESTS = "tests/test_once.py"  # has none for a GPU: pytest says so in a second


def run_stage(stage: str, settings: Settings, record: Record, skip: tuple[str, ...] = ()) -> None:
    """One stage, in this process; names as in ``stages``, and "compile I" for every third workload from the I-th."""
    kind, _, index = stage.partition(" ")
    if kind == "ceilings":
        ceilings.run(settings, record)
    elif kind == "errors":
        errors.run(settings, record)
    elif kind == "passes":
        passes.run(settings, record, skip)
    elif kind == "compile":
        head.compile_all(settings, record, settings.shapes[int(index) :: COMPILERS])
    elif kind == "head":
        head.run(settings, record, settings.shapes[int(index)], skip)
    else:
        raise ValueError(f"unknown stage {stage!r}; expected ceilings, errors, passes, compile I or head I")


def stages(settings: Settings) -> list[str]:
    """Stages that are timed, and so have the device to themselves, in order."""
    found = ["ceilings", "passes", *(f"head {i}" for i in range(len(settings.shapes)))]
    return [*found[: COUNTERS_AFTER + 1], "counters", *found[COUNTERS_AFTER + 1 :]]


def drive(settings: Settings) -> Record:
    """Every stage, as long as there is time; what is not timed runs side by side with the tests."""
    record = Record(settings.out / "head.json")
    (settings.out / "log.txt").unlink(missing_ok=True)
    record.data |= {"schema": SCHEMA, "dry_run": settings.dry, "backend": settings.backend}
    record.data |= {"environment": environment(), "clocks_before": clocks(), "stages": {}, "results": {}}
    record.save()
    drive_untimed(settings, record)
    wanted, skip = stages(settings), distrusted(settings, record.data["stages"])
    for index, stage in enumerate(wanted):
        limit = limit_of(stage, len(wanted) - index, settings.seconds_left())
        conduct(stage, record, timed_job(stage, settings, limit, record, skip))
    record.put("clocks_after", value=clocks())
    return record


def drive_untimed(settings: Settings, record: Record) -> None:
    """The build, and then what need not have the device to itself, side by side."""
    limits = {name: min(seconds, settings.seconds_left()) for name, seconds in LIMITS.items()}
    before, after = side_jobs(settings, limits), jobs_of_the_build(settings, limits)
    names = [*before, *after]
    with ThreadPoolExecutor(len(names)) as pool:
        # a dry run calls instead of starting processes, and torch.compile in two threads is more than some versions bear
        running = {} if settings.dry else {name: pool.submit(timed, job) for name, job in before.items()}
        conduct("build", record, lambda: processes.run_build(settings, limits["build"]))
        running |= {} if settings.dry else {name: pool.submit(timed, job) for name, job in after.items()}
        selected = [DRY_RUN_TESTS] if settings.dry else [f"--ignore={CUDA_TESTS}"]
        conduct("tests", record, lambda: processes.run_tests(settings, limits["tests"], "tests", *selected))
        errors_limit = min(limits["errors"], settings.seconds_left())
        conduct("errors", record, lambda: run_and_merge("errors", settings, errors_limit, record))
        for name, job in (before | after).items():
            put(name, record, running[name].result() if running else timed(job))


def timed_job(stage: str, settings: Settings, seconds: float, record: Record, skip: tuple[str, ...]) -> Job:
    """What a timed stage does."""
    if stage == "counters":
        return lambda: counters.run(settings, seconds, skip)
    return lambda: run_and_merge(stage, settings, seconds, record, skip)


def distrusted(settings: Settings, done: dict[str, Any]) -> tuple[str, ...]:
    """The backend beside the one asked for, where its tests did not come to an end: its kernels may hang."""
    other = BESIDE.get(settings.backend)
    hung = other is not None and done.get(f"tests {other}", {}).get("status") == "timed out"
    return (other,) if hung and other is not None else ()


def jobs_of_the_build(settings: Settings, limits: dict[str, float]) -> dict[str, Job]:
    """Tests of the compiled kernels, and what the sanitizer says of them; none where nothing is built."""
    if settings.dry:
        return {}
    return {
        "tests cuda": lambda: processes.run_tests(settings, limits["tests cuda"], "tests cuda", CUDA_TESTS),
        "sanitizer cuda": lambda: processes.run_sanitizer(settings, limits["sanitizer"], "cuda"),
    }


def side_jobs(settings: Settings, limits: dict[str, float]) -> dict[str, Job]:
    """The sanitizer, and baselines compiled into torch's cache on disk, where the head stages find them."""
    run = run_stage_here if settings.dry else processes.run_stage_in_child
    jobs: dict[str, Job] = {
        "sanitizer": lambda: processes.run_sanitizer(settings, limits["sanitizer"], settings.backend)
    }
    for index in range(1 if settings.dry else COMPILERS):
        name = f"compile {index}"
        jobs[name] = lambda name=name: run(name, settings, limits["compile"])[0]  # type: ignore[misc]
    return jobs


def limit_of(stage: str, stages_left: int, seconds_left: float) -> float:
    """Seconds a stage may take: its own limit, or more than its share of what is left, as most need less."""
    share = max(MORE_THAN_A_SHARE * seconds_left / stages_left, LEAST_HEAD_SECONDS)
    return min(LIMITS.get(stage, min(share, HEAD_LIMIT)), seconds_left)


def conduct(stage: str, record: Record, job: Job) -> None:
    """Run a stage, which returns its status, and put on record how it went."""
    put(stage, record, timed(job))


def timed(job: Job) -> dict[str, Any]:
    """What the job returns, or why it failed, and how long it took."""
    start = time.monotonic()
    result, outcome = attempt(job)
    return outcome | (result or {}) | {"seconds": round(time.monotonic() - start, 1)}


def put(stage: str, record: Record, entry: dict[str, Any]) -> None:
    """Record and print how a stage went."""
    record.put("stages", stage, value=entry)
    print(f"{stage}: {entry['status']}, {entry['seconds']} s", flush=True)


def run_and_merge(
    stage: str, settings: Settings, seconds: float, record: Record, skip: tuple[str, ...] = ()
) -> dict[str, Any]:
    """A stage's status; its results go under its name. Where a variant loses the device or hangs, again without it."""
    if seconds < LEAST_SECONDS and not settings.dry:
        return {"status": "skipped", "reason": f"{max(seconds, 0):.0f} s left"}
    run = run_stage_here if settings.dry else processes.run_stage_in_child
    end = time.monotonic() + seconds
    status, part = run(stage, settings, seconds, skip)
    record.put("results", stage, value=part)
    lost: dict[str, Any] = {}  # variants that took the device with them, and what is known of them
    while (culprit := culprit_of(status, part)) is not None and end - time.monotonic() > LEAST_SECONDS:
        ended = {"status": "failed", "reason": "the process ended in it"}
        lost[culprit] = part.get("variants", {}).get(culprit, ended)
        status, part = run(stage, settings, end - time.monotonic(), (*skip, *lost))
        part.setdefault("variants", {}).update(lost)
        record.put("results", stage, value=part)
    return status | ({"lost_the_device": list(lost)} if lost else {})


def culprit_of(status: dict[str, Any], part: dict[str, Any]) -> str | None:
    """The variant that a stage's process lost the device to, or did not come back from."""
    lost: str | None = part.get("device_lost_to")
    return lost if lost is not None or status["status"] == "ok" else part.get("in_hand")


def run_stage_here(
    stage: str, settings: Settings, seconds: float, skip: tuple[str, ...] = ()
) -> tuple[dict[str, Any], dict[str, Any]]:
    """As ``processes.run_stage_in_child``, without a process."""
    with tempfile.TemporaryDirectory() as folder:
        part = Record(Path(folder) / "part.json")
        limited = replace(settings, deadline=time.monotonic() + seconds)
        _, outcome = attempt(lambda: run_stage(stage, limited, part, skip))
        return outcome, part.data


def parse(arguments: list[str]) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, help="folder of the results; default bench/results/<name of the GPU>")
    parser.add_argument("--seconds", type=float, default=TOTAL_SECONDS, help="limit of the run")
    parser.add_argument(
        "--backend", help='of the library; default "triton", in a dry run "streaming" unless Triton interprets'
    )
    parser.add_argument("--dry-run", action="store_true", help="toy sizes on the CPU")
    parser.add_argument("--stage", help="run one stage in this process")
    parser.add_argument("--part", type=Path, help="where a stage puts its results")
    parser.add_argument("--skip", action="append", default=[], help="variant that a head stage leaves out")
    options = parser.parse_args(arguments)
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("no GPU is visible to torch; --dry-run runs every stage at toy sizes on the CPU")
    if (options.stage is None) != (options.part is None):
        parser.error("--stage and --part go together")
    return options


def main(arguments: list[str]) -> None:
    """Run what the command line asks for."""
    options = parse(arguments)
    name = "dry-run" if options.dry_run else slug(torch.cuda.get_device_name())
    on_triton = not options.dry_run or os.environ.get("TRITON_INTERPRET") == "1"
    settings = Settings(
        backend=options.backend or ("triton" if on_triton else "streaming"),
        dry=options.dry_run,
        deadline=time.monotonic() + options.seconds,
        out=options.out or ROOT / "bench" / "results" / name,
    )
    if options.stage is not None:
        run_stage(options.stage, settings, Record(options.part), tuple(options.skip))
        return
    record = drive(settings)
    (settings.out / "report.md").write_text(gpu_table(record.data) + "\n")
    print(short_table(record.data))
    print(f"results: {record.path}, every table: {settings.out / 'report.md'}")


if __name__ == "__main__":
    main(sys.argv[1:])
