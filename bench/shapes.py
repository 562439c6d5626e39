"""Times our loss over many shapes against the best of three without this library, forward and backward, on a CPU.

    python -m bench.shapes --json bench/results/cpu/shapes.json       all shapes, fp32 and bf16; most of the time is compilation
    python -m bench.shapes --quick --dtype fp32 --threads 1 2         under four minutes
    python -m bench.report bench/results/cpu/shapes.json              the table

The three: the published loss, eager; the same with one log-softmax a row; the published loss under ``torch.compile``. Rounds
are interleaved, so that all meet the same clock and the same neighbours. A row of a table is a shape of ``SHAPES``.

Legend: V / G student / teacher views, B images, K prototypes, D bottleneck dim.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vmf_bench.inputs import HeadInputs, HeadShape, matched_shape
from vmf_bench.machine import machine
from vmf_bench.ours import ours
from vmf_bench.peers.peer import Loss, products
from vmf_bench.peers.stored import logits_and_targets, one_log_softmax, published
from vmf_bench.published import TEACHER_CROPS
from vmf_bench.roof import operations_of
from vmf_bench.timing import Step, training_step
from vmf_kernels.backends.native.module import has_bf16_products

OURS = ("auto", "native", "streaming")
SECONDS_A_SHAPE = 1.0  # of rounds, after the warm-up
LEAST_ROUNDS, MOST_ROUNDS = 3, 60
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MM_SIZE = 2048


class Case(NamedTuple):
    """A shape, and whether the quick table has it."""

    shape: HeadShape
    quick: bool = False

    @property
    def pairing(self) -> str:
        """How rows are paired."""
        if self.shape.matched:
            return "matched"
        return "one image" if self.shape.teacher_views > TEACHER_CROPS else "multi-crop"


def crops(images: int, prototypes: int, dim: int, views: int = 10) -> HeadShape:
    """``views`` student crops and two teacher crops of each image."""
    return HeadShape(images, TEACHER_CROPS, views, prototypes, dim)


def one_image(views: int, prototypes: int, dim: int) -> HeadShape:
    """One image with so many views of each network."""
    return HeadShape(1, views, views, prototypes, dim)


# 12 rows are 10 student and 2 teacher rows, 252 are 210 and 42, as in the table of the issue that asked for these
SHAPES = (
    Case(crops(1, 1024, 64), quick=True),
    Case(crops(1, 1024, 256)),
    Case(crops(1, 1024, 768), quick=True),
    Case(crops(1, 8192, 64)),
    Case(crops(1, 8192, 256), quick=True),
    Case(crops(1, 65_536, 64), quick=True),
    Case(crops(4, 4096, 256)),
    Case(crops(21, 1024, 768)),
    Case(crops(21, 8192, 256), quick=True),
    Case(crops(21, 8192, 768)),
    Case(crops(21, 65_536, 256)),
    Case(crops(64, 65_536, 256)),
    Case(crops(16, 65_536, 256), quick=True),
    Case(crops(16, 131_072, 256)),
    Case(crops(341, 1024, 64)),
    Case(matched_shape(16, prototypes=1024, dim=64), quick=True),
    Case(matched_shape(16, prototypes=65_536, dim=64), quick=True),
    Case(matched_shape(128, prototypes=8192, dim=256)),
    Case(matched_shape(512, prototypes=1024, dim=768)),
    Case(matched_shape(512, prototypes=8192, dim=768), quick=True),
    Case(matched_shape(1024, prototypes=1024, dim=256), quick=True),
    Case(matched_shape(1024, prototypes=1024, dim=768)),
    Case(matched_shape(2048, prototypes=4096, dim=256)),
    Case(one_image(100, 65_536, 64), quick=True),
    Case(one_image(100, 65_536, 256)),
    Case(one_image(100, 65_536, 768)),
    Case(one_image(400, 1024, 64), quick=True),
    Case(one_image(400, 8192, 64), quick=True),
)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.shapes", description=__doc__)
    parser.add_argument("--dtype", choices=[*DTYPES, "both"], default="both", help="of the features and the products")
    parser.add_argument("--threads", type=int, nargs="+", default=[torch.get_num_threads()])
    parser.add_argument("--quick", action="store_true", help="fewer shapes")
    parser.add_argument("--only", default="", help="shapes whose title has this in it")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    options = parser.parse_args(arguments)
    names = list(DTYPES) if options.dtype == "both" else [options.dtype]
    if not has_bf16_products() and options.dtype == "both":
        print("without bf16: this CPU has no instructions for it, and the rivals would take minutes for each row")
        names.remove("bf16")
    rows: list[dict[str, Any]] = []
    report = {"kind": "shapes", "machine": machine(), "rows": rows}
    for name in names:
        for case in SHAPES:
            if (options.quick and not case.quick) or options.only not in title_of(case):
                continue
            for row in rows_of(case, name, options.threads, compiles=not options.no_compile):
                rows.append(row)
                print(line_of(row), flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


def title_of(case: Case) -> str:
    """For example "multi-crop 10/2 K1024 D64"."""
    return f"{case.pairing} {case.shape.name}"


def rows_of(case: Case, dtype: str, threads: Sequence[int], *, compiles: bool) -> Iterator[dict[str, Any]]:
    """One result for each number of threads."""
    inputs = HeadInputs.of(case.shape, device=torch.device("cpu"), dtype=DTYPES[dtype])
    for count in threads:
        torch.set_num_threads(count)
        torch.compiler.reset()
        times = interleaved(steps_of(inputs, compiles=compiles))
        yield {
            "pairing": case.pairing,
            "rows": f"{case.shape.student_rows}/{case.shape.teacher_rows}",
            "prototypes": case.shape.prototypes,
            "dim": case.shape.dim,
            "dtype": dtype,
            "threads": count,
            "mm_gflops": mm_gflops(DTYPES[dtype]),
            "least_operations": operations_of(case.shape),
            "seconds": times,
        }


def mm_gflops(dtype: torch.dtype) -> float:
    """Rate of torch.mm of a large product, now."""
    square = torch.randn(MM_SIZE, MM_SIZE).to(dtype)
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        square @ square
        seconds.append(time.perf_counter() - start)
    return round(2e-9 * MM_SIZE**3 / min(seconds), 1)


def steps_of(inputs: HeadInputs, *, compiles: bool) -> dict[str, Step]:
    """Every contestant's forward and backward pass, by name."""
    losses: dict[str, Loss] = {name: ours(name) for name in OURS}
    losses |= {"published": published_loss, "one_softmax": one_log_softmax}
    if compiles:
        losses["compiled"] = torch.compile(published_loss, dynamic=False)
    return {name: training_step(loss, inputs) for name, loss in losses.items()}


