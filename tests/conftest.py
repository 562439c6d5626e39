"""What every test starts from: one seed, and one thread, for two that wait for each other on a busy machine crawl.

Without a GPU, Triton's kernels run under its interpreter, which is chosen before any of them is imported.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

if torch.cuda.is_available():
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic algorithms ask for
else:
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def _same_start() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def uninitialised_memory_is_nan() -> Iterator[None]:
    """Every tensor of ``torch.empty`` and its kin starts as NaN, so that an element nobody writes shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.ones(1).new_empty(3).isnan().all(), "torch no longer fills uninitialised memory"
    yield
    torch.use_deterministic_algorithms(False)
