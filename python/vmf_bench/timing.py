"""Times of steps: interleaved; on a GPU from a cold L2, behind a backlog that hides the host; medians and spread.

On a CPU a step meets the caches as the step before left them, but for a quarter of a MiB that is written between.

A step shorter than the host needs to launch it would otherwise be timed as the host's work: the device first sleeps for
longer than the host takes, and events bracket the step alone. What a waiting host sees is ``wall_milliseconds``, what it
spends itself ``host_milliseconds``.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from vmf_bench.inputs import HeadInputs
from vmf_bench.peers.peer import Loss

Step = Callable[[], object]
Measure = Callable[[Step], float]  # milliseconds of one run

FLUSH_CACHES = 4  # as many sizes of a GPU's L2 are written between runs
BACKLOG_MARGIN = 1.5  # times the host's own time of a step
MOST_BACKLOG_SECONDS = 0.02
CYCLES_PER_SECOND = 2.0e9  # at least the SM clock: the backlog may be longer, not shorter
WARM_UP_RUNS = 3
CPU_FLUSH_BYTES = 2**16  # times FLUSH_CACHES: it empties no L2; the other losses of a round do most of that


class Times(NamedTuple):
    """Milliseconds."""

    median: float
    p10: float
    p90: float
    rounds: int

    @classmethod
    def of(cls, milliseconds: list[float]) -> Times:
        """Median and the outer deciles."""
        ordered = sorted(milliseconds)
        last = len(ordered) - 1
        return cls(statistics.median(ordered), ordered[round(0.1 * last)], ordered[round(0.9 * last)], len(ordered))


class Stopwatch:
    """Ways to time one run on a device; on the CPU both are the host's clock."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        size = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else CPU_FLUSH_BYTES
        self.flush: Tensor = torch.zeros(FLUSH_CACHES * size, dtype=torch.uint8, device=device)
        self.host_seconds: dict[int, float] = {}

    def warm_up(self, step: Step, runs: int = WARM_UP_RUNS) -> float:
        """A few runs, also to learn what the host needs for one; the median run's milliseconds."""
        walls = []
        for _ in range(runs):
            self.synchronize()
            start = time.perf_counter()
            step()
            self.host_seconds[id(step)] = time.perf_counter() - start
            self.synchronize()
            walls.append(1e3 * (time.perf_counter() - start))
        return statistics.median(walls)

    def device_milliseconds(self, step: Step) -> float:
        """Time on the device, independent of the host's time."""
        if self.device.type != "cuda":
            return self.wall_milliseconds(step)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        backlog = min(BACKLOG_MARGIN * self.host_seconds.get(id(step), 0.0), MOST_BACKLOG_SECONDS)
        self.flush.zero_()
        torch.cuda._sleep(int(backlog * CYCLES_PER_SECOND))
        start.record()
        step()
        end.record()
        end.synchronize()
        milliseconds: float = start.elapsed_time(end)
        return milliseconds

    def wall_milliseconds(self, step: Step) -> float:
        """Time until a host that waits has the result."""
        self.flush.zero_()
        self.synchronize()
        start = time.perf_counter()
        step()
        self.synchronize()
        return 1e3 * (time.perf_counter() - start)

    def host_milliseconds(self, step: Step) -> float:
        """Time until the call returns, the device having been idle: where it is above the device's own, the host decides."""
        self.synchronize()
        start = time.perf_counter()
        step()
        milliseconds = 1e3 * (time.perf_counter() - start)
        self.synchronize()
        return milliseconds

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def training_step(loss: Loss, inputs: HeadInputs) -> Step:
    """Loss and gradients, each time into fresh memory."""

    def step() -> None:
        inputs.clear_gradients()
        loss(inputs).backward()

    return step


def interleaved(measure: Measure, steps: Mapping[str, Step], rounds: int) -> dict[str, Times]:
    """Times of every step over ``rounds_of``."""
    return {name: Times.of(values) for name, values in rounds_of(measure, steps, rounds).items()}


def rounds_of(measure: Measure, steps: Mapping[str, Step], rounds: int) -> dict[str, list[float]]:
    """Run each step once per round, so that all see the same clocks; the order rotates by one each round."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds):
        for name in rotated(steps, turn):
            times[name].append(measure(steps[name]))
    return times


def rotated(names: Iterable[str], turn: int) -> list[str]:
    """The order of a round: the names, from another first one in every turn."""
    listed = list(names)
    first = turn % len(listed) if listed else 0
    return listed[first:] + listed[:first]


def rounds_within(seconds: float, milliseconds: float, *, least: int = 5, most: int = 50) -> int:
    """How many rounds of so many milliseconds fit."""
    return max(least, min(most, int(1e3 * seconds / max(milliseconds, 1e-3))))
