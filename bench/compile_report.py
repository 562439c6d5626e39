"""The compiler's report on every shipped kernel, without a GPU.

    python -m bench.compile_report --arch 90 --json bench/results/compiled/sm_90.json
    python -m bench.compile_report --arch 90 --kernels cuda --json ...    only those of csrc/cuda, the others' report is kept

Each row has a digest of its sources (``bench.launch_digest``). Only launches whose digest the file lacks are compiled;
``--all`` compiles all of them.

A report names its version of Triton. Triton 3.6.0, which comes with torch 2.11, has separate reports:

    python -m venv other && sed 's/^triton==.*/triton==3.6.0/' constraints.txt > other/constraints.txt
    other/bin/pip install -c other/constraints.txt torch triton numpy setuptools
    other/bin/python -m bench.compile_report --arch 90 --kernels triton --json bench/results/compiled/triton_3.6.0/sm_90.json

It runs the operator on untouched CPU tensors at K = 65,536 for every embedding dim and precision of the tile table, records
each launch of a Triton kernel, and compiles the distinct ones as the launch would. The report has registers, spills, shared
memory against the GPU's limit, tensor-core instructions, and the instructions of the loops that contain them. If there is nvcc,
csrc/cuda is compiled too (``bench.cuda.report``). Exit code 1: a kernel spills, does not fit, or misses its tensor cores.

Legend: S / T student / teacher rows, K prototypes, D embedding dim.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch

import bench.cuda.report as cuda
from bench.ahead_of_time import SHARED_MEMORY, TENSOR_MEMORY, Compiled, Launch, compile_launch, recording
from bench.cuda.toolchain import MissingToolError
from bench.launch_digest import digest_of
from bench.machine_code import Loop
from bench.pass_case import DTYPES, MANY_ROWS, PROTOTYPES, PassCase
from vmf_kernels.backends.contract import LossInputs, RowInputs
from vmf_kernels.backends.prepared import drop_prepared, keep_prepared
from vmf_kernels.backends.triton.launch import Target
from vmf_kernels.backends.triton.prototypes import scale_in_place
from vmf_kernels.backends.triton.tiles import (
    FEW_ROWS,
    NO_TENSOR_CORES,
    PASSES,
    PRECISIONS,
    ROW_PASSES,
    WIDTHS,
    has_tile,
    tile_of,
)
from vmf_kernels.pairing import Pairing
from vmf_kernels.prototypes import Prototypes

AROUND_DIMS = (256, 384)  # that the kernels around the passes are compiled for; they have no tiles to choose
WITH_PRODUCTS = ("assign_rows_kernel", "gather_columns_kernel")
VIEWS = (2, 10)  # of teacher and student in a multi-crop step
COLUMNS = ("dim", "products", "tile", "num_warps", "num_stages", "registers", "spills")
HEAD = "| kernel | D | products | tile | warps | stages | registers | spills | shared KiB | limit | matrix | loads |"


class Configuration(NamedTuple):
    """One embedding dim in one precision."""

    dim: int
    precision: str
    dtype: torch.dtype
    around: bool  # with the kernels around the passes


def configurations(
    dims: Iterable[int] = WIDTHS, precisions: Iterable[str] = PRECISIONS, *, whole: bool = True
) -> Iterator[Configuration]:
    """Everything the table has tiles for; fp16 differs from bf16 in an instruction's name only, and is taken once.

    Not ``whole``: only the passes, and not in fp16.
    """
    for precision, dim in itertools.product(precisions, dims):
        around = whole and dim in AROUND_DIMS and precision == "16-bit"
        yield Configuration(dim, precision, DTYPES[precision], around)
        if whole and (dim, precision) == (256, "16-bit"):
            yield Configuration(dim, precision, torch.float16, around)


def is_served(arch: int, configuration: Configuration) -> bool:
    """Whether the table has the passes there; for wide fp32 some parts have neither the registers nor the shared memory."""
    return all(has_tile(name, Target(arch, 1), configuration.precision, configuration.dim) for name in PASSES)


def shipped_launches(arch: int, configuration: Configuration) -> list[Launch]:
    """The different launches of one configuration."""
    with recording(arch) as launches:
        _passes(arch, configuration)
        if configuration.around:
            for kind in ("linear", "normalized", "weight_norm", "linear_vmf", "weight_norm_vmf"):
                _operator(configuration, kind)
            _stored_logits(configuration)
            scale_in_place(torch.empty(PROTOTYPES, configuration.dim), torch.ones(()))
    different: dict[str, Launch] = {}
    for launch in launches:
        different.setdefault(digest_of(launch), launch)
    return list(different.values())


def report(job: tuple[int, Configuration, Mapping[str, Compiled]]) -> list[dict[str, Any]]:
    """One row for each launch of a configuration; those whose digest is among the known are not compiled again."""
    arch, configuration, known = job
    rows = []
    for launch in shipped_launches(arch, configuration):
        compiled = known.get(digest_of(launch)) or compile_launch(launch, arch)
        rows.append(row_of(launch, configuration, compiled, arch))
    return rows


def known_in(content: Mapping[str, Any]) -> dict[str, Compiled]:
    """What a report says the compiler made, by digest; nothing if another version of Triton compiled it."""
    import triton

    if content.get("triton") != triton.__version__:
        return {}
    names = {field.name for field in fields(Compiled)}
    found = {}
    for row in content["kernels"]:
        if names | {"digest"} <= row.keys():
            values = {name: row[name] for name in names} | {"loops": tuple(Loop(**loop) for loop in row["loops"])}
            found[row["digest"]] = Compiled(**values)
    return found


def faults(rows: Iterable[dict[str, Any]]) -> list[str]:
    """What is wrong with the kernels; a sentence each."""
    found = []
    for row in rows:
        what = f"{row['kernel']} at D = {row['dim']}, {row['products']}"
        if row["spills"]:
            found.append(f"{what} spills {row['spills']} times")
        if row["shared"] > row["limit"]:
            found.append(f"{what} takes {row['shared']} bytes of shared memory; the part has {row['limit']}")
        if row["tensor_memory"] > TENSOR_MEMORY:
            found.append(f"{what} takes {row['tensor_memory']} columns of tensor memory; there are {TENSOR_MEMORY}")
        if row["kernel"] in WITH_PRODUCTS and row["products"] != NO_TENSOR_CORES and not row["matrix"]:
            found.append(f"{what} uses no tensor cores")
    return found


def table(rows: Iterable[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [HEAD, "|" + "---|" * HEAD[1:].count("|")]
    for row in rows:
        loads = f"{row['bulk_copies']} TMA" if row["bulk_copies"] else f"{row['asynchronous_copies']} cp.async"
        columns = [f"{row['kernel']} {row['mode']}".strip(), *(row[name] for name in COLUMNS)]
        columns += [f"{row['shared'] / 1024:.0f}", row["limit"] // 1024, row["matrix"], loads]
        lines.append("| " + " | ".join(str(column) for column in columns) + " |")
    return "\n".join(lines)


def _passes(arch: int, configuration: Configuration) -> None:
    """Every pass of the table, over many rows and over few, by itself."""
    target, (dim, precision, dtype, _) = Target(arch, 1), configuration
    for name in PASSES:
        for rows in (MANY_ROWS, FEW_ROWS) if name in ROW_PASSES else (MANY_ROWS,):
            tile = tile_of(name, target, precision, dim, rows)
            PassCase.of(name, precision, dim, device=torch.device("cpu"), dtype=dtype).run(tile)


def _operator(configuration: Configuration, kind: str) -> None:
    """The whole operator, with a centre and, one to one, with row weights; usage and log-sums without a gradient."""
    from vmf_kernels.backends.triton import operator

    temperature = torch.ones((), dtype=torch.float64)
    for views, images in ((VIEWS, 64), ((1, 1), MANY_ROWS)):
        student, teacher = (
            torch.empty(count * images, configuration.dim, dtype=configuration.dtype) for count in views[::-1]
        )
        weight = Prototypes(
            torch.empty(PROTOTYPES, configuration.dim),
            torch.empty(PROTOTYPES, 1) if kind.startswith("weight_norm") else None,
            kind,
        )
        pairing = Pairing(torch.empty(views), None if images == 64 else torch.empty(images))
        bias = torch.empty(PROTOTYPES) if images == 64 else None
        inputs = LossInputs(student, weight, teacher, weight, bias, pairing, temperature, temperature, True, True)
        operator.cross_entropy(inputs)
        operator.cross_entropy(inputs._replace(feature_gradient=False, prototype_gradient=False))
    rows = RowInputs(student, weight, temperature)
    operator.usage(rows)
    keep_prepared(weight)
    for bias in (None, torch.empty(PROTOTYPES)):  # the second time from the norms that were kept
        operator.row_log_sum_exp(rows._replace(bias=bias))
    drop_prepared(weight)
    operator.column_log_sum_exp(rows, torch.empty(len(student)))


def _stored_logits(configuration: Configuration) -> None:
    """Loss and gradient on stored logits, with biases and without."""
    from vmf_kernels import logit_cross_entropy

    teacher_views, student_views = VIEWS
    student = torch.empty(student_views * 64, PROTOTYPES, dtype=configuration.dtype, requires_grad=True)
    teacher = torch.empty(teacher_views * 64, PROTOTYPES, dtype=configuration.dtype)
    for bias in (None, torch.empty(PROTOTYPES)):
        loss = logit_cross_entropy(
            student, teacher, torch.ones(VIEWS), student_bias=bias, teacher_bias=bias, backend="triton"
        ).loss
        loss.backward()


def row_of(launch: Launch, configuration: Configuration, compiled: Compiled, arch: int) -> dict[str, Any]:
    """What a report says of a launch."""
    return label_of(launch, configuration, arch) | asdict(compiled)


def label_of(launch: Launch, configuration: Configuration, arch: int) -> dict[str, Any]:
    """What is known of a launch before it is compiled."""
    sizes = [launch.arguments.get(name) for name in ("N_ROWS", "N_PROTOTYPES")]
    mode = next((str(launch.arguments[name]) for name in ("VALUES", "COTANGENTS") if name in launch.arguments), "")
    return {
        "kernel": launch.name,
        "mode": mode,
        "dim": configuration.dim,
        "products": configuration.precision,
        "dtype": str(configuration.dtype).removeprefix("torch."),
        "tile": " x ".join(str(size) for size in sizes if size is not None),
        "num_warps": launch.options.get("num_warps", 4),
        "num_stages": launch.options.get("num_stages", 3),
        "limit": SHARED_MEMORY[arch],
        "digest": digest_of(launch),
    }


def triton_section(options: argparse.Namespace, kept: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The report of the Triton kernels that the options ask for, printed, and its faults."""
    import triton

    asked = configurations(options.dims, options.precisions, whole=not options.passes)
    known = {} if options.all else known_in(kept)
    jobs = []
    for configuration in asked:
        if is_served(options.arch, configuration):
            jobs.append((options.arch, configuration, known))
        else:
            print(f"no tiles for D = {configuration.dim} in {configuration.precision} on sm_{options.arch}")
    with ProcessPoolExecutor(options.workers) as pool:
        rows = [row for found in pool.map(report, jobs) for row in found]
    print(table(rows))
    print(f"compiled {sum(row['digest'] not in known for row in rows)} of {len(rows)}; the report had the others")
    return {"triton": triton.__version__, "kernels": rows}, faults(rows)


