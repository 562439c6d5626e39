"""The kernels as they ship, compiled without a GPU: no spill, within the shared memory, on tensor cores.

Here kernels are interpreted, so they are compiled in processes of their own, with a cache of their own.
"""

from __future__ import annotations

import ast
import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import triton

from bench import compile_report
from bench.ahead_of_time import SHARED_MEMORY, TENSOR_MEMORY, Compiled, Launch, recording
from bench.compile_report import (
    COLUMNS,
    WITH_PRODUCTS,
    Configuration,
    configurations,
    faults,
    is_served,
    known_in,
    label_of,
    report,
    shipped_launches,
    table,
    written,
)
from tests.backends.test_triton_tiles import UNSERVED
from vmf_kernels.backends.triton import launch, tiles
from vmf_kernels.backends.triton.tiles import PASSES, PRECISIONS, TABLE_PATH, WIDTHS

KERNELS = TABLE_PATH.parent
ROOT = Path(__file__).parents[2]
COMMITTED = ROOT / "bench" / "results" / "compiled"
ARCHITECTURES = (80, 90, 100)
PINNED = next(line[8:] for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("triton=="))
VERSIONS = {PINNED: COMMITTED, "3.6.0": COMMITTED / "triton_3.6.0"}  # Triton's, and where its reports are
ENTRY = {"rows": 64, "prototypes": 64}
LABELS = {"kernel", "mode", "dim", "products", "dtype", "tile", "num_warps", "num_stages", "limit", "digest"}
FIELDS = LABELS | {
    "registers",
    "spills",
    "shared",
    "tensor_memory",
    "matrix",
    "bulk_copies",
    "asynchronous_copies",
    "loops",
}
# The command, and then, for importing what compiles takes seconds, a tile that the shared memory has not room for even in one
# stage of the three; its faults are the last line.
PROGRAM = """
import json, sys, torch
from bench.ahead_of_time import compile_launch, recording
from bench.compile_report import Configuration, faults, main, row_of
from bench.pass_case import PassCase
from vmf_kernels.backends.triton.tiles import Tile

code = main(sys.argv[1:])
configuration = Configuration(384, "16-bit", torch.bfloat16, False)
with recording(90) as launches:
    PassCase.of("student", "16-bit", 384, device=torch.device("cpu")).run(Tile(128, 128, stages=3))
print(json.dumps(faults(row_of(each, configuration, compile_launch(each, 90), 90) for each in launches)))
sys.exit(code)
"""


class Run(NamedTuple):
    """What one process left."""

    exit_code: int
    printed: str
    report: dict[str, Any]
    too_large: list[str]  # faults of the tile


