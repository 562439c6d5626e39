"""The overhead of Python: host time of forward and backward, for the first call of a process and for small later calls.

    pytest bench/bench_first_call.py --benchmark-enable --benchmark-json=bench/results/cpu/first_call.json

Each round is a separate process (``bench.fresh_process``). The benchmark's own times are ignored, since they are of whole
processes; ``extra_info`` has the first call, later calls and the loaded modules. The test requires: no compiler of torch is
loaded, the first call takes at most 20 MiB, no thread is woken for a small call; timed, a first call takes at most 0.1 s. The
aim of 400 us for a later call with "native" on one thread is not a test: machines differ.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
ROUNDS = 5
FEW_CALLS = 100  # where nothing is timed: threads are woken at each, or at none
MOST_MIB, MOST_SECONDS = 20.0, 0.1


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("backend", ["native", "streaming"])
def test_first_call(benchmark: Any, backend: str, threads: int, request: pytest.FixtureRequest) -> None:
    timed = request.config.getoption("benchmark_enable")
    if threads == 1 and not timed:
        pytest.skip("one thread has no other to wake: for timing only")
    calls = [] if timed else [str(FEW_CALLS)]
    results: list[dict[str, Any]] = []

    def fresh() -> None:
        command = [sys.executable, "-m", "bench.fresh_process", backend, str(threads), *calls]
        done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
        results.append(json.loads(done.stdout))

    benchmark.pedantic(fresh, rounds=ROUNDS, iterations=1)
    for key in ("first_seconds", "first_mib", "later_seconds", "least_seconds", "modules_loaded", "wake_ups_per_call"):
        benchmark.extra_info[key] = statistics.median(result[key] for result in results)
    for result in results:
        assert result["compiler_loaded"] == [], "the first call loads torch's compiler"
        assert result["first_mib"] <= MOST_MIB, f"the first call takes {result['first_mib']} MiB"
        assert result["wake_ups_per_call"] < 0.5, "threads are woken for a small call"
        if timed:
            assert result["first_seconds"] <= MOST_SECONDS, f"the first call takes {result['first_seconds']:.2f} s"
