"""Writes the package's table of measured wins from a GPU's result file: where "auto" prefers ``csrc/cuda`` to Triton.

    python -m bench.gpu.wins bench/results/<name of the GPU>/head.json

Writes every workload in which both backends were measured side by side into ``vmf_kernels/backends/cuda/measured.json``, also
those that were lost: what decides is in ``vmf_kernels/backends/cuda/measured.py``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bench.gpu.losses import BESIDE, OURS
from bench.gpu.settings import ROOT
from bench.gpu.tables import workloads
from vmf_kernels.backends.cuda.layouts import MAX_DIM, width_of
from vmf_kernels.backends.cuda.measured import TABLE_PATH, Measurement

ELEMENT = "bf16"  # of the features of every workload
TESTS_OF_CUDA = "tests cuda"  # the stage of its tests
CUDA, TRITON = "cuda", "triton"


class UntrustworthyError(ValueError):
    """The results cannot be used for the table; the text says which and why."""


def measured_table(data: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The content of ``measured.json``.

    Args:
        data: a GPU's ``head.json``.
        source: where it lies, below the repository's root.

    Raises:
        UntrustworthyError: it is of a dry run or of changed sources, a test of the CUDA backend failed or all were skipped, a
            result was wrong, or nothing was measured side by side.
    """
    refuse_unfit(data)
    arch = str(round(10 * float(data["environment"]["device"]["compute_capability"])))
    by_width: dict[str, list[dict[str, Any]]] = {}
    for width, found in side_by_side(data, source):
        by_width.setdefault(str(width), []).append(found._asdict())
    if not by_width:
        raise UntrustworthyError(f"{source} has no workload in which both {CUDA} and {TRITON} were timed")
    ordered = {width: sorted(found, key=lambda one: one["rows"]) for width, found in by_width.items()}
    return {arch: {ELEMENT: ordered}}


def refuse_unfit(data: Mapping[str, Any]) -> None:
    """Raise UntrustworthyError unless the run was real, of committed sources, and the CUDA backend's tests ran and passed."""
    if data["dry_run"]:
        raise UntrustworthyError("these are results of a dry run; expected those of a GPU")
    if data["environment"]["uncommitted_changes"]:
        raise UntrustworthyError("these results are of sources with uncommitted changes; expected those of a commit")
    tests = data["stages"].get(TESTS_OF_CUDA, {})
    if not tests.get("tests"):
        raise UntrustworthyError("no test of the backend was run to its end")
    if tests["tests"] <= tests["skipped"]:
        raise UntrustworthyError(f"all {tests['tests']} tests of the backend were skipped; expected some that ran")
    if tests.get("not_run"):
        raise UntrustworthyError(f"{tests['not_run']} of {tests['selected']} tests of the backend were not reached")
    if tests["failed"]:
        raise UntrustworthyError(f"tests of the backend failed: {', '.join(tests['failed'])}")


def side_by_side(data: Mapping[str, Any], source: str) -> Iterator[tuple[int, Measurement]]:
    """(padded width, both backends' times) of each workload that has them."""
    for workload in workloads(data):
        variants = {data["backend"]: OURS, BESIDE.get(data["backend"], ""): BESIDE.get(data["backend"], "")}
        found = {backend: workload["variants"].get(name, {}) for backend, name in variants.items()}
        pair = [found.get(backend, {}) for backend in (CUDA, TRITON)]
        wrong = [one["disagreement"] for one in pair if one.get("disagreement")]
        if wrong:
            raise UntrustworthyError(f"{workload['name']}: a result is wrong, {wrong[0]}")
        times = [one.get("step_ms", {}).get("median") for one in pair]
        if None not in times and workload["dim"] <= MAX_DIM:
            sizes = workload["student_rows"], workload["prototypes"]
            yield width_of(workload["dim"]), Measurement(*sizes, times[0], times[1], source)


def write(path: Path, results: Path) -> dict[str, Any]:
    """Put the results into a table file, which keeps other parts, dtypes and widths; the new table."""
    source = results.resolve()
    name = str(source.relative_to(ROOT)) if source.is_relative_to(ROOT) else str(results)
    table: dict[str, Any] = json.loads(path.read_text())["measured"] if path.exists() else {}
    for arch, elements in measured_table(json.loads(results.read_text()), name).items():
        for element, widths in elements.items():
            table.setdefault(arch, {}).setdefault(element, {}).update(widths)
    path.write_text(json.dumps({"measured": table}, indent=1, sort_keys=True) + "\n")
    return table


def main(arguments: list[str] | None = None) -> None:
    """Write the table and say what is in it."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.wins", description=__doc__)
    parser.add_argument("results", type=Path, help="a GPU's head.json")
    parser.add_argument("--out", type=Path, default=TABLE_PATH, help="table to write to; keeps its other entries")
    options = parser.parse_args(arguments)
    for arch, elements in write(options.out, options.results).items():
        for element, widths in elements.items():
            for width, found in widths.items():
                won = [f"{one['rows']} rows {one['triton_ms'] / one['cuda_ms']:.2f}x" for one in found]
                print(f"sm_{arch} {element} D {width}: {', '.join(won)} of {CUDA} over {TRITON}")


if __name__ == "__main__":
    main()
