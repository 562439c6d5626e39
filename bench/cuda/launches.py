"""Records the launches of the streaming passes without a GPU: the shipped launchers, with a runtime that records.

A program links the compiled launchers with ``launch_cases.cpp``, which calls them, and with ``recording_runtime.cpp``, which
stands in for the CUDA runtime; no kernel runs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.cuda.toolchain import find_nvcc, run

HERE = Path(__file__).parent
PROGRAM = [HERE / "launch_cases.cpp", HERE / "recording_runtime.cpp"]
NOT_SUPPORTED = 801  # cudaErrorNotSupported
SUCCESS = 0


@dataclass(frozen=True)
class Launch:
    """One launch, as the runtime sees it; bytes."""

    kernel: str  # mangled
    grid: tuple[int, int, int]
    threads: int
    dynamic_shared: int
    allowed_shared: int  # dynamic: what was asked for before, or what every block has
    cluster: int = 1  # blocks that run together


@dataclass
class Case:
    """One call of a pass."""

    name: str  # for example "row_pass bf16 D256, own values"
    launches: list[Launch] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)  # that the real runtime or driver would refuse
    error: int = SUCCESS  # that the launcher returned


def recorded_cases(objects: Sequence[Path], headers: Path, arch: int, folder: Path) -> list[Case]:
    """What the passes in these object files launch on a device of ``arch`` (compute capability times 10).

    Args:
        objects: of the launchers, compiled by nvcc.
        headers: folder of ``stream.h``.
        arch: that the device pretends to have.
        folder: where the program is built.

    Raises:
        RuntimeError: it does not link, mostly for a function of the runtime that the recording has not.
    """
    program = folder / "launch_cases"
    command = [str(find_nvcc()), "-std=c++17", "-cudart", "none", f"-I{headers}", f"-I{HERE}"]
    run([*command, *map(str, PROGRAM), *map(str, objects), "-o", str(program)])
    return parsed(run([str(program), str(arch)]))


def parsed(printed: str) -> list[Case]:
    """Cases from the program's lines; the last line of each is what the launcher returned."""
    cases: dict[str, Case] = {}
    for line in printed.splitlines():
        entry = json.loads(line)
        case = cases.setdefault(entry["case"], Case(entry.pop("case")))
        entry.pop("case", None)
        if "problem" in entry:
            case.problems.append(entry["problem"])
        elif "error" in entry:
            case.error = entry["error"]
        else:
            case.launches.append(Launch(**entry | {"grid": tuple(entry["grid"])}))
    return list(cases.values())