def published_loss(inputs: HeadInputs) -> Tensor:
    """[] the published loss; one image of many views has one log-softmax a row, since nobody loops over ten thousand pairs."""
    if inputs.shape.teacher_views <= TEACHER_CROPS:
        return published(inputs)
    with products(inputs):
        student, targets = logits_and_targets(inputs)
        return -(inputs.pair_weights * (targets @ student.log_softmax(dim=-1).T)).sum()


def interleaved(steps: dict[str, Step]) -> dict[str, list[float]]:
    """Seconds of every round by name, after one that is not kept.

    Each round has an order of its own: a small call that follows one of its kind finds its code in the cache.
    """
    for step in steps.values():
        step()
    order = random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    started = time.perf_counter()
    for done in range(MOST_ROUNDS):
        if done >= LEAST_ROUNDS and time.perf_counter() - started > SECONDS_A_SHAPE:
            break
        for name, step in order.sample(list(steps.items()), len(steps)):
            start = time.perf_counter()
            step()
            seconds[name].append(round(time.perf_counter() - start, 7))
    return seconds


def line_of(row: dict[str, Any]) -> str:
    """A result as a line of text: medians in ms, and ours over the best."""
    ms = {name: f"{1e3 * statistics.median(times):.2f}" for name, times in row["seconds"].items()}
    what = f"{row['dtype']} x{row['threads']} {row['pairing']} {row['rows']} K{row['prototypes']} D{row['dim']}"
    each = "  ".join(f"{name} {time}" for name, time in ms.items())
    return f"{what}: {each} | over the best {over_the_best(row):.2f}x, products alone {bound_ms(row):.2f}"


def over_the_best(row: dict[str, Any]) -> float:
    """The best median of the others over that of ours, as "auto" takes it: above 1 ours is faster."""
    medians: dict[str, float] = {name: statistics.median(times) for name, times in row["seconds"].items()}
    return min(seconds for name, seconds in medians.items() if name not in OURS) / medians["auto"]


def bound_ms(row: dict[str, Any]) -> float:
    """What the products alone take at torch.mm's rate in the same run, of the same dtype."""
    return float(row["least_operations"]) / float(row["mm_gflops"]) / 1e6


if __name__ == "__main__":
    main()
