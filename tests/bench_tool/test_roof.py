"""The roof of a step, against its definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.bench_tool.toy import CPU
from vmf_bench import roof
from vmf_bench.errors import BenchError
from vmf_bench.inputs import HeadShape
from vmf_bench.machine import free_gib
from vmf_bench.roof import Rates, measured_rates, operations_of, roof_of

pytestmark = pytest.mark.quick

SHAPE = HeadShape(64, prototypes=65_536, dim=256)  # 640 student rows, 128 teacher rows
RATES = Rates(mm_size=1024, operations=1e12, exponentials=1e10, bytes=1e11)


def test_operations_are_those_that_no_loss_avoids() -> None:
    assert operations_of(SHAPE) == (6 * 640 + 2 * 128) * 65_536 * 256
    assert SHAPE.flops - operations_of(SHAPE) == (2 * 640 + 6 * 128) * 65_536 * 256, "what is computed again"


def test_a_cpu_adds_what_a_gpu_overlaps() -> None:
    cpu, cuda = (roof_of(SHAPE, torch.float32, device, RATES) for device in ("cpu", "cuda"))
    products, exponentials = operations_of(SHAPE) / 1e12, 768 * 65_536 / 1e10
    moved = 3 * 65_536 * 256 * 4 + (2 * 640 + 128) * 256 * 4
    assert cpu.parts == {"products": products, "exponentials": exponentials, "bytes": moved / 1e11}
    assert cpu.seconds == pytest.approx(products + exponentials)
    assert cuda.seconds == pytest.approx(operations_of(SHAPE) / 1e12)
    assert cuda.operations == cpu.operations


def test_memory_decides_where_there_are_few_rows() -> None:
    few = roof_of(HeadShape(1), torch.float32, "cpu", Rates(1024, 1e12, 1e12, 1e9))
    assert few.seconds == few.parts["bytes"]


def test_rates_are_measured() -> None:
    rates = measured_rates(torch.float32, CPU)
    assert rates.operations > 1e8, f"{rates}"
    assert rates.exponentials > 1e5, f"{rates}"
    assert rates.bytes > 1e7, f"{rates}"


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of the tensors of copies, on a device on which half a GiB of them fails."""
    made: list[int] = []

    def empty(count: int, **options: Any) -> torch.Tensor:
        made.append(count)
        if count > 2**29:
            raise torch.OutOfMemoryError("it is full")
        return torch.zeros(16, **options)

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(roof, "LARGEST_MM", {"cpu": roof.SMALLEST_MM})
    monkeypatch.setattr(roof, "COPIED_BYTES", {"cpu": 2**31})
    return made


def test_little_memory_makes_tensors_small(copied: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roof, "free_gib", lambda device: 0.5)
    measured_rates(torch.float32, CPU)
    assert copied == [2**27], "a quarter of what is free"


@pytest.mark.parametrize(("free", "tensors"), [(0.2, 0), (8.0, 1)], ids=["none is free", "others take it meanwhile"])
def test_too_little_memory_is_one_sentence(
    free: float, tensors: int, copied: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roof, "free_gib", lambda device: free)
    with pytest.raises(BenchError, match=rf"^{free:g} GiB of memory are free on cpu; expected 0.25 or more"):
        measured_rates(torch.float32, CPU)
    assert len(copied) == tensors


def test_memory_that_torch_keeps_for_itself_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 * 2**30, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 6 * 2**30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 4 * 2**30)
    assert free_gib(torch.device("cuda")) == 5.0
