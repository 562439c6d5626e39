"""nvcc's figures for ``csrc/cuda`` on one GPU architecture, and their faults: the section "cuda" of a compile report.

Every ``.cu`` file is compiled as the package's build does; the streaming passes' launches are recorded with their shared
memory, so that what is checked is what would be launched.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.ahead_of_time import SHARED_MEMORY
from bench.cuda.launches import NOT_SUPPORTED, SUCCESS, Case, Launch, recorded_cases
from bench.cuda.toolchain import FLAGS, Built, Kernel, build, nvcc_version

SOURCES = Path(__file__).parents[2] / "csrc" / "cuda"
STREAMING = ("rows", "columns")  # the files of the passes, behind stream.h
STREAMING_ARCH = 90  # the one that they have code for
REGISTER_FILE = 65_536  # registers of a multiprocessor
REGISTER_UNIT = 8  # a thread's registers come in so many
WARPGROUP = 128  # threads
# a token: numbers first, whose separators are no quotes; comments are dropped
TOKEN = re.compile(
    r"(?P<comment>//[^\n]*|/\*.*?\*/)|\d[\w.']*|\"(?:\\.|[^\"\\])*\"|'(?:\\.|[^'\\])*'|\w+|[^\w\s]", re.DOTALL
)
HEAD = (
    "| kernel | source | registers | set to | threads | spills | static + dynamic shared KiB | limit | matrix | TMA "
    "| cluster | launched by |"
)


def section(arch: int, sources: Path = SOURCES, workers: int = 2) -> dict[str, Any]:
    """The report of every ``.cu`` file in a folder, for ``arch`` (compute capability times 10).

    Raises:
        FileNotFoundError: the folder has no such file.
        MissingToolError: there is no nvcc.
        RuntimeError: a file does not compile, or the launchers do not link with the recording.
    """
    version, files = nvcc_version(), sorted(sources.glob("*.cu"))
    if not files:
        raise FileNotFoundError(f"{sources} has no .cu file; expected the kernels of csrc/cuda")
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(workers) as pool:
        folder = Path(name)
        built = list(pool.map(lambda source: build(source, arch, folder), files))
        launchers = [each.object for each in built if each.source.stem in STREAMING]
        cases = recorded_cases(launchers, sources, arch, folder) if launchers else []
    return {
        "nvcc": version,
        "source": source_digest(sources),
        "kernels": [row for each in built for row in _rows(each, cases, arch)],
        "problems": list(_problems(cases, [kernel for each in built for kernel in each.kernels], arch)),
    }


def faults(report: Mapping[str, Any]) -> list[str]:
    """What is wrong with the kernels and with their launches; a sentence each."""
    return [*(fault for row in report["kernels"] for fault in _row_faults(row)), *report["problems"]]


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Markdown."""
    lines = [HEAD, "|" + "---|" * HEAD[1:].count("|")]
    for row in rows:
        cells = [f"`{row['kernel']}`", row["source"], row["registers"]]
        cells.append(" / ".join(str(number) for number in [*row["given_back"], *row["taken"]]))
        cells += ["" if row["threads"] is None else row["threads"], row["spills"]]
        cells.append(f"{row['static_shared'] / 1024:.1f} + {row['dynamic_shared'] / 1024:.1f}")
        cells += [
            row["limit"] // 1024,
            row["matrix"],
            row["bulk_copies"],
            row["cluster"],
            len(row["launched_by"]) or "",
        ]
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(lines)


def source_digest(sources: Path = SOURCES) -> str:
    """Of the device code, its launchers and the compiler's flags; comments and formatting do not count."""
    digest = hashlib.sha256(" ".join(FLAGS).encode())
    for path in sorted(path for path in sources.glob("*") if path.suffix in (".cu", ".cuh", ".h")):
        tokens = [token[0] for token in TOKEN.finditer(path.read_text()) if token["comment"] is None]
        digest.update(f"{path.name} {' '.join(tokens)}".encode())
    return digest.hexdigest()