def in_own_process(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """``python arguments`` where kernels are not interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=environment | {"TRITON_CACHE_DIR": str(folder / "cache")},
    )


# the committed reports are of all launches, and held to today's by their digests; this shows that the command compiles
RUNS = {"the passes at D = 64": ("--dims", "64", "--passes")}  # which compile soonest


@pytest.fixture(scope="module", params=RUNS)
def hopper(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A report on sm_90 in 16-bit precision."""
    folder = tmp_path_factory.mktemp("compiled")
    path = folder / "report.json"
    options = ("--arch", "90", "--kernels", "triton", "--precisions", "16-bit", "--json", str(path))
    done = in_own_process(folder, "-c", PROGRAM, *options, *RUNS[request.param])
    assert done.stdout, done.stderr
    printed, _, last = done.stdout.rstrip().rpartition("\n")
    found = json.loads(path.read_text()) if path.exists() else {}
    return Run(done.returncode, printed + done.stderr, found, json.loads(last))


@pytest.mark.compiles
def test_the_kernels_compile_without_a_fault(hopper: Run) -> None:
    assert hopper.exit_code == 0, hopper.printed
    assert "no spill, all fit, tensor cores where they should be" in hopper.printed


@pytest.mark.compiles
def test_every_kernel_keeps_its_limits(hopper: Run) -> None:
    worst = {name: max(row[name] for row in hopper.report["kernels"]) for name in ("spills", "shared", "registers")}
    assert worst["spills"] == 0, f"{worst}"
    assert 0 < worst["shared"] <= SHARED_MEMORY[90], f"{worst}, limit {SHARED_MEMORY[90]}"
    assert worst["registers"] <= 255, f"{worst}"


@pytest.mark.compiles
def test_every_pass_uses_tensor_cores_and_asynchronous_copies(hopper: Run) -> None:
    passes = [row for row in hopper.report["kernels"] if row["kernel"] in WITH_PRODUCTS]
    without = [row for row in passes if not row["matrix"] or not row["asynchronous_copies"] + row["bulk_copies"]]
    assert len(passes) >= 7, f"{len(passes)} launches of passes"
    assert not without, f"{without}"


@pytest.mark.compiles
def test_a_report_says_what_it_is_of(hopper: Run) -> None:
    assert hopper.report.keys() == {"arch", "triton", "kernels"}
    assert hopper.report["arch"] == 90
    assert all(row.keys() == FIELDS for row in hopper.report["kernels"])


@pytest.mark.compiles
def test_every_kernel_of_the_package_is_compiled(hopper: Run) -> None:
    compiled = {row["kernel"] for row in hopper.report["kernels"]}
    written = {
        node.name
        for path in KERNELS.glob("*_kernels.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
    }
    if compiled <= set(WITH_PRODUCTS):
        written &= set(WITH_PRODUCTS)
    missing = written - compiled
    assert not missing, f"never compiled: {sorted(missing)}"


@pytest.mark.compiles
def test_a_tile_that_cannot_fit_is_reported(hopper: Run) -> None:
    """Negative control."""
    found = hopper.too_large
    assert any("spills" in fault for fault in found), f"{found}"
    assert any("bytes of shared memory" in fault for fault in found), f"{found}"


def good_row(**changes: Any) -> dict[str, Any]:
    row = dict.fromkeys(FIELDS, 1) | {"kernel": WITH_PRODUCTS[0], "products": "16-bit", "spills": 0, "mode": "own"}
    return row | {"shared": SHARED_MEMORY[90], "limit": SHARED_MEMORY[90], "tensor_memory": TENSOR_MEMORY} | changes


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"spills": 3}, "spills 3 times"),
        ({"shared": SHARED_MEMORY[90] + 1}, "takes 232449 bytes of shared memory; the part has 232448"),
        ({"tensor_memory": TENSOR_MEMORY + 1}, "takes 513 columns of tensor memory; there are 512"),
        ({"matrix": 0}, "uses no tensor cores"),
        ({"matrix": 0, "products": "tf32"}, "uses no tensor cores"),
    ],
)
def test_a_fault_is_found(changes: dict[str, Any], said: str) -> None:
    """Negative control."""
    found = faults([good_row(), good_row(**changes)])
    assert len(found) == 1, f"{found}"
    assert said in found[0]


@pytest.mark.parametrize("changes", [{}, {"matrix": 0, "products": "ieee"}, {"matrix": 0, "kernel": "merge_kernel"}])
def test_what_is_no_fault_is_not_found(changes: dict[str, Any]) -> None:
    found = faults([good_row(**changes)])
    assert not found, f"{found}"


def test_a_written_report_is_read_back_and_has_a_line_for_each_kernel() -> None:
    content = {
        "arch": 90,
        "kernels": [good_row(), good_row(loops=[{"matrix": 1}])],
        "cuda": {"kernels": [], "x": ["y"]},
    }
    text = written(content)
    assert json.loads(text) == content
    assert sum('"kernel"' in line for line in text.splitlines()) == 2
    assert len(text.splitlines()) == 13, text


def test_the_table_has_a_cell_for_every_column() -> None:
    lines = table([good_row(), good_row(bulk_copies=0)]).splitlines()
    assert len({line.count("|") for line in lines}) == 1, "\n".join(lines)
    assert len(lines) == 4
    assert lines[0].count("|") == len(COLUMNS) + 6, lines[0]


