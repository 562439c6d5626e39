"""The job of each stage of a plan. The first words of a stage name its job; the other words are the job's arguments."""

from __future__ import annotations

import json
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from bench.gpu import ceilings, counters, errors, head, passes, plan, processes, suite
from bench.gpu.losses import ALL, BESIDE, QUICK
from bench.gpu.processes import Ended, Running
from bench.gpu.record import Record, Under, attempt
from bench.gpu.settings import ROOT, Settings

COMMANDS = {
    "module": [sys.executable, "-m", "bench.gpu.module"],
    "first light": [sys.executable, "-m", "bench.first_light"],
}
BOUNDED = ROOT / "build" / "bounded"  # where a module lies whose waits trap instead of hanging
FIRST_LIGHT_RESERVE = 4.0  # seconds for it to write what it has
TRITON_WORKERS = 12
LEAST_SECONDS = 8.0  # below which no stage is started: importing torch takes a good part of it
# statuses of its variants; others are bad
FINE, UNDECIDED = ("right", "absent"), ("not reached", "slow", "unavailable")
TUNED_WIDTH = 256


class Work(NamedTuple):
    """The inputs of a job."""

    settings: Settings
    record: Record
    stage: str
    seconds: float

    @property
    def arguments(self) -> list[str]:
        """Words of the stage after its job's name."""
        name = next(name for name in JOBS if self.stage.startswith(name))
        return self.stage.removeprefix(name).split()


Entry = dict[str, Any]  # of the stages: a status, and what else there is to say


def perform(work: Work) -> Entry:
    """The stage's job."""
    name = next(name for name in JOBS if work.stage.startswith(name))
    return JOBS[name](work)


def find_module(work: Work) -> Entry:
    """Whether there is a CUDA module that imports, was built from these sources, and has code for this GPU."""
    ended = Running(COMMANDS["module"], work.stage, work.settings.log).finish(work.seconds)
    return ended.status() | {"says": (ended.output.strip().splitlines() or [""])[-1]}


def first_light(work: Work) -> Entry:
    """Every variant of "cuda" or "triton" alone; or, "bounded", those that hung, of the module whose waits trap instead.

    Returns:
        status "ok"; "wrong" where one that the backend uses is; "incomplete" where none is, but not all were reached.
    """
    (which,) = work.arguments
    command = [*COMMANDS["first light"], "--kernels", "triton" if which == "triton" else "cuda"]
    command += ["--workers", str(TRITON_WORKERS)] if which == "triton" else []
    if which == "bounded":
        module = BOUNDED / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
        if not module.exists():
            return {"status": "not available", "reason": f"no {module.name} in build/bounded"}
        command += ["--module", str(module), "--only", *hung_variants(work.record.data)]
    folder = work.settings.out / which
    (folder / "first_light.json").unlink(missing_ok=True)  # of a call before this one
    command += ["--out", str(folder), "--seconds", f"{work.seconds - FIRST_LIGHT_RESERVE:.0f}"]
    command += ["--dry-run"] if work.settings.dry else []
    ended = Running(command, work.stage, work.settings.log).finish(work.seconds)
    found = folder / "first_light.json"
    if not found.exists():
        return ended.status() | ({"status": "failed"} if ended.code == 0 else {})
    data = json.loads(found.read_text())
    work.record.put("results", work.stage, value=data)
    # in the record, in the log: few files may come back from a machine
    for known in (found, folder / "first_light.txt"):
        known.unlink(missing_ok=True)
    if not list(folder.iterdir()):
        folder.rmdir()
    return verdict(ended, data["results"])


def verdict(ended: Ended, results: dict[str, Any]) -> Entry:
    """The stage's entry; kernels that no backend uses yet may be wrong."""
    bad = [name for name, one in results.items() if one["status"] not in (*FINE, *UNDECIDED)]
    undecided = [name for name, one in results.items() if one["status"] in UNDECIDED]
    entry = ended.status() | {"not_right": bad, "undecided": undecided}
    if any(name.split("/")[0] in BESIDE for name in bad):
        return entry | {"status": "wrong"}
    if ended.code in (0, 2) or (ended.code == 1 and (bad or undecided)):  # else 1 is an error of the program
        return entry | {"status": "incomplete" if undecided or ended.code == 2 else "ok"}
    return entry


def hung_variants(data: dict[str, Any]) -> list[str]:
    """Names such as "cuda/columns/bf16/256" of what did not come back in first light."""
    return [name for name, one in plan.first_light(data).items() if one["status"] == "hung"]


def race_check(work: Work) -> Entry:
    """compute-sanitizer's memcheck, then its race check, on a small loss of the smallest width that is wrong."""
    wrong = work.record.data["stages"]["first light cuda"]["not_right"]
    dim = min(width_of(name) for name in wrong if name.split("/")[0] in BESIDE)
    end, found = time.monotonic() + work.seconds, dict[str, Entry]()
    for tools_left, tool in ((2, "memcheck"), (1, "racecheck")):
        seconds = (end - time.monotonic()) / tools_left
        found[tool] = processes.run_sanitizer(work.settings, seconds, work.stage, "cuda", tool=tool, dim=dim)
    return found["memcheck"] | {"dim": dim, "tools": found}


def width_of(variant: str) -> int:
    """256 of "cuda/columns/bf16/256"."""
    return int(variant.rpartition("/")[2])