def cuda_section(options: argparse.Namespace, kept: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The report of the kernels of ``csrc/cuda``, printed, and its faults; without nvcc only that there is none."""
    try:
        found = cuda.section(options.arch, workers=options.workers)
    except MissingToolError as error:
        print(f"csrc/cuda is not compiled: {error}")
        return {"cuda": {"absent": str(error)}}, []
    print(cuda.table(found["kernels"]))
    return {"cuda": found}, cuda.faults(found)


def written(value: Any, indent: str = "") -> str:
    """JSON with a line for each field of a report, and for each element of a list in it: a kernel, a launch."""
    inner = indent + " "
    if isinstance(value, dict) and value:
        fields = ",\n".join(f"{inner}{json.dumps(key)}: {written(field, inner)}" for key, field in value.items())
        return f"{{\n{fields}\n{indent}}}"
    if isinstance(value, list) and value:
        elements = ",\n".join(f"{inner}{json.dumps(element)}" for element in value)
        return f"[\n{elements}\n{indent}]"
    return json.dumps(value)


def _kept(options: argparse.Namespace) -> dict[str, Any]:
    """What the report's file has, if it is of the same part."""
    old: dict[str, Any] = {"arch": options.arch}
    if options.json is not None and options.json.exists():
        old = json.loads(options.json.read_text())
    return old if old["arch"] == options.arch else {"arch": options.arch}


SECTIONS = {"triton": triton_section, "cuda": cuda_section}


def main(arguments: list[str] | None = None) -> int:
    """Print the tables, write the JSON; 1 if a kernel has a fault."""
    parser = argparse.ArgumentParser(prog="python -m bench.compile_report", description=__doc__)
    parser.add_argument(
        "--arch", type=int, choices=sorted(SHARED_MEMORY), required=True, help="compute capability * 10"
    )
    parser.add_argument("--json", type=Path, help="where to write the report; keeps what it has of other --kernels")
    parser.add_argument("--kernels", nargs="+", choices=list(SECTIONS), default=list(SECTIONS), help="which to compile")
    parser.add_argument("--dims", type=int, nargs="+", default=list(WIDTHS), help="embedding dims")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS), help="of the products")
    parser.add_argument("--all", action="store_true", help="compile also those Triton kernels that the report has")
    parser.add_argument("--passes", action="store_true", help="only the passes, without the kernels around them")
    parser.add_argument("--workers", type=int, default=2, help="processes that compile")
    options = parser.parse_args(arguments)
    content, found = _kept(options), list[str]()
    for name in options.kernels:
        section, wrong = SECTIONS[name](options, content)
        content, found = content | section, found + wrong
    count = sum(len(part.get("kernels", [])) for part in (content, content.get("cuda", {})))
    print(
        "\n".join(found)
        or f"{count} kernels for sm_{options.arch}: no spill, all fit, tensor cores where they should be"
    )
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(written(content) + "\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
