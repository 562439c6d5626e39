"""Fixtures of the backends' tests."""

from __future__ import annotations

import pytest

from tests.backends.native_calls import HERE, INSTRUCTION_SETS
from vmf_kernels.backends.native import module


@pytest.fixture(params=HERE or INSTRUCTION_SETS[:1])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """An instruction set that the native backend takes for the best there is; skipped where the machine does not have it."""
    name: str = request.param
    if module.native() is None:
        pytest.skip("vmf_kernels._native was not built")
    present = module.instruction_sets()
    if name not in present:
        pytest.skip(f"this machine runs {', '.join(present)}")
    monkeypatch.setattr(module, "instruction_sets", lambda: present[: present.index(name) + 1])
    monkeypatch.setattr(module, "LEAST_WORK", 0)  # small problems go to several threads as well
    return name
