"""The check finds a loss that is wrong, and passes those that are not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.bench_tool.toy import CPU, DTYPES
from vmf_bench.check import check
from vmf_bench.inputs import HeadInputs
from vmf_bench.run import has_fault
from vmf_bench.variants import OURS, VARIANTS, Variant

pytestmark = pytest.mark.quick


def test_this_library_s_losses_are_right() -> None:
    records = check(VARIANTS, DTYPES, CPU)
    wrong = [record for record in records if record["status"] not in ("ok", "not available")]
    assert not wrong, f"{wrong}"
    assert {record["name"] for record in records} == set(OURS), "every backend has its line, and no peer"
    ran = [record for record in records if record["status"] == "ok"]
    assert len(ran) >= 4 * 3, f"both pairings and dtypes of at least three losses, got {len(ran)}"
    assert all(record["errors"].keys() == record["budget"].keys() for record in ran)


def off_by(factor: float) -> Callable[[HeadInputs], Tensor]:
    return lambda inputs: factor * VARIANTS["reference"].prepare(inputs, lambda f: f)(inputs)


def hidden_nan(inputs: HeadInputs) -> Tensor:
    value = off_by(1)(inputs)
    return value + 0 * (inputs.student_magnitude - inputs.student_magnitude).sum().sqrt()  # its slope there is infinite


@pytest.mark.parametrize(
    ("loss", "dtype", "said"),
    [
        (off_by(1 + 1e-4), torch.float32, "is off by 1.0e-04, budget"),
        (off_by(1.1), torch.bfloat16, "is off by 1.0e-01, budget"),
        (hidden_nan, torch.float32, "magnitude is off by nan, budget"),
    ],
)
def test_a_wrong_loss_is_found(loss: Any, dtype: torch.dtype, said: str) -> None:
    """Negative control."""
    records = check({"it": Variant("wrong", lambda inputs, compile_: loss)}, (dtype,), CPU)
    assert all(record["status"] == "disagrees" and said in record["reason"] for record in records), f"{records}"
    assert has_fault({"checks": records, "cases": []})