def tune(work: Work) -> Entry:
    """Tiles of Triton's passes at the width of the main workloads, into ``tiles.json``."""
    if work.settings.dry:
        return {"status": "not available", "reason": "a dry run measures no tiles"}
    command = [sys.executable, "-m", "bench.tune", "--widths", str(TUNED_WIDTH), "--seconds", f"{work.seconds - 5:.0f}"]
    command += ["--out", str(work.settings.out / "tiles.json")]
    return Running(command, work.stage, work.settings.log).finish(work.seconds).status()


def measure(work: Work) -> Entry:
    """A stage of ``run_stage`` in a process of its own; where a variant loses the device or hangs, again without it."""
    skip, lost, end = distrusted(work.record.data), dict[str, Any](), time.monotonic() + work.seconds
    while True:
        status, part = run_and_keep(work, end - time.monotonic(), (*skip, *lost))
        for entry in heads(part):
            entry.setdefault("variants", {}).update(lost)
        work.record.put("results", work.stage, value=part)
        culprit = culprit_of(status, part)
        if culprit is None or end - time.monotonic() < LEAST_SECONDS:
            break
        ended = {"status": status["status"], "reason": "the process ended in it"}
        lost[culprit] = next((e["variants"][culprit] for e in heads(part) if culprit in e.get("variants", {})), ended)
    hung = {"hung_in": culprit} if culprit is not None and status["status"] == "hung" else {}
    return status | ({"lost_the_device": list(lost)} if lost else {}) | hung


def run_and_keep(work: Work, seconds: float, skip: tuple[str, ...]) -> tuple[Entry, dict[str, Any]]:
    """One process, or in a dry run a call; what it has recorded is in the record as it grows."""
    if work.settings.dry:
        return run_stage_here(work.stage, work.settings, seconds, skip)

    def keep(part: dict[str, Any]) -> None:
        work.record.put("results", work.stage, value=part)

    return processes.run_stage_in_child(work.stage, work.settings, seconds, skip, keep)


def heads(part: dict[str, Any]) -> list[dict[str, Any]]:
    """The workloads in what a stage has recorded: itself, or each of a stage of several."""
    return (
        [part]
        if "name" in part or "variants" in part
        else [e for e in part.values() if isinstance(e, dict) and "name" in e]
    )


def culprit_of(status: Entry, part: dict[str, Any]) -> str | None:
    """The variant that a stage's process lost the device to, or did not come back from."""
    for entry in (part, *heads(part)):
        lost: str | None = entry.get("device_lost_to")
        if lost is None and status["status"] in ("hung", "failed"):
            lost = entry.get("in_hand")
        if lost is not None:
            return lost
    return None


def distrusted(data: dict[str, Any]) -> tuple[str, ...]:
    """Variants that were seen to hang: a process sat in one of them past its limit, and no Python ran; slow ones are not."""
    stages = data["stages"].values()
    found = {name for entry in stages for name in (entry.get("hung_in"), *entry.get("lost_the_device", ())) if name}
    for name, one in plan.first_light(data).items():
        kernels = name.split("/")[0].replace("-", " ")  # "cuda clusters", as ``passes`` calls them
        # kernels that no backend takes yet are left out for less: nothing waits for their rates
        ended = ("hung",) if kernels in BESIDE else ("hung", "died", "failed")
        if width_of(name) == TUNED_WIDTH and one["status"] in ended:
            found.add(kernels)
    return tuple(sorted(found))


def run_stage_here(
    stage: str, settings: Settings, seconds: float, skip: tuple[str, ...] = ()
) -> tuple[Entry, dict[str, Any]]:
    """As ``processes.run_stage_in_child``, without a process."""
    with tempfile.TemporaryDirectory() as folder:
        part = Record(Path(folder) / "part.json")
        limited = replace(settings, deadline=time.monotonic() + seconds)
        _, outcome = attempt(lambda: run_stage(stage, limited, part, skip))
        return outcome, part.data


def run_stage(stage: str, settings: Settings, record: Record, skip: tuple[str, ...] = ()) -> None:
    """A stage that ``measure`` runs, in this process."""
    kind, *words = stage.split()
    places = () if kind == "passes" else [int(word) for word in words]
    if kind == "ceilings":
        ceilings.run(settings, record)
    elif kind == "errors":
        errors.run(settings, record)
    elif kind == "passes":
        passes.run(settings, record, tuple(map(int, words)), skip)
    elif kind == "compile":
        head.compile_all(settings, record, settings.shapes_at(places))
    elif kind in ("head", "rivals"):
        (shape,) = settings.shapes_at(places)
        head.run(settings, record, shape, skip, QUICK._replace(kernels=True) if kind == "head" else ALL)
    elif kind == "heads":
        shapes = settings.shapes_at(places)
        for done, shape in enumerate(shapes):
            share = settings.seconds_left() / (len(shapes) - done)
            limited = replace(settings, deadline=time.monotonic() + share)
            head.run(limited, Under(record, shape.name), shape, skip, QUICK)
    else:
        raise ValueError(f"unknown stage {stage!r}; expected ceilings, errors, passes, compile, head, rivals or heads")


JOBS: dict[str, Callable[[Work], Entry]] = {
    "module": find_module,
    "build": lambda work: processes.run_build(work.settings, work.seconds),
    "first light": first_light,
    "race check": race_check,
    "tests": lambda work: suite.run(work.settings, work.arguments[0], work.seconds),
    "sanitizer": lambda work: processes.run_sanitizer(work.settings, work.seconds, work.stage, work.arguments[0]),
    "counters": lambda work: counters.run(work.settings, work.seconds, work.arguments[0]),
    "tune": tune,
    **dict.fromkeys(("ceilings", "passes", "heads", "head", "rivals", "compile", "errors"), measure),
}
