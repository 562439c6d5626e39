"""Tests on a GPU: ``pytest -m gpu``. Without one they are skipped, and the report says how many did not run.

In each file one unmarked test does on the CPU, at toy size and under Triton's interpreter, what the marked ones do.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from vmf_kernels.backends.triton.launch import unsupported_device

HERE = Path(__file__).parent


def why_not() -> str | None:
    """Why the tests here cannot run, or None."""
    if not torch.cuda.is_available():
        return "torch sees no NVIDIA GPU"
    return unsupported_device(torch.device("cuda", torch.cuda.current_device()))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = why_not()
    ours = [item for item in items if HERE in item.path.parents]
    for_gpu = [item for item in ours if item.get_closest_marker("gpu")]
    for item in for_gpu if reason is not None else ():
        item.add_marker(pytest.mark.skip(reason=f"{len(for_gpu)} tests need a GPU and did not run: {reason}"))
    for item in ours if torch.cuda.is_available() else ():
        if item not in for_gpu:
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
