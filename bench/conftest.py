"""Options and machine facts of the benchmarks; without ``--benchmark-enable`` each runs once, at toy size, untimed."""

from __future__ import annotations

import platform
from typing import Any

import pytest
import torch

from bench.workloads import TOY, WORKLOADS, Workload
from vmf_bench.machine import machine


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info.pop("node", None)  # a host's name says nothing about its speed
    machine_info["vmf_kernels"] = {
        "cpu": machine()["cpu"],
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "mm_4096_gflops": round(_mm_rate(), 1) if config.getoption("benchmark_enable") else None,
    }


@pytest.fixture(params=[pytest.param(name, id=name.replace("/", "-")) for name in WORKLOADS])
def workload(request: pytest.FixtureRequest) -> Workload:
    return WORKLOADS[request.param] if request.config.getoption("benchmark_enable") else TOY


def _mm_rate() -> float:
    """Rate of torch.mm on 4096^3 fp32, GFLOP/s: the roof the operator's products stand under."""
    from torch.utils.benchmark import Timer

    size = 4096
    x = torch.randn(size, size)
    seconds: float = Timer("x @ x", globals={"x": x}, num_threads=torch.get_num_threads()).blocked_autorange().median
    return 2 * size**3 / seconds / 1e9
