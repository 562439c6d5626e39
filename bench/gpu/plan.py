"""What each call measures, the most important numbers first, and the planned time of each stage.

``python -m bench.gpu first`` works down FIRST, ``second`` SECOND, and ``all`` everything, for those whose GPU is their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

RESERVE = 12.0  # seconds of a call for its imports, and to end a stage that does not stop by itself
TIMED = {"ceilings", "passes", "head", "rivals", "heads", "counters", "tune"}  # first words: alone on the device


class Stage(NamedTuple):
    """One line of a plan.

    Attributes:
        name: the job, ``jobs.JOBS``, and its arguments: widths of passes, places of workloads in ``HEAD_SHAPES``.
        seconds: planned; a stage gets more where others took less, and no less while there is time.
        needs: of ``NEEDS``; where it does not hold the stage is left out.
        beside: runs side by side with the stages after it, until one that is timed.
    """

    name: str
    seconds: float
    needs: str = "nothing"
    beside: bool = False

    @property
    def is_timed(self) -> bool:
        """Whether it must have the device to itself."""
        return self.name.split()[0] in TIMED


FIRST = (
    Stage("module", 15),
    Stage("build", 100, "no module"),
    Stage("first light cuda", 40, "a module"),
    Stage("first light bounded", 30, "a hang"),
    Stage("tests cuda", 60, "a module", beside=True),  # beside what waits for Triton's compiler most of the time
    Stage("first light triton", 60),
    Stage("ceilings", 10),
    Stage("passes 256", 20),
    Stage("head 0", 20),
    Stage("head 1", 20),
)
SECOND = (
    Stage("module", 5),
    Stage("build", 100, "no module"),
    Stage("first light cuda", 40, "a module, not yet ok"),
    Stage("race check", 60, "wrong"),
    Stage("passes 256", 20, "not yet ok"),
    Stage("compile 0", 110, beside=True),
    Stage("compile 1", 110, beside=True),
    Stage("errors", 70, beside=True),
    Stage("tests gpu", 78),
    Stage("rivals 0", 55),
    Stage("rivals 1", 55),
    Stage("counters cuda", 60, "right"),
    Stage("heads 2 3 6 7", 50),
    Stage("tests cuda", 40, "a module, not yet ok"),
    Stage("tune", 45),
)
REST = (
    Stage("sanitizer triton", 60),
    Stage("sanitizer cuda", 60, "right"),
    Stage("tests memory", 60),
    Stage("passes 384 128", 40),
    Stage("heads 4 5", 60),
    Stage("counters triton", 60),
)
PLANS = {
    "first": (200.0, FIRST),
    "second": (360.0, SECOND),
    "all": (1000.0, (*FIRST, *(stage for stage in SECOND if stage.name not in {one.name for one in FIRST}), *REST)),
}

Data = Mapping[str, Any]


def is_ok(name: str, data: Data) -> bool:
    """Whether a stage is on record as ok."""
    return bool(data["stages"].get(name, {}).get("status") == "ok")


def has_module(data: Data) -> bool:
    """Whether there is a CUDA module to run, or a stand-in for it."""
    return bool(data.get("dry_run")) or is_ok("module", data) or is_ok("build", data)


def first_light(data: Data) -> Mapping[str, Any]:
    """What became of each CUDA kernel in first light, by names such as "cuda/columns/bf16/256"; none before it ran."""
    results: Mapping[str, Any] = data["results"].get("first light cuda", {}).get("results", {})
    return results


def has_hung(data: Data) -> bool:
    """Whether a kernel of the backend did not come back in first light; those that no backend takes yet can wait."""
    return any(one["status"] == "hung" and name.startswith("cuda/") for name, one in first_light(data).items())


NEEDS: dict[str, Callable[[str, Data], bool]] = {
    "nothing": lambda name, data: True,
    "no module": lambda name, data: not is_ok("module", data),
    "a module": lambda name, data: has_module(data),
    "a hang": lambda name, data: has_hung(data),
    "not yet ok": lambda name, data: not is_ok(name, data),
    "a module, not yet ok": lambda name, data: has_module(data) and not is_ok(name, data),
    "right": lambda name, data: data["stages"].get("first light cuda", {}).get("status") in ("ok", "incomplete"),
    "wrong": lambda name, data: data["stages"].get("first light cuda", {}).get("status") == "wrong",
}


def is_wanted(stage: Stage, data: Data) -> bool:
    """Whether what the stage needs holds by what is on record."""
    return NEEDS[stage.needs](stage.name, data)


def seconds_for(place: int, plan: tuple[Stage, ...], data: Data, left: float) -> float:
    """Limit of a stage: what it is planned to take and what nobody else is, or all there is left if that is less."""
    planned = plan[place].seconds
    if plan[place].beside:
        return min(planned, left)
    later = sum(stage.seconds for stage in plan[place + 1 :] if not stage.beside and is_wanted(stage, data))
    return min(left, planned + max(left - planned - later, 0.0))