KERNEL = SimpleNamespace(__name__="some_kernel", arg_names=("p_x", "count", "N"))


def test_a_launch_is_recorded_instead_of_run() -> None:
    with recording(90) as launches:
        launch.run(KERNEL, (2,), "x", 3, N=16, num_warps=8)
    (recorded,) = launches
    assert recorded.arguments == {"p_x": "x", "count": 3, "N": 16}
    assert (recorded.grid, recorded.options) == ((2,), {"num_warps": 8})


@pytest.mark.parametrize(
    ("positional", "by_name", "wrong"),
    [
        (["x"], {"N": 16}, "count"),
        (["x", 3], {"N": 16, "M": 1}, "M"),
        (["x", 3], {"N": 16, "count": 4}, "count"),
        (["x", 3, 16, 5], {}, "positional 3"),
    ],
    ids=["missing", "unknown", "twice", "too many"],
)
def test_a_launch_with_wrong_arguments_is_refused(positional: list[Any], by_name: dict[str, Any], wrong: str) -> None:
    """Negative control."""
    with recording(90), pytest.raises(AssertionError, match=rf"wrong arguments: \['{wrong}'\]"):
        launch.run(KERNEL, (1,), *positional, **by_name)


ALONE = Configuration(256, "16-bit", torch.bfloat16, False)
MADE = Compiled(
    registers=99, spills=0, shared=1, tensor_memory=0, matrix=1, bulk_copies=0, asynchronous_copies=1, loops=()
)


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """The launches that were compiled, by one that is fast."""
    seen: list[Launch] = []

    def fake(launch: Launch, arch: int) -> Compiled:
        seen.append(launch)
        return MADE

    monkeypatch.setattr(compile_report, "compile_launch", fake)
    return seen


def test_only_what_the_report_does_not_have_is_compiled(compiler: list[Launch]) -> None:
    rows = report((90, ALONE, {}))
    assert [launch.name for launch in compiler] == [row["kernel"] for row in rows]
    compiler.clear()
    another = rows[2]["digest"]
    rows[2]["digest"] = "of another version"
    read_back = json.loads(json.dumps({"triton": triton.__version__, "kernels": rows}))
    again = report((90, ALONE, known_in(read_back)))
    assert len(compiler) == 1
    assert again[2]["digest"] == another
    assert again[:2] + again[3:] == rows[:2] + rows[3:]


def test_what_another_triton_compiled_or_an_older_report_lacks_is_not_known(compiler: list[Launch]) -> None:
    rows = report((90, ALONE, {}))
    assert len(known_in({"triton": triton.__version__, "kernels": rows})) == len(rows)
    assert not known_in({"triton": "3.5.0", "kernels": rows})
    assert not known_in({})
    for name in ("digest", "loops"):
        older = [{key: value for key, value in row.items() if key != name} for row in rows]
        assert not known_in({"triton": triton.__version__, "kernels": older})


def regenerate(arch: int, version: str) -> str:
    path = (VERSIONS[version] / f"sm_{arch}.json").relative_to(ROOT)
    return f"with triton {version} run: python -m bench.compile_report --arch {arch} --kernels triton --json {path}"