def _rows(built: Built, cases: Iterable[Case], arch: int) -> Iterator[dict[str, Any]]:
    """One for each kernel of a file."""
    by_kernel: dict[str, list[tuple[str, Launch]]] = {}
    for case in cases:
        for launch in case.launches:
            by_kernel.setdefault(launch.kernel, []).append((case.name, launch))
    for kernel in built.kernels:
        launched = by_kernel.get(kernel.symbol, [])
        threads = [launch.threads for _, launch in launched]
        yield {
            "kernel": kernel.name,
            "source": built.source.name,
            "registers": kernel.registers,
            "given_back": sorted(set(kernel.given_back)),
            "taken": sorted(set(kernel.taken)),
            "threads": max(threads, default=kernel.most_threads),
            "most_threads": kernel.most_threads,
            "spills": kernel.spills,
            "static_shared": kernel.static_shared,
            "dynamic_shared": max((launch.dynamic_shared for _, launch in launched), default=0),
            "unasked_shared": max((launch.dynamic_shared - launch.allowed_shared for _, launch in launched), default=0),
            "limit": SHARED_MEMORY[arch],
            "matrix": kernel.matrix,
            "bulk_copies": kernel.bulk_copies,
            "multicast_copies": kernel.multicast_copies,
            "cluster": max((launch.cluster for _, launch in launched), default=1),
            "asynchronous_copies": kernel.asynchronous_copies,
            "loops": [asdict(loop) for loop in kernel.loops],
            "remarks": list(kernel.remarks),
            "launched_by": [name for name, _ in launched],
        }


def _row_faults(row: Mapping[str, Any]) -> Iterator[str]:
    what, shared = f"{row['kernel']} in {row['source']}", row["static_shared"] + row["dynamic_shared"]
    if row["spills"]:
        yield f"{what} spills {row['spills']} times"
    if shared > row["limit"]:
        yield f"{what} takes {shared} bytes of shared memory; the part has {row['limit']}"
    if row["unasked_shared"] > 0:
        yield f"{what} is launched with {row['unasked_shared']} bytes more dynamic shared memory than was asked for before"
    threads, most = row["threads"], row["most_threads"]
    if threads is not None and most is not None and threads > most:
        yield f"{what} is launched with {threads} threads; its bounds allow {most}"
    launch_registers = -(-row["registers"] // REGISTER_UNIT) * REGISTER_UNIT
    if threads is not None and launch_registers * threads > REGISTER_FILE:
        yield f"{what} takes {launch_registers} registers for {threads} threads; a multiprocessor has {REGISTER_FILE}"
    if threads is not None and row["taken"]:
        yield from _moved_register_faults(what, row, launch_registers * threads)
    if (row["cluster"] > 1) != (row["multicast_copies"] > 0):
        yield f"{what} has {row['multicast_copies']} copies into several blocks; it is launched in clusters of {row['cluster']}"
    for remark in row["remarks"]:
        yield f"{what}: {remark}"


def _moved_register_faults(what: str, row: Mapping[str, Any], registers: int) -> Iterator[str]:
    """Warpgroups that take registers wait for them for ever where a block has not got so many: one gives, the others take."""
    if not row["given_back"]:
        yield f"{what} has a warpgroup that takes registers, and none that gives any back"
        return
    takers, most, least = row["threads"] // WARPGROUP - 1, max(row["taken"]), max(row["given_back"])
    wanted = WARPGROUP * (takers * most + least)
    if wanted > registers:
        yield f"{what} asks for {takers} x {most} + {least} registers by warpgroup, {wanted} in all; its launch has {registers}"


def _problems(cases: Iterable[Case], kernels: Iterable[Kernel], arch: int) -> Iterator[str]:
    """What is wrong with the launches of the streaming passes."""
    compiled = {kernel.symbol: kernel for kernel in kernels}
    for case in cases:
        yield from (f"{case.name}: {problem}" for problem in case.problems)
        if case.error == NOT_SUPPORTED and arch != STREAMING_ARCH:
            continue
        if case.error != SUCCESS:
            yield f"{case.name} returns error {case.error}"
            continue
        launched = [compiled[launch.kernel] for launch in case.launches if launch.kernel in compiled]
        if len(launched) < max(len(case.launches), 1):
            yield f"{case.name} launches {len(case.launches)} kernels, {len(launched)} of them compiled for this part"
        for what, has in (
            ("tensor-core products", any(kernel.matrix for kernel in launched)),
            ("TMA loads", any(kernel.bulk_copies for kernel in launched)),
            ("registers moved between warpgroups", any(kernel.given_back and kernel.taken for kernel in launched)),
        ):
            if not has:
                yield f"{case.name} launches no kernel with {what}"
