"""The time each kernel should take, from what it must compute and move; stated before anything was measured.

    python -m bench.roofline

prints the table of ROOFLINE.md for an H200: DINO-vMF under weight norm, fp32 weights, bf16 products, K = 65,536, D = 256.

Legend: S / T student / teacher rows, R rows of either, K prototypes, D embedding dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from vmf_kernels.backends.triton.launch import Target
from vmf_kernels.backends.triton.passes import WORKSPACE_BYTES
from vmf_kernels.backends.triton.tiles import Tile, split_count, tile_of

H200 = Target(90, 132)
PRODUCT_RATE = 790e12  # FLOP/s of cuBLAS in bf16 on random data; the part's peak is 989e12
MEMORY_RATE = 4.3e12  # bytes/s of a device-to-device copy, read and written
L2_RATE = 5.5e12  # bytes/s: an assumption, from public measurements of the same generation
CLOCK = 1.755e9
EXPONENTIALS = 16 * 132 * CLOCK  # a second, on the special-function units
LAUNCH = 2e-6  # seconds from one kernel to the next on the device, at least
PROTOTYPES, DIM = 65_536, 256
WORKLOADS = {"640/128": (640, 128), "1280/256": (1280, 256), "3771/3771": (3771, 3771), "16384/16384": (16384, 16384)}
VIEWS = 2  # of the teacher, that a student row looks at


class Cost(NamedTuple):
    """What one kernel does; bytes to device memory and, where blocks are read again, to L2."""

    kernel: str
    operations: float = 0.0
    exponentials: float = 0.0
    memory: float = 0.0
    l2: float = 0.0
    fullness: float = 1.0  # share of the multiprocessors' time that has work, by whole waves of whole blocks

    @property
    def seconds(self) -> float:
        """The slowest of memory, L2, and products with the exponentials after them: Triton overlaps no two of a program."""
        compute = self.operations / PRODUCT_RATE + self.exponentials / EXPONENTIALS
        return max(compute / self.fullness, self.memory / MEMORY_RATE, self.l2 / L2_RATE, LAUNCH)


def costs(students: int, teachers: int) -> Iterator[Cost]:
    """Every launch of a forward and backward pass, in order."""
    matrix = PROTOTYPES * DIM
    for side in ("student's", "teacher's"):
        yield Cost(f"pack_prototypes, {side}", memory=matrix * (4 + 2))
    yield Cost("pack_rows", memory=(students + 2 * teachers) * DIM * (2 + 2))
    teacher_splits, row_pass = _row_pass("teacher", teachers, 2)
    yield row_pass
    yield Cost("merge, teacher", memory=(teacher_splits + 1) * teachers * DIM * 4)
    student_splits, row_pass = _row_pass("student", students, 1)
    yield row_pass
    yield Cost("finish_students", memory=(student_splits + 1 + VIEWS) * students * DIM * 4)
    yield Cost("sum_losses", memory=(students + teachers) * 16)
    yield _column_pass(students, teachers)
    yield Cost("pull_back", memory=3 * matrix * 4)
    for gradient in ("features", "weight", "magnitude"):
        yield Cost(f"scale {gradient}, by 1")


def table(workload: str) -> str:
    """Markdown of one workload, microseconds."""
    students, teachers = WORKLOADS[workload]
    lines = [
        f"### {workload} rows",
        "",
        "| kernel | products | exponentials | memory | L2 | waves full | expected |",
        "|---|---|---|---|---|---|---|",
    ]
    total = 0.0
    for cost in costs(students, teachers):
        parts = (
            cost.operations / PRODUCT_RATE,
            cost.exponentials / EXPONENTIALS,
            cost.memory / MEMORY_RATE,
            cost.l2 / L2_RATE,
        )
        cells = " | ".join(f"{1e6 * part:.0f}" if part else "" for part in parts)
        total += cost.seconds
        lines.append(f"| {cost.kernel} | {cells} | {cost.fullness:.0%} | {1e6 * cost.seconds:.0f} |")
    rate = 8 * (students + teachers) * PROTOTYPES * DIM / total / 1e12
    lines.append(f"| **all** | | | | | | **{1e6 * total:.0f}** ({rate:.0f} TFLOP/s) |")
    return "\n".join(lines)


def _row_pass(name: str, rows: int, matrices: int) -> tuple[int, Cost]:
    """Splits, and the cost of the row pass that reads this many matrices of prototypes."""
    tile = tile_of(name, H200, "16-bit", DIM, rows)
    blocks, prototype_blocks = -(-rows // tile.rows), PROTOTYPES // tile.prototypes
    most = max(1, WORKSPACE_BYTES // (blocks * tile.rows * DIM * 4))
    splits = split_count(blocks, prototype_blocks, H200.multiprocessors, most)
    matrix = matrices * PROTOTYPES * DIM * 2
    return splits, Cost(
        f"assign_rows, {name}, {splits} splits",
        operations=4.0 * rows * PROTOTYPES * DIM,
        exponentials=float(rows * PROTOTYPES),
        memory=matrix + splits * rows * DIM * 4,
        l2=blocks * matrix,
        fullness=blocks * prototype_blocks / _steps(blocks * splits, tile) / -(-prototype_blocks // splits),
    )


def _column_pass(students: int, teachers: int) -> Cost:
    tile = tile_of("columns", H200, "16-bit", DIM)
    blocks = PROTOTYPES // tile.prototypes
    return Cost(
        "gather_columns",
        operations=4.0 * (students + teachers) * PROTOTYPES * DIM,
        exponentials=float((students + teachers) * PROTOTYPES),
        memory=PROTOTYPES * DIM * (2 + 2 + 4),
        l2=blocks * (students + 2 * teachers) * DIM * 2,
        fullness=blocks / _steps(blocks, tile),
    )


def _steps(programs: int, tile: Tile) -> int:
    """Programs that would run in the time of these, were every multiprocessor always busy."""
    at_once = H200.multiprocessors * (2 if tile.warps == 4 else 1)
    return at_once * -(-programs // at_once)


if __name__ == "__main__":
    print("\n\n".join(table(workload) for workload in WORKLOADS))
