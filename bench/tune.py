"""Searches for tile sizes: those that compile without a spill, and among them the fastest.

    python -m bench.tune --arch 90                        no GPU: the best that is expected of what compiles
    python -m bench.tune --seconds 150 --out tiles.json   on a GPU: the fastest of what compiles there
    python -m bench.tune --install tiles.json             puts measured entries into the table of the package

Both write the format of ``vmf_kernels/backends/triton/tiles.json``, where a measured entry says what it was chosen by, and the
others were chosen by what the file says.

Legend: R rows, K prototypes, D embedding dim.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from triton.errors import TritonError

from bench.ahead_of_time import SHARED_MEMORY, TENSOR_MEMORY, Compiled, compile_launch, recording
from bench.pass_case import PassCase, relative_error
from vmf_kernels.backends.triton.tiles import (
    FEW_ROWS,
    MAX_WIDTH_OF_ANY_CHUNKS,
    NO_TENSOR_CORES,
    NOTE,
    PASSES,
    PRECISIONS,
    ROW_PASSES,
    TABLE_PATH,
    WIDTHS,
    Tile,
    family,
    layout_of,
)

# What a thread can spend on sums and scores; the rest are addresses, statistics, and the operands of fp32 products
REGISTERS = {"16-bit": 232, "tf32": 150, "ieee": 110}
ELEMENT_BYTES = {"16-bit": 2, "tf32": 4, "ieee": 4}
TRIES = 24  # candidates compiled for an entry before it is given up: tf32 at D = 768 takes more than 8
MEASURED = 6  # candidates timed for an entry, by expected cost
MEASURED_PAIRS = 4  # and of those that go in pairs
FIRST_WITH_DESCRIPTORS = 90
LARGEST_ERROR = 0.02  # relative, between two tiles in bf16
SIDES = (128, 64, 32, 16)
PARTS = (1, 2, 3, 4, 8)
EXPECTED = "expected cost, the best that compiles without spills; not measured"  # what chose an entry that says nothing


def entry_names() -> list[str]:
    """Names in a table: the passes, and the row passes over few rows."""
    return [*PASSES, *(f"{name} few" for name in ROW_PASSES)]


def candidates(name: str, precision: str, width: int, shared: int) -> list[Tile]:
    """Tiles that should fit registers and shared memory, best first by ``expected_cost``."""
    layout = layout_of(width, precision)
    few, base = name.endswith(" few"), name.removesuffix(" few")
    # below, a smaller dim of the same entry may have a number of chunks that the parts do not divide
    has_parts = base != "scores" and width > MAX_WIDTH_OF_ANY_CHUNKS
    found = []
    for rows, prototypes, warps, stages, parts in itertools.product(SIDES, SIDES, (8, 4), (3, 2, 1), PARTS):
        tile = Tile(rows, prototypes, parts, warps, stages)
        if (few and rows > FEW_ROWS) or (parts > 1 and (layout.chunks % parts or not has_parts)):
            continue
        if (
            _shared_bytes(base, tile, precision, layout.width) <= shared
            and _registers(base, tile, layout.width) <= REGISTERS[precision]
        ):
            found.append(tile)
    return sorted(found, key=lambda tile: expected_cost(base, tile, precision))


def _shared_bytes(name: str, tile: Tile, precision: str, width: int) -> int:
    """Expected shared memory: the block that stays, and the streamed blocks once a stage."""
    stays, streams = (tile.rows, tile.prototypes) if name in ROW_PASSES else (tile.prototypes, tile.rows)
    row_bytes = width * ELEMENT_BYTES[precision]
    shares = tile.parts > 1  # parts of the columns are loaded beside the whole, not taken from it
    streamed = {"student": 1 + shares / tile.parts, "scores": 1.0, "teacher": 1 + 1 / tile.parts}
    return int(row_bytes * (stays + tile.stages * streams * streamed.get(name, 1 + 1 / tile.parts)))


def _registers(name: str, tile: Tile, width: int) -> float:
    """Expected registers a thread needs for fp32 sums and scores."""
    stays, streams = (tile.rows, tile.prototypes) if name in ROW_PASSES else (tile.prototypes, tile.rows)
    sums = 0 if name == "scores" else stays * width / tile.parts
    return (sums + stays * streams) / (32 * tile.warps)


def expected_cost(name: str, tile: Tile, precision: str) -> float:
    """Expected relative time of a tile; it guides the search if nothing can be measured.

    The block that stays (rows in a row pass, prototypes in a column pass) decides how often the streamed matrix is read; the
    block that streams, how many products amortise an online-softmax step and a barrier; parts repeat the logits.
    """
    stays, streams = (tile.rows, tile.prototypes) if name in ROW_PASSES else (tile.prototypes, tile.rows)
    products = (1 + tile.parts) / 2
    # without a pipeline the streamed block waits in registers, where one of fp32 leaves no room for sums
    alone = 3.0 if precision == "tf32" else 1.35
    pipeline = {1: alone, 2: 1.0, 3: 0.97}[tile.stages]
    # one warpgroup of four warps for every 64 rows that stay is what the tensor cores take at once
    occupancy = 1.0 if tile.warps * 16 == stays else 1.08
    return products * (1 + 24 / stays) * (1 + 12 / streams) * pipeline * occupancy


def compiled(name: str, precision: str, width: int, tile: Tile, arch: int) -> Compiled:
    """The compiler's figures for a pass with this tile."""
    case = PassCase.of(name, precision, width, device=torch.device("cpu"))
    with recording(arch) as launches:
        case.run(tile)
    (recorded,) = launches
    return compile_launch(recorded, arch)


