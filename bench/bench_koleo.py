"""KoLeo of prototypes, forward and backward, and the count of unique prototypes, fp32.

    pytest bench/bench_koleo.py --benchmark-enable --benchmark-json=bench/results/cpu/koleo.json

There is no baseline at full size: the dense formula's [K, K] distances are 16 GiB. ``extra_info`` holds the peak extra memory.

Legend: K prototypes, D bottleneck dim.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bench.workloads import TOY, Workload
from vmf_bench.memory import cpu_peak_extra_mib
from vmf_kernels.diagnostics import unique_prototypes
from vmf_kernels.losses.prototype_koleo import PrototypeKoLeoLoss

ROUNDS = 3
SHARE_UNIQUE = {"distinct": 1.0, "collapsed": 0.01}  # 1 % is the share published heads end with
SPREAD = 0.01  # of duplicates around their direction, relative: a cosine distance of about 1e-4


@pytest.fixture
def workload(request: pytest.FixtureRequest) -> Workload:
    return Workload(images=1) if request.config.getoption("benchmark_enable") else TOY


def prototypes_of(workload: Workload, share: float) -> Tensor:
    """[K, D] prototypes scattered around ``share`` K random directions."""
    random = torch.Generator().manual_seed(0)
    size = workload.prototypes, workload.dim
    directions = torch.randn(*size, generator=random)
    if share == 1:
        return directions
    owners = torch.randint(max(1, int(share * size[0])), size[:1], generator=random)
    return directions[owners] + SPREAD * torch.randn(*size, generator=random)


@pytest.mark.parametrize("collapse", SHARE_UNIQUE)
def test_prototype_koleo(benchmark: Any, workload: Workload, collapse: str) -> None:
    weight, koleo = prototypes_of(workload, SHARE_UNIQUE[collapse]).requires_grad_(), PrototypeKoLeoLoss()

    def step() -> None:
        weight.grad = None
        koleo(weight).backward()

    benchmark.pedantic(step, rounds=ROUNDS, iterations=1)
    benchmark.extra_info["extra_mib"] = round(cpu_peak_extra_mib(step, weight.numel() * weight.element_size()), 1)


@pytest.mark.parametrize("collapse", SHARE_UNIQUE)
def test_unique_prototypes(benchmark: Any, workload: Workload, collapse: str) -> None:
    weight = prototypes_of(workload, SHARE_UNIQUE[collapse])
    found = benchmark.pedantic(unique_prototypes, (weight,), rounds=ROUNDS, iterations=1)
    benchmark.extra_info["unique"] = found.count
    benchmark.extra_info["extra_mib"] = round(cpu_peak_extra_mib(lambda: unique_prototypes(weight), 0), 1)
