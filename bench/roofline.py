"""The expected time of each kernel, from its arithmetic, instructions and memory traffic; stated before any measurement.

    python -m bench.roofline            prints the tables of ROOFLINE.md
    python -m bench.roofline --write    puts them there

For an H200 and an H100: DINO-vMF under weight norm, fp32 weights, bf16 products, K = 65,536, D = 256. Instructions are those
that the committed compile reports counted in the loops of the shipped kernels.

Legend: S / T student / teacher rows, R rows of either, K prototypes, D embedding dim.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from bench.rates import GPUS, H200, Rates
from vmf_kernels.backends.triton.passes import splits_of
from vmf_kernels.backends.triton.tiles import Tile, tile_of

PAGE = Path(__file__).with_name("ROOFLINE.md")
COMPILED = Path(__file__).parent / "results" / "compiled"
TRITON_REPORT = COMPILED / "triton_3.6.0" / "sm_90.json"  # the version that comes with the torch of the GPUs at hand
CUDA_REPORT = COMPILED / "sm_90.json"
TARGET = H200.target  # of the tiles and the splits; both parts have as many multiprocessors
PROTOTYPES, DIM = 65_536, 256
WORKLOADS = {"640/128": (640, 128), "1280/256": (1280, 256), "3771/3771": (3771, 3771), "16384/16384": (16384, 16384)}
VIEWS = 2  # of the teacher, that a student row looks at
CUDA_TILE = Tile(128, 64, warps=8)  # csrc/cuda/tile.cuh at D = 256; the warps that form products
CUDA_KERNELS = {
    "rows, values are the keys": "assign_rows<(Element)0, 256, (Values)1, 1>",
    "rows, own values": "assign_rows<(Element)0, 256, (Values)2, 1>",
    "columns": "gather_columns<(Element)0, 256, 1>",
}


class Cost(NamedTuple):
    """The work of one kernel; bytes to device memory and, for blocks that are read again, to L2."""

    kernel: str
    operations: float = 0.0
    exponentials: float = 0.0
    instructions: float = 0.0  # of warps, in the loops with products
    exposed: float = 0.0  # of these, while the warp has no product in flight
    memory: float = 0.0
    l2: float = 0.0
    shared_memory: float = 0.0  # bytes
    fullness: float = 1.0  # share of the multiprocessors' time that has work, by whole waves of whole blocks

    def parts(self, gpu: Rates) -> tuple[float, ...]:
        """Seconds of products, exponentials, all instructions, exposed ones, shared memory, memory, L2; each by itself."""
        return (
            self.operations / gpu.products,
            self.exponentials / gpu.exponentials,
            self.instructions / gpu.instructions,
            self.exposed / gpu.instructions,
            self.shared_memory / gpu.shared_memory,
            self.memory / gpu.copies,
            self.l2 / gpu.l2,
        )

    def in_turns(self, gpu: Rates) -> float:
        """Seconds of a Triton kernel: its warps wait for their products, then for the softmax step, then multiply again.

        In a softmax step the exponentials and the instructions issued share the time: the longer of the two counts. What is
        issued while products run costs nothing.
        """
        products, exponentials, issue, exposed, _, memory, l2 = self.parts(gpu)
        compute = max(products + max(exponentials, exposed), issue)
        return max(compute / self.fullness, memory, l2, gpu.launch)

    def at_once(self, gpu: Rates) -> float:
        """Seconds of a kernel of csrc/cuda, whose softmax runs under products: the slowest resource."""
        *on_chip, _, shared_memory, memory, l2 = self.parts(gpu)
        return max(max(*on_chip, shared_memory) / self.fullness, memory, l2, gpu.launch)


def costs(students: int, teachers: int) -> Iterator[Cost]:
    """Every launch of a forward and backward pass with Triton's kernels, in order."""
    matrix = PROTOTYPES * DIM
    yield Cost("pack_networks", memory=2 * matrix * (4 + 2))
    yield Cost("pack_rows", memory=(students + 2 * teachers) * DIM * (2 + 2))
    teacher_splits, row_pass = _row_pass("teacher", teachers)
    yield row_pass
    yield Cost("merge, teacher", memory=(teacher_splits + 1) * teachers * DIM * 4)
    student_splits, row_pass = _row_pass("student", students)
    yield row_pass
    yield Cost("finish_students", memory=(student_splits + 1 + VIEWS) * students * DIM * 4)
    yield Cost("sum_losses", memory=(students + teachers) * 16)
    yield _column_pass(students, teachers)
    yield Cost("pull_back", memory=3 * matrix * 4)
    for gradient in ("features", "weight", "magnitude"):
        yield Cost(f"scale {gradient}, by 1")