def is_clean(report: Compiled, precision: str, arch: int) -> bool:
    """No spill, within the shared and the tensor memory, on tensor cores (which IEEE products have not)."""
    matrix = report.matrix > 0 or precision == NO_TENSOR_CORES
    fits = report.shared <= SHARED_MEMORY[arch] and report.tensor_memory <= TENSOR_MEMORY
    return report.spills == 0 and fits and matrix


def clean_candidates(name: str, precision: str, width: int, arch: int) -> Iterator[Tile]:
    """Candidates that compile cleanly, best expected first."""
    for tile in candidates(name, precision, width, SHARED_MEMORY[arch])[:TRIES]:
        try:
            report = compiled(name, precision, width, tile, arch)
        except (TritonError, RuntimeError, ValueError) as error:  # refused by Triton, or by a pass of its compiler
            print(f"{name} {precision} {width} {tile}: {type(error).__name__}", file=sys.stderr)
            continue
        if is_clean(report, precision, arch):
            yield tile


def expected_entry(job: tuple[str, str, int, int]) -> dict[str, Any] | None:
    """The table's entry for a pass without a GPU, or None if no candidate is clean."""
    tile = next(clean_candidates(*job), None)
    return None if tile is None else asdict(tile)


def expected_table(arch: int, workers: int, path: Path) -> None:
    """Write the part of the table for one architecture, entry by entry; entries that the file already has are kept."""
    known = json.loads(path.read_text())["tiles"].get(family(arch), {}) if path.exists() else {}
    jobs = [
        (name, precision, width, arch)
        for precision in PRECISIONS
        for width in WIDTHS
        for name in entry_names()
        if name not in known.get(precision, {}).get(str(width), {})
    ]
    with ProcessPoolExecutor(workers) as pool:
        for job, entry in zip(jobs, pool.map(expected_entry, jobs), strict=True):
            name, precision, width, _ = job
            print(*job, entry, file=sys.stderr, flush=True)
            if entry is not None:
                write({family(arch): {precision: {str(width): {name: entry}}}}, path)


def measured_table(seconds: float, widths: tuple[int, ...], path: Path) -> None:
    """Write the fastest tiles on this GPU in 16-bit precision, entry by entry while the time lasts; see ``measured_entry``."""
    device = torch.device("cuda")
    major, minor = torch.cuda.get_device_capability()
    arch, until = 10 * major + minor, time.monotonic() + seconds
    for width in widths:  # the largest workloads first
        for name in entry_names():
            if time.monotonic() > until:
                return
            times = measured_times(name, width, arch, device)
            print(arch, name, width, times, flush=True)
            if not times:
                continue
            entry = measured_entry(name, width, times)
            write({family(arch): {"16-bit": {str(width): {name: entry}}}}, path)