@pytest.fixture(params=[(arch, version) for version in VERSIONS for arch in ARCHITECTURES], ids=str)
def committed(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Of one part, by one version of Triton."""
    arch, version = request.param
    path = VERSIONS[version] / f"sm_{arch}.json"
    assert path.exists(), f"{path.name} is missing; {regenerate(arch, version)}"
    report: dict[str, Any] = json.loads(path.read_text())
    assert (report["arch"], report["triton"]) == (arch, version), (
        f"of another part or version; {regenerate(arch, version)}"
    )
    assert all(row.keys() == FIELDS for row in report["kernels"]), f"other fields; {regenerate(arch, version)}"
    return report


@functools.cache
def labels_of_today(arch: int) -> list[dict[str, Any]]:
    """Of every launch that a whole report of this part has, in its order; recorded, not compiled."""
    return [
        label_of(launch, configuration, arch)
        for configuration in configurations()
        if is_served(arch, configuration)
        for launch in shipped_launches(arch, configuration)
    ]


def test_the_committed_report_is_of_this_code(committed: dict[str, Any]) -> None:
    labels = [{name: row[name] for name in LABELS} for row in committed["kernels"]]
    today = labels_of_today(committed["arch"])
    lacking, outdated = ([row for row in one if row not in other] for one, other in ((today, labels), (labels, today)))
    assert labels == today, (
        f"{len(lacking)} launches are not in it, such as {lacking[:1]}; {len(outdated)} of its rows are none of today's; "
        f"{regenerate(committed['arch'], committed['triton'])}"
    )


def test_equal_digests_were_compiled_to_equal_kernels(committed: dict[str, Any]) -> None:
    """Launches of two embedding dims may be one kernel: were a digest too coarse, they would differ here."""
    made: dict[str, list[dict[str, Any]]] = {}
    for row in committed["kernels"]:
        made.setdefault(row["digest"], []).append({name: row[name] for name in FIELDS - LABELS})
    assert any(len(rows) > 1 for rows in made.values()), "no digest occurs twice"
    differ = {digest: rows for digest, rows in made.items() if any(row != rows[0] for row in rows)}
    assert not differ, f"{differ}"


def test_the_committed_report_has_no_fault(committed: dict[str, Any]) -> None:
    found = faults(committed["kernels"])
    assert not found, f"{found}"


def test_a_committed_report_with_a_spill_has_a_fault(committed: dict[str, Any]) -> None:
    """Negative control: of any one entry."""
    committed["kernels"][-1]["spills"] = 2
    found = faults(committed["kernels"])
    assert len(found) == 1, f"{found}"
    assert "spills 2 times" in found[0]


def test_the_committed_report_counts_the_loops_of_the_passes(committed: dict[str, Any]) -> None:
    """Two in a column pass, students and teachers, but for its usage alone; one in a row pass."""
    for row in committed["kernels"]:
        if row["kernel"] == "assign_rows_kernel" and row["products"] == "16-bit" and committed["arch"] == 90:
            assert len(row["loops"]) == 1, f"{row}"
        for loop in row["loops"]:
            assert loop["instructions"] > loop["matrix"] > 0, f"{row}"
            assert max(loop["skippable"], loop["exposed"]) < loop["instructions"], f"{row}"


def test_the_committed_report_covers_the_table(committed: dict[str, Any]) -> None:
    arch = committed["arch"]
    expected = {
        (each.dim, each.precision, str(each.dtype).removeprefix("torch."))
        for each in configurations()
        if (str(arch), each.precision, each.dim) not in UNSERVED
    }
    passes = [row for row in committed["kernels"] if row["kernel"] in WITH_PRODUCTS]
    missing = expected - {(row["dim"], row["products"], row["dtype"]) for row in passes}
    assert not missing, f"{sorted(missing)} are not in it; {regenerate(arch, committed['triton'])}"


@pytest.mark.parametrize(("precision", "expected"), [("16-bit", True), ("tf32", False), ("ieee", False)])
def test_a_configuration_is_served_if_the_table_has_every_pass(
    precision: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = {"16-bit": {"256": dict.fromkeys(PASSES, ENTRY)}, "tf32": {"256": {"student": ENTRY}}}
    monkeypatch.setattr(tiles, "table", lambda: {"90": made})
    assert is_served(90, Configuration(200, precision, torch.float32, False)) is expected


def test_every_width_and_precision_is_asked_for() -> None:
    asked = {(each.dim, each.precision) for each in configurations()}
    assert asked == {(width, precision) for width in WIDTHS for precision in PRECISIONS}
