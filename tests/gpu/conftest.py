"""Tests on a GPU: ``pytest -m gpu``. Without one they are left out, and a line of the report says how many.

In each file one unmarked test does on the CPU, at toy size and under Triton's interpreter, what the marked ones do.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items if torch.cuda.is_available() else ():
        if HERE in item.path.parents and not item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="Triton interprets nothing where there is a GPU"))


@pytest.fixture
def device() -> Iterator[torch.device]:
    """The GPU, its unused memory given back afterwards: other processes may be measuring on it."""
    yield torch.device("cuda", torch.cuda.current_device())
    torch.cuda.empty_cache()


@pytest.fixture
def tf32() -> Iterator[None]:
    """Products of fp32 in tf32, torch's and the kernels', while the test runs."""
    before = torch.get_float32_matmul_precision()
    # the older of torch's two switches, which sets the newer as well: after the newer alone, torch.compile raises
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture
def interpreter() -> Iterator[None]:
    """What the dry runs on the CPU need: bf16 that multiplies values, not bit patterns."""
    from tests.backends.interpreted import correct_bf16

    with correct_bf16():
        yield