def measured_candidates(name: str, width: int, arch: int) -> list[Tile]:
    """Tiles worth timing: the best by ``expected_cost``, the best of those that go in pairs, both also through descriptors."""
    shared = SHARED_MEMORY[int(family(arch))]
    fitting = candidates(name, "16-bit", width, shared)
    # Two programs on one multiprocessor overlap the softmax of one with the products of the other, which Triton cannot do
    # within a program; their blocks are smaller, which ``expected_cost`` counts against them, so only a clock can decide.
    pairs = [tile for tile in fitting if goes_in_pairs(name, tile, width, shared)]
    plain = list(dict.fromkeys([*fitting[:MEASURED], *pairs[:MEASURED_PAIRS]]))
    described = [*fitting[: MEASURED // 2], *pairs[: MEASURED_PAIRS // 2]] if arch >= FIRST_WITH_DESCRIPTORS else []
    return plain + [replace(tile, tma=True) for tile in dict.fromkeys(described)]


def goes_in_pairs(name: str, tile: Tile, width: int, shared: int) -> bool:
    """Whether two 16-bit programs fit on a multiprocessor, each with the 1 KiB that the system keeps; 255 registers do."""
    return tile.warps == 4 and _shared_bytes(name.removesuffix(" few"), tile, "16-bit", width) <= shared // 2 - 1024


def measured_times(name: str, width: int, arch: int, device: torch.device) -> dict[Tile, float]:
    """Milliseconds of each candidate that runs on the device and computes what the first one does."""
    case, times = PassCase.of(name, "16-bit", width, device=device), {}
    expected = None
    for tile in measured_candidates(name, width, arch):
        try:
            got = case.results(tile)
            expected = got if expected is None else expected
            error = relative_error(got, expected)
            if not error <= LARGEST_ERROR:
                print(f"{name} {width} {tile}: differs by {error:.1e} from the first tile", file=sys.stderr)
                continue
            times[tile] = case.median_ms(tile)
        except (TritonError, RuntimeError) as error:  # a tile that does not fit is no candidate
            print(f"{name} {width} {tile}: {type(error).__name__}", file=sys.stderr)
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # raises where the device no longer answers
    return times


def measured_entry(name: str, width: int, times: Mapping[Tile, float]) -> dict[str, Any]:
    """The fastest of the timed tiles."""
    best = min(times, key=lambda tile: times[tile])
    operations = PassCase.of(name, "16-bit", width, device=torch.device("cpu")).operations
    rate = operations / times[best] / 1e9
    note = f"measured: {times[best]:.3f} ms, {rate:.0f} TFLOP/s, best of {len(times)} on {torch.cuda.get_device_name()}"
    return asdict(best) | {NOTE: f"{note}, torch {torch.__version__}"}


def merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """``old`` with the entries of ``new`` over it, nested tables merged."""
    result = dict(old)
    for key, value in new.items():
        nested = isinstance(value, Mapping) and "rows" not in value
        result[key] = merged(result.get(key, {}), value) if nested else value
    return result


def write(table: Mapping[str, Any], path: Path) -> None:
    """Put the entries into a table file, keeping the others it has; one entry a line."""
    old = json.loads(path.read_text())["tiles"] if path.exists() else {}
    text = json.dumps({NOTE: EXPECTED, "tiles": merged(old, table)}, indent=1, sort_keys=True)
    innermost = re.sub(r"\{([^{}]*)\}", lambda found: "{" + " ".join(found[1].split()) + "}", text)
    path.write_text(innermost + "\n")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description=__doc__)
    parser.add_argument("--arch", type=int, choices=sorted(SHARED_MEMORY), help="compile only, for this capability")
    parser.add_argument("--workers", type=int, default=2, help="processes that compile")
    parser.add_argument("--seconds", type=float, default=150.0, help="time to measure for")
    parser.add_argument("--widths", type=int, nargs="+", default=[256, 384, 128], help="embedding dims to measure")
    parser.add_argument("--install", type=Path, help="a table to merge into the package's")
    parser.add_argument("--out", type=Path, default=TABLE_PATH, help="table to write to; keeps its other entries")
    options = parser.parse_args(arguments)
    if options.install is not None:
        write(json.loads(options.install.read_text())["tiles"], TABLE_PATH)
    elif options.arch is not None:
        expected_table(options.arch, options.workers, options.out)
    elif torch.cuda.is_available():
        measured_table(options.seconds, tuple(options.widths), options.out)
    else:
        parser.error("no GPU here to measure on; --arch compiles for one without it")


if __name__ == "__main__":
    main()
