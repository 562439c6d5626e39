"""The roof of a step, against its definition."""

from __future__ import annotations

import pytest
import torch

from tests.bench_tool.toy import CPU
from vmf_bench.inputs import HeadShape
from vmf_bench.roof import Rates, measured_rates, operations_of, roof_of

pytestmark = pytest.mark.quick

SHAPE = HeadShape(64, prototypes=65_536, dim=256)  # 640 student rows, 128 teacher rows
RATES = Rates(mm_size=1024, operations=1e12, exponentials=1e10, bytes=1e11)


def test_operations_are_those_of_the_backends() -> None:
    assert operations_of(SHAPE, "cpu") == (6 * 640 + 2 * 128) * 65_536 * 256
    assert operations_of(SHAPE, "cuda") == 8 * (640 + 128) * 65_536 * 256 == SHAPE.flops


def test_a_cpu_adds_what_a_gpu_overlaps() -> None:
    cpu, cuda = (roof_of(SHAPE, torch.float32, device, RATES) for device in ("cpu", "cuda"))
    products, exponentials = operations_of(SHAPE, "cpu") / 1e12, 768 * 65_536 / 1e10
    moved = 3 * 65_536 * 256 * 4 + (2 * 640 + 128) * 256 * 4
    assert cpu.parts == {"products": products, "exponentials": exponentials, "bytes": moved / 1e11}
    assert cpu.seconds == pytest.approx(products + exponentials)
    assert cuda.seconds == pytest.approx(operations_of(SHAPE, "cuda") / 1e12)


def test_memory_decides_where_there_are_few_rows() -> None:
    few = roof_of(HeadShape(1), torch.float32, "cpu", Rates(1024, 1e12, 1e12, 1e9))
    assert few.seconds == few.parts["bytes"]


def test_rates_are_measured() -> None:
    rates = measured_rates(torch.float32, CPU)
    assert rates.operations > 1e8, f"{rates}"
    assert rates.exponentials > 1e5, f"{rates}"
    assert rates.bytes > 1e7, f"{rates}"
