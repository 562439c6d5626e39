"""The stated times follow from the shipped tiles and the counted instructions, and the page is what the command prints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import roofline
from bench.rates import GPUS, H100, H200
from bench.roofline import (
    CUDA_KERNELS,
    DIM,
    TARGET,
    WORKLOADS,
    Cost,
    costs,
    cuda_costs,
    cuda_loops,
    tables,
    triton_loops,
)
from vmf_kernels.backends.triton.tiles import Tile, tile_of


def test_the_page_has_the_tables_that_the_command_prints() -> None:
    assert f"<!-- table -->\n{tables()}\n<!-- /table -->" in roofline.PAGE.read_text(), (
        "run `python -m bench.roofline --write`"
    )


def test_writing_replaces_what_is_between_the_markers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- table -->\nold\n\nolder\n<!-- /table -->\nafter\n")
    monkeypatch.setattr(roofline, "PAGE", page)
    roofline.main(["--write"])
    assert page.read_text() == f"before\n<!-- table -->\n{tables()}\n<!-- /table -->\nafter\n"


def test_all_products_together_are_eight_a_logit_and_dim() -> None:
    for made in (costs, cuda_costs):
        total = sum(cost.operations for cost in made(640, 128))
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
        # a softmax step comes on top of the products: exponentials or what is issued meanwhile, whichever is longer
        (Cost("", operations=790e12, exponentials=H200.exponentials, exposed=0.5 * H200.instructions), 2.0),
        (Cost("", operations=790e12, exponentials=H200.exponentials, exposed=3.0 * H200.instructions), 4.0),
        # what is issued under the products is not on top of them
        (Cost("", operations=790e12, instructions=0.9 * H200.instructions), 1.0),
        (Cost("", operations=790e12, instructions=1.5 * H200.instructions), 1.5),
    ],
)
def test_a_triton_kernel_takes_turns(cost: Cost, seconds: float) -> None:
    assert cost.in_turns(H200) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("changes", "seconds"),
    [
        ({}, 1.0),
        ({"exponentials": 2 * H200.exponentials}, 2.0),
        ({"instructions": 2 * H200.instructions, "fullness": 0.5}, 4.0),
        ({"shared_memory": 2 * H200.shared_memory}, 2.0),
        ({"l2": 2 * H200.l2}, 2.0),
        ({"memory": 2 * H200.copies, "fullness": 0.9}, 2.0),
    ],
)
def test_a_kernel_of_csrc_takes_what_its_slowest_resource_takes(changes: dict[str, Any], seconds: float) -> None:
    assert Cost("", operations=790e12)._replace(**changes).at_once(H200) == pytest.approx(seconds)


def test_an_h100_is_slower_where_memory_binds_and_only_there() -> None:
    for cost in [*costs(640, 128), *costs(16384, 16384)]:
        slower = cost.in_turns(H100) > cost.in_turns(H200)
        binds = cost.memory / H100.copies > max(cost.in_turns(H200), H100.launch) * (1 + 1e-9)
        assert slower is binds, f"{cost}"


@pytest.mark.parametrize("name", ["student", "teacher", "columns"])
def test_a_turn_of_a_loop_is_one_tile(name: str) -> None:
    """By its products: 16 of D for the logits, 16 of what streams for at most 256 columns of the sums."""
    tile = tile_of(name, TARGET, "16-bit", DIM)
    streams = tile.rows if name == "columns" else tile.prototypes
    for loop in triton_loops(name, tile):
        assert loop["matrix"] == DIM // 16 + streams // 16, f"{name} {tile}: {loop}"


@pytest.mark.parametrize("name", CUDA_KERNELS)
def test_a_turn_of_a_loop_of_csrc_is_64_keys(name: str) -> None:
    loops = cuda_loops(name)
    assert len(loops) == (2 if name == "columns" else 1)
    assert {loop["matrix"] for loop in loops} == {DIM // 16 + 64 // 16}, f"{loops}"


def test_a_tile_that_is_not_in_the_report_is_refused() -> None:
    with pytest.raises(LookupError, match="has no student pass with Tile"):
        triton_loops("student", Tile(32, 32))


def test_instructions_are_those_of_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: twice the instructions in the report are twice those of the pass."""
    before = {cost.kernel: cost.exposed for cost in costs(640, 128)}
    content = json.loads(roofline.TRITON_REPORT.read_text())
    for row in content["kernels"]:
        for loop in row["loops"]:
            loop["exposed"] *= 2
    report = tmp_path / "report.json"
    report.write_text(json.dumps(content))
    monkeypatch.setattr(roofline, "TRITON_REPORT", report)
    assert {cost.kernel: cost.exposed for cost in costs(640, 128)} == {name: 2 * each for name, each in before.items()}
    assert sum(each > 0 for each in before.values()) == 3


def test_every_gpu_and_workload_has_a_table() -> None:
    heads = [line for line in tables().splitlines() if line.startswith("### ")]
    expected = [f"### {workload} rows on an {gpu.name}" for gpu in GPUS for workload in WORKLOADS]
    assert heads == [*expected, *(f"### csrc/cuda on an {gpu.name}" for gpu in GPUS)]
