"""The stated times follow from the shipped tiles, and the document is what the command prints."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.roofline import WORKLOADS, Cost, costs, table

DOCUMENT = (Path(__file__).parents[1] / "bench" / "ROOFLINE.md").read_text()


@pytest.mark.parametrize("workload", WORKLOADS)
def test_the_document_has_the_table_that_the_command_prints(workload: str) -> None:
    expected = table(workload)
    assert expected in DOCUMENT, f"run `python -m bench.roofline`; ROOFLINE.md lacks\n{expected}"


def test_all_products_together_are_eight_a_logit_and_dim() -> None:
    total = sum(cost.operations for cost in costs(640, 128))
    assert total == 8 * (640 + 128) * 65_536 * 256, f"{total} operations"


@pytest.mark.parametrize(
    ("cost", "seconds"),
    [
        (Cost("", operations=790e12), 1.0),
        (Cost("", operations=790e12, fullness=0.5), 2.0),
        (Cost("", memory=4.3e12), 1.0),
        (Cost("", memory=4.3e12, operations=1580e12), 2.0),
        (Cost("", l2=11e12), 2.0),
        (Cost(""), 2e-6),
    ],
)
def test_a_kernel_takes_what_its_slowest_resource_takes(cost: Cost, seconds: float) -> None:
    assert cost.seconds == pytest.approx(seconds)
