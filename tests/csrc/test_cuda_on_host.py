"""csrc/cuda's streaming passes compiled for the host, their instructions by stand-ins, against sums in double precision.

What is emulated, and what is not, is in csrc/cuda/README.md. Neither CUDA nor a GPU is needed. The controls break a copy of the
source in one place each, and have to be noticed.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

pytestmark = pytest.mark.compiles

ROOT = Path(__file__).parents[2]
STAND_INS = ROOT / "tests" / "csrc" / "cuda_on_host"
PASSES = ROOT / "csrc" / "cuda"
TAKEN = ("stream.h", "tile.cuh", "descriptor.cuh", "cluster.cuh", "stream.cuh", "launch.cuh", "rows.cu", "columns.cu")
CASES = {"rows": 7, "columns": 3}  # by pass: a program each, which prints a line a case

WIDTHS = ((64, "fp16"), (128, "bf16"), (192, "fp16"), (256, "bf16"), (384, "bf16"))
OTHER = {"bf16": "fp16", "fp16": "bf16"}
# when products finish, and the seed of who runs next
SCHEDULES = (("late", 1), ("any", 2))
MORE_SCHEDULES = (("early", 3), ("any", 5))  # instead of the second, at the widths that run in both elements
IN_BOTH_ELEMENTS = (64, 256)
# What is broken shows under most schedules, not under each: a copy may land in time unasked.
CONTROL_SCHEDULES = (("late", 1), ("early", 1), ("late", 2), ("late", 3))

SHARED = ("main", "cases", "machine", "products", "ptx")  # one unit of both programs: headers are read once
# what the passes and their stand-ins include of the standard library: read once for all controls
STANDARD = ("cmath", "cstddef", "cstdint", "cstring", "functional", "initializer_list", "type_traits")
HAS_FLOAT16 = b"int main() { return (int)(_Float16)0.0f; }"


class Run(NamedTuple):
    """What a program is asked for."""

    of_pass: str
    element: str
    width: int
    timing: str
    seed: int


class Break(NamedTuple):
    """Edits of one file, each of a text that is there once; a pass that has to notice; the first word of what it says."""

    name: str
    file: str
    edits: tuple[tuple[str, str], ...]
    of_pass: str
    said: str


RUNS = [(width, element, SCHEDULES[0]) for width, element in WIDTHS]
RUNS += [(width, element, SCHEDULES[1]) for width, element in WIDTHS if width not in IN_BOTH_ELEMENTS]
Results = dict[Run, tuple[int, str]]  # exit status, and what was printed

BREAKS = (
    Break(
        "leading-offset",
        "descriptor.cuh",
        (
            ("address, box_rows * BOX_BYTES", "address, box_rows / 2 * BOX_BYTES"),
            # which would not let it compile
            ("static_assert(finds_all(32, 128, columns_descriptor(0, 32)));", ""),
            ("static_assert(!finds_all(32, 128, columns_descriptor(0, 64)));", ""),
        ),
        "rows",
        "WRONG",
    ),
    Break(
        "release-before-the-product",
        "stream.cuh",
        (
            (
                "      await_products<0>(sums);\n      release_slot(values_slot);\n      round",
                "      release_slot(values_slot);\n      await_products<0>(sums);\n      round",
            ),
        ),
        "rows",
        "WRONG",
    ),
    Break("parity-that-stays", "stream.cuh", (("parity ^= 1;", "parity ^= 0;"),), "rows", "BARRIER"),
    Break(
        "no-wait-for-the-logits",
        "stream.cuh",
        (("await_products<1>(logits);", "await_products<2>(logits);"),),
        "rows",
        "WRONG",
    ),
    Break(
        "no-wait-for-the-keys",
        "stream.cuh",
        (("wait(&shared.full[slot], cursor.parity);", ""),),
        "rows",
        "WRONG",
    ),
    Break(
        "no-rescale",
        "stream.cuh",
        (("policy.rescale(sums);  // while the logits are formed", ""),),
        "rows",
        "WRONG",
    ),
    Break(
        "halves-of-a-pair-swapped",
        "stream.cuh",
        (("(logits[2 * i], logits[2 * i + 1])", "(logits[2 * i + 1], logits[2 * i])"),),
        "rows",
        "WRONG",
    ),
    Break(
        "no-wait-before-the-reload",
        "stream.cuh",
        (("wait(&shared.query_empty, (i_walk & 1) ^ 1);", ""),),
        "columns",
        "WRONG",
    ),
    Break("no-wait-for-the-reload", "columns.cu", (("wait(&shared.query_full, 1);", ""),), "columns", "WRONG"),
    Break(
        "bytes-that-never-come",
        "stream.cuh",
        (("T::SLOT_BYTES + extra);", "T::SLOT_BYTES + extra + 16);"),),
        "columns",
        "LOCKED",
    ),
    Break("no-first-turn", "stream.cuh", (("if (group == 1) hand_turn();", ""),), "rows", "LOCKED"),
    Break(
        "a-box-behind-the-slots",
        "stream.cuh",
        (("target + i * T::KEYS * BOX_BYTES_PER_ROW, map", "target + (i << 21) + T::KEYS, map"),),
        "rows",
        "OUTSIDE",
    ),
    Break(
        "a-slot-released-for-its-own-block-only",
        "cluster.cuh",
        (
            ("if (lane < BLOCKS) arrive_in(lane, empty);", "if (lane == 0) arrive(empty);"),
            ("RELEASES = BLOCKS * CONSUMER_WARPS", "RELEASES = CONSUMER_WARPS"),
        ),
        "rows",
        "WRONG",
    ),
    Break(
        "releases-of-one-block-counted",
        "cluster.cuh",
        (("RELEASES = BLOCKS * CONSUMER_WARPS", "RELEASES = CONSUMER_WARPS"),),
        "columns",
        "LOCKED",
    ),
    Break("the-same-half-of-both", "stream.cuh", (("row + share, full", "row, full"),), "rows", "WRONG"),
    Break("copies-for-one-block", "cluster.cuh", (("ALL = (1 << BLOCKS) - 1", "ALL = 1"),), "columns", "LOCKED"),
    Break(
        "no-meeting-at-the-start",
        "cluster.cuh",
        (
            (
                "      __syncthreads();\n    } else {\n      meet_cluster();",
                "      __syncthreads();\n    } else {\n      __syncthreads();",
            ),
        ),
        "rows",
        "BARRIER",
    ),
    Break(
        "no-meeting-at-the-end",
        "cluster.cuh",
        (("if constexpr (!IS_ALONE) {\n      __syncwarp();", "if constexpr (false) {\n      __syncwarp();"),),
        "columns",
        "GONE",
    ),
)


def edited(text: str, old: str, new: str) -> str:
    """The text with `old`, which is there once, replaced."""
    assert text.count(old) == 1, f"{old!r} is there {text.count(old)} times, expected once: the control breaks nothing"
    return text.replace(old, new)


def of_one_kind(launch: str, width: int) -> str:
    """launch.cuh whose passes know no other width, and bf16 only: nine tenths less to compile."""
    lines = launch.splitlines(keepends=True)
    kept = [line for line in lines if "case " not in line or f"case {width}:" in line]
    assert len(kept) == len(lines) - len(WIDTHS) + 1, "launch.cuh no longer has a line for each width"
    return edited("".join(kept), "pass.element == Element::bf16 ? visit(", "true ? visit(").replace(
        " : visit(width, Constant<Element::fp16>{})", " : cudaErrorInvalidValue"
    )


def compile_units(folder: Path, sources: Sequence[str], *options: str) -> None:
    """An object beside each source."""

    def compile_unit(source: str) -> None:
        command = ["g++", "-std=c++20", *options, "-I.", "-xc++", "-c", source]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(compile_unit, sources))


def link(folder: Path, of_pass: str) -> None:
    """The program, named as the pass."""
    subprocess.run(["g++", "shared.o", f"{of_pass}.o", f"{of_pass}_cases.o", "-o", of_pass], cwd=folder, check=True)


def result(folder: Path, run: Run) -> tuple[int, str]:
    """Exit status, and what was printed."""
    command = [str(folder / run.of_pass), run.element, str(run.width), run.timing, str(run.seed)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The passes and the stand-ins, side by side in one folder: there, each header is found before its namesake elsewhere."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not there, which compiles the passes for the host")
    probe = subprocess.run(["g++", "-fsyntax-only", "-xc++", "-"], input=HAS_FLOAT16, capture_output=True, check=False)
    if probe.returncode != 0:
        pytest.skip("g++ has no _Float16 for this machine; GCC 12 has it for x86-64")
    folder = tmp_path_factory.mktemp("cuda_on_host")
    for path in (*STAND_INS.iterdir(), *[PASSES / name for name in TAKEN]):
        shutil.copy2(path, folder)
    # the passes only walk and call, and are slow to optimise; the stand-ins multiply
    compile_units(folder, [f"{of_pass}.cu" for of_pass in CASES], "-O0")
    own = ("-O3", "-march=native", "-ffp-contract=off")  # wide vectors; sums round as on any machine
    (folder / "shared.cpp").write_text("".join(f'#include "{name}.cpp"\n' for name in SHARED))
    compile_units(folder, ["shared.cpp", *(f"{of_pass}_cases.cpp" for of_pass in CASES)], *own)
    for of_pass in CASES:
        link(folder, of_pass)
    (folder / "standard.h").write_text("".join(f"#include <{name}>\n" for name in STANDARD))
    subprocess.run(["g++", "-std=c++20", "-O0", "-xc++-header", "standard.h"], cwd=folder, check=True)
    return folder


@pytest.fixture(scope="module")
def results(built: Path) -> Results:
    """Of every width, in one element type."""
    runs = [Run(p, element, width, *schedule) for width, element, schedule in RUNS for p in CASES]
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(runs, pool.map(lambda run: result(built, run), runs), strict=True))


@pytest.mark.parametrize(
    ("width", "element", "schedule"), RUNS, ids=lambda s: "-".join(map(str, s)) if isinstance(s, tuple) else str(s)
)
@pytest.mark.parametrize("of_pass", CASES)
def test_a_pass_matches_sums_in_double_precision(
    results: Results, of_pass: str, width: int, element: str, schedule: tuple[str, int]
) -> None:
    code, printed = results[Run(of_pass, element, width, *schedule)]
    assert code == 0, printed
    assert len(printed.splitlines()) == CASES[of_pass], printed


@pytest.mark.parametrize(("width", "element"), [pair for pair in WIDTHS if pair[0] not in IN_BOTH_ELEMENTS])
@pytest.mark.parametrize("of_pass", CASES)
def test_another_schedule_gives_the_same_bits(results: Results, of_pass: str, width: int, element: str) -> None:
    one, other = (results[Run(of_pass, element, width, *schedule)][1] for schedule in SCHEDULES)
    assert one == other, f"{one}\n{other}"


def test_other_inputs_give_other_bits(results: Results) -> None:
    """Negative control of the one above."""
    digests = {line.split()[-1] for _, printed in results.values() for line in printed.splitlines()}
    expected = len(WIDTHS) * sum(CASES.values())
    assert len(digests) == expected, f"{len(digests)} digests, expected {expected}: one for each width and case"


@pytest.mark.parametrize(("width", "element"), [pair for pair in WIDTHS if pair[0] in IN_BOTH_ELEMENTS])
@pytest.mark.parametrize("of_pass", CASES)
def test_both_elements_match_under_more_schedules(
    built: Path, results: Results, of_pass: str, width: int, element: str
) -> None:
    first, second = MORE_SCHEDULES
    known = results[Run(of_pass, element, width, *SCHEDULES[0])]
    assert result(built, Run(of_pass, element, width, *first)) == known
    ran = [result(built, Run(of_pass, OTHER[element], width, *schedule)) for schedule in (first, second)]
    assert ran[0][0] == 0, ran[0][1]
    assert ran == ran[:1] * len(ran), "\n".join(printed for _, printed in ran)


def broken_copy(built: Path, folder: Path, control: Break) -> Path:
    """A folder with the program of the control's pass, for width 128: its ring is filled again, its groups take turns."""
    shutil.copytree(built, folder, ignore=shutil.ignore_patterns(*CASES, "standard.h*"))
    launch = folder / "launch.cuh"
    launch.write_text(of_one_kind(launch.read_text(), 128))
    text = (folder / control.file).read_text()
    for old, new in control.edits:
        text = edited(text, old, new)
    (folder / control.file).write_text(text)
    compile_units(folder, [f"{control.of_pass}.cu"], "-O0", "-include", str(built / "standard.h"))
    link(folder, control.of_pass)
    return folder


@pytest.mark.parametrize("of_pass", CASES)
def test_a_copy_that_is_not_broken_gives_the_same_bits(
    built: Path, results: Results, tmp_path: Path, of_pass: str
) -> None:
    """What the controls compare with."""
    folder = broken_copy(built, tmp_path / "copy", Break("unbroken", "stream.cuh", (), of_pass, ""))
    run = Run(of_pass, "bf16", 128, *SCHEDULES[0])
    assert result(folder, run) == results[run]


@pytest.mark.parametrize("control", BREAKS, ids=lambda control: control.name)
def test_a_break_is_noticed(built: Path, tmp_path: Path, control: Break) -> None:
    """Negative control."""
    folder = broken_copy(built, tmp_path / "copy", control)
    runs = [Run(control.of_pass, "bf16", 128, *schedule) for schedule in CONTROL_SCHEDULES]
    said = next((printed for code, printed in (result(folder, run) for run in runs) if code != 0), "nothing")
    assert said.splitlines()[-1].split()[0] == control.said, said


def test_a_control_that_no_longer_fits_the_source_is_refused() -> None:
    """Negative control of the controls."""
    with pytest.raises(AssertionError, match="is there 0 times, expected once"):
        edited("wait(barrier);", "await(barrier);", "")
