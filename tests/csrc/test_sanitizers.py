"""csrc/cpu under AddressSanitizer and UndefinedBehaviorSanitizer: sanitize.cpp beside it, on this machine's instruction sets.

The control hands over a weight that lacks its last row, on the heap (the sanitizer's red zones) and in front of a page that
nothing may touch.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("setuptools", reason="setup.py, which says how csrc/cpu is compiled, needs setuptools")

from tests.csrc.building import ROOT, setup_module, units_of_the_stand_in
from vmf_kernels.backends.native import module

pytestmark = pytest.mark.compiles

SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
# Not optimised: with -O1, instrumented intrinsics of AVX-512 take six times as long to compile, and the cases run 4 s faster.
FLAGS = ["-std=c++17", "-O0", "-g1", "-fopenmp", *SANITIZERS]
INSTRUCTION_SETS = ("portable", "avx2", "avx512", "avx512bf16", "amx_bf16")
CASES = 3 * 3 * 4  # rows, prototypes, dims; once for each kind of products


def without_absent_kernels(units: list[Any]) -> list[Any]:
    """The units without kernels that could not run here, half of what there is to compile; the module itself has them all."""
    if module.native() is None:
        return units
    runnable = {"portable", *module.instruction_sets()}

    def present(unit: Any) -> Any:
        kernels, _, name = unit.object.removesuffix(".o").partition(".")
        if kernels != "kernels" or name in runnable:
            return unit
        flags = [f"-I{ROOT / 'csrc' / 'cpu'}", f"-DVMF_ABSENT={name}_kernels"]
        return unit._replace(
            source=ROOT / "tests" / "csrc" / "absent_kernels.cpp", object=f"absent.{name}.o", flags=flags
        )

    return [present(unit) for unit in units]


@pytest.fixture(scope="module")
def program() -> Path:
    """The driver with csrc/cpu, everything instrumented; kept below build/, so that a second run compiles what changed."""
    builder = setup_module()
    try:
        compiler = builder.host_compiler()
    except builder.CannotBuildError as reason:
        pytest.skip(str(reason))
    if not builder.compiles(compiler, builder.HAS_OPENMP, *FLAGS):
        pytest.skip(f"{compiler[0]} has no sanitizers, or no OpenMP")
    known, stood_for = builder.known_sets(compiler), ("bindings.o", "operator.o", "dispatch.o", "kernels.amx_bf16.o")
    units = without_absent_kernels([unit for unit in builder.native_units(known) if unit.object not in stood_for])
    units += units_of_the_stand_in(["-DVMF_HAS_X86"] if "avx2" in known else [], "-O1")
    units.append(builder.Unit(ROOT / "tests" / "csrc" / "sanitize.cpp", "sanitize.o", [f"-I{ROOT / 'csrc' / 'cpu'}"]))
    plan = builder.Plan(compiler, FLAGS, units, [*SANITIZERS, "-fopenmp"])
    return Path(builder.run_ninja(plan, builder.BUILD / "sanitizers", "sanitize"))


def run(program: Path, *arguments: str) -> tuple[int, str]:
    """Exit status, and what was printed."""
    # Leaks are looked for by tracing the process, which containers forbid.
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False, env=environment)
    return done.returncode, done.stdout + done.stderr


def skip_unless_available(program: Path, instruction_set: str) -> None:
    if instruction_set not in run(program)[1].split():
        pytest.skip(f"this machine has no {instruction_set}")


@pytest.mark.parametrize("last", [2, 1], ids=["vectors", "tiles"])
def test_no_sanitizer_complains(program: Path, last: int) -> None:
    """Of the widest vectors that there are, which read the farthest: what they are compiled from is the same for all.

    And of a matrix unit's tiles, by a stand-in.
    """
    instruction_set = run(program)[1].split()[-last]
    code, printed = run(program, instruction_set)
    kinds = 2 if instruction_set == "avx512bf16" else 1
    assert (code, printed) == (0, f"{CASES * kinds} cases\n"), printed


@pytest.mark.parametrize("place", ["heap", "page"])
@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_a_read_behind_the_prototypes_is_reported(program: Path, instruction_set: str, place: str) -> None:
    skip_unless_available(program, instruction_set)
    code, printed = run(program, instruction_set, place)
    assert code != 0, printed
    assert {"heap": "heap-buffer-overflow", "page": "SEGV"}[place] in printed, printed
    assert "csrc/cpu" in printed, f"reported elsewhere than in the library:\n{printed}"