def cuda_costs(students: int, teachers: int) -> Iterator[Cost]:
    """The three passes of csrc/cuda."""
    student, teacher, columns = CUDA_KERNELS
    for name, rows, matrices in ((student, students, 1), (teacher, teachers, 2)):
        blocks, prototype_blocks = -(-rows // CUDA_TILE.rows), PROTOTYPES // CUDA_TILE.prototypes
        (loop,) = cuda_loops(name)
        _, cost = _streamed(name, rows, matrices, CUDA_TILE)
        yield _with_issue(cost, loop, blocks * prototype_blocks, matrices)
    blocks = PROTOTYPES // CUDA_TILE.rows
    cost = _columns(columns, students, teachers, blocks, blocks / _steps(blocks, CUDA_TILE))
    for loop, rows, matrices in zip(cuda_loops(columns), (students, teachers), (1, 2), strict=True):
        cost = _with_issue(cost, loop, blocks * -(-rows // CUDA_TILE.prototypes), matrices)
    yield cost


def table(workload: str, gpu: Rates) -> str:
    """Markdown of one workload with Triton's kernels, microseconds."""
    students, teachers = WORKLOADS[workload]
    lines = [
        f"### {workload} rows on an {gpu.name}",
        "",
        "| kernel | products | exponentials | issue | exposed | memory | L2 | waves full | expected |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    total = 0.0
    for cost in costs(students, teachers):
        products, exponentials, issue, exposed, _, memory, l2 = cost.parts(gpu)
        seconds = cost.in_turns(gpu)
        cells = _cells(products, exponentials, issue, exposed, memory, l2)
        lines.append(f"| {cost.kernel} | {cells} | {cost.fullness:.0%} | {1e6 * seconds:.0f} |")
        total += seconds
    rate = 8 * (students + teachers) * PROTOTYPES * DIM / total / 1e12
    lines.append(f"| **all** | | | | | | | | **{1e6 * total:.0f}** ({rate:.0f} TFLOP/s) |")
    return "\n".join(lines)


def cuda_table(gpu: Rates) -> str:
    """Markdown of the passes of csrc/cuda, microseconds."""
    lines = [
        f"### csrc/cuda on an {gpu.name}",
        "",
        "| rows | pass | products | exponentials | issue | shared memory | memory | L2 | waves full | expected | TFLOP/s |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for workload, (students, teachers) in WORKLOADS.items():
        for cost in cuda_costs(students, teachers):
            products, exponentials, issue, _, shared_memory, memory, l2 = cost.parts(gpu)
            seconds = cost.at_once(gpu)
            cells = _cells(products, exponentials, issue, shared_memory, memory, l2)
            rate = f"{1e6 * seconds:.0f} | {cost.operations / seconds / 1e12:.0f}"
            lines.append(f"| {workload} | {cost.kernel} | {cells} | {cost.fullness:.0%} | {rate} |")
    return "\n".join(lines)


def tables() -> str:
    """Everything between the page's markers."""
    parts = [*(table(workload, gpu) for gpu in GPUS for workload in WORKLOADS), *map(cuda_table, GPUS)]
    return "\n\n".join(parts)


def cuda_loops(name: str) -> list[dict[str, int]]:
    """The loops of a kernel of csrc/cuda, from the committed report."""
    kernels = json.loads(CUDA_REPORT.read_text())["cuda"]["kernels"]
    found: list[dict[str, int]] = next(row["loops"] for row in kernels if row["kernel"] == CUDA_KERNELS[name])
    return found


def triton_loops(name: str, tile: Tile) -> list[dict[str, int]]:
    """The loops of a pass with this tile, from the committed report: of its launches the longest.

    Raises:
        LookupError: the report has no such kernel.
    """
    kernel, mode, count = {
        "student": ("assign_rows_kernel", "keys", 1),
        "teacher": ("assign_rows_kernel", "own", 1),
        "columns": ("gather_columns_kernel", "", 2),
    }[name]
    wanted: dict[str, Any] = {"kernel": kernel, "mode": mode, "dim": DIM, "dtype": "bfloat16"}
    wanted |= {"tile": f"{tile.rows} x {tile.prototypes}", "num_warps": tile.warps, "num_stages": tile.stages}
    rows = [row for row in json.loads(TRITON_REPORT.read_text())["kernels"] if wanted.items() <= row.items()]
    found: list[list[dict[str, int]]] = [row["loops"] for row in rows if len(row["loops"]) == count]
    if not found:
        raise LookupError(f"{TRITON_REPORT.name} has no {name} pass with {tile}; run python -m bench.compile_report")
    return max(found, key=lambda loops: sum(loop["instructions"] for loop in loops))


def _row_pass(name: str, rows: int) -> tuple[int, Cost]:
    """Splits, and the cost of Triton's row pass."""
    tile = tile_of(name, TARGET, "16-bit", DIM, rows)
    splits, cost = _streamed(name, rows, {"student": 1, "teacher": 2}[name], tile)
    (loop,) = triton_loops(name, tile)
    turns = tile.warps * -(-rows // tile.rows) * (PROTOTYPES // tile.prototypes)
    kernel = f"assign_rows, {name}, {splits} splits"
    return splits, cost._replace(
        kernel=kernel, instructions=float(turns * loop["instructions"]), exposed=float(turns * loop["exposed"])
    )


def _streamed(name: str, rows: int, matrices: int, tile: Tile) -> tuple[int, Cost]:
    """Splits, and the cost of a row pass that reads this many matrices of prototypes, but for its instructions."""
    blocks, prototype_blocks = -(-rows // tile.rows), PROTOTYPES // tile.prototypes
    splits, _ = splits_of(blocks * tile.rows, PROTOTYPES, tile, TARGET.multiprocessors, DIM)
    matrix = matrices * PROTOTYPES * DIM * 2
    return splits, Cost(
        name,
        operations=4.0 * rows * PROTOTYPES * DIM,
        exponentials=float(rows * PROTOTYPES),
        memory=matrix + splits * rows * DIM * 4,
        l2=blocks * matrix,
        fullness=blocks * prototype_blocks / _steps(blocks * splits, tile) / -(-prototype_blocks // splits),
    )


def _column_pass(students: int, teachers: int) -> Cost:
    tile = tile_of("columns", TARGET, "16-bit", DIM)
    blocks = PROTOTYPES // tile.prototypes
    cost = _columns("gather_columns", students, teachers, blocks, blocks / _steps(blocks, tile))
    for loop, rows in zip(triton_loops("columns", tile), (students, teachers), strict=True):
        turns = tile.warps * blocks * -(-rows // tile.rows)
        cost = cost._replace(
            instructions=cost.instructions + turns * loop["instructions"],
            exposed=cost.exposed + turns * loop["exposed"],
        )
    return cost


def _columns(name: str, students: int, teachers: int, blocks: int, fullness: float) -> Cost:
    """A column pass, without its instructions."""
    return Cost(
        name,
        operations=4.0 * (students + teachers) * PROTOTYPES * DIM,
        exponentials=float((students + teachers) * PROTOTYPES),
        memory=PROTOTYPES * DIM * (2 + 2 + 4),
        l2=blocks * (students + 2 * teachers) * DIM * 2,
        fullness=fullness,
    )


def _with_issue(cost: Cost, loop: dict[str, int], tiles: int, matrices: int) -> Cost:
    """With the instructions of so many tiles of csrc/cuda, and what they move in shared memory.

    What the loop may jump over, the rescaling, it jumps over nearly always. Each group of 64 queries reads queries and keys for
    the logits and values for the sums; copies write keys, and values where they are another matrix.
    """
    groups, panel = CUDA_TILE.rows // 64, CUDA_TILE.prototypes * DIM * 2
    moved = groups * (64 * DIM * 2 + 2 * panel) + matrices * panel
    return cost._replace(
        instructions=cost.instructions + tiles * CUDA_TILE.warps * (loop["instructions"] - loop["skippable"]),
        shared_memory=cost.shared_memory + tiles * moved,
    )


def _steps(programs: int, tile: Tile) -> int:
    """How many programs would run in the same time if every multiprocessor were always busy."""
    at_once = TARGET.multiprocessors * (2 if tile.warps == 4 else 1)
    return at_once * -(-programs // at_once)


def _cells(*seconds: float) -> str:
    """Cells in microseconds; empty if there is no value."""
    return " | ".join(f"{1e6 * each:.0f}" if each else "" for each in seconds)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.roofline", description=__doc__)
    parser.add_argument("--write", action="store_true", help="put the tables into ROOFLINE.md")
    if not parser.parse_args(arguments).write:
        print(tables())
        return
    text = PAGE.read_text()
    between = re.compile(r"(?<=<!-- table -->\n).*(?=\n<!-- /table -->)", re.DOTALL)
    PAGE.write_text(between.sub(lambda _: tables(), text))


if __name__ == "__main__":
    main()
