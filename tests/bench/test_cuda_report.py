"""The report of the CUDA C++ kernels: it has nvcc's figures and the launches' requests, and finds every fault.

Small kernels stand in for the passes' (``smallest_passes.cu``), behind the same header; the passes themselves, and the
preparation of prototypes, are in the committed reports. Without nvcc what compiles is skipped.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench import compile_report
from bench.ahead_of_time import SHARED_MEMORY
from bench.cuda import launches, report, toolchain
from bench.cuda.launches import Case, Launch, parsed
from bench.cuda.report import SOURCES, faults, section, source_digest, table
from bench.cuda.toolchain import MissingToolError, find_nvcc, readable

ROOT = Path(__file__).parents[2]
COMMITTED = ROOT / "bench" / "results" / "compiled"
SMALLEST = ROOT / "tests" / "csrc" / "smallest_passes.cu"
ARCHITECTURES = (80, 90, 100)
LAUNCHES = 2 * 2 * 5 * (4 + 3) + 1  # alone and in clusters, elements, widths, modes of rows and columns; an odd one
ASKS = "cudaFuncSetAttribute(pass_kernel<64>, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);"
PRODUCT = '"wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0, %1, %2, %3}, %4, %4, 1, 1, 1, 0, 0;"'
LEAVES_UNLESS_ENCODED = "if (encoded != CUDA_SUCCESS) return cudaErrorInvalidValue;"
SPILLS = """float sums[4] = {};
  volatile float stored[32];
  for (int i = 0; i < 32; ++i) stored[i] = out[i];
  sums[0] = stored[threadIdx.x % 32];"""
# what is changed in the smallest passes, and what the report has to say of it; in two files, for each compiles for seconds
BREAKS: dict[str, list[tuple[str, str, str]]] = {
    "launches": [
        ("inc.sync.aligned.u32 240", "inc.sync.aligned.u32 248", "2 x 248 + 24 registers by warpgroup, 66560 in all"),
        (ASKS, "", "155648 bytes more dynamic shared memory than was asked for"),
        (
            "box[] = {64, 64}",
            "box[] = {128, 64}",
            "D64, own values: tensor map: more than 128 bytes under that swizzle",
        ),
        (LEAVES_UNLESS_ENCODED, "", "column_pass fp16 D384, usage: tensor map"),
        ("float sums[4] = {};", SPILLS, "spills 9 times"),
    ],
    "code": [
        (PRODUCT, '""', "row_pass bf16 D64, own values launches no kernel with tensor-core products"),
        ("__launch_bounds__(kThreads, 1) ", "", "'setmaxnreg' ignored; unable to determine register count at entry"),
        ("200 * 1024", "227 * 1024", "takes 233472 bytes of shared memory; the part has 232448"),
    ],
}


def missing_tool() -> str | None:
    try:
        find_nvcc()
    except MissingToolError as error:
        return str(error)
    return None


def needs_nvcc(test: Callable[..., None]) -> Callable[..., None]:
    """A test that compiles with it."""
    skip = pytest.mark.skipif(missing_tool() is not None, reason=str(missing_tool()))
    marked: Callable[..., None] = pytest.mark.compiles(skip(test))
    return marked


def stand_ins(folder: Path, *changes: tuple[str, str, str]) -> Path:
    """A folder like csrc/cuda, with the smallest passes, changed."""
    shutil.copy(SOURCES / "stream.h", folder)
    text = SMALLEST.read_text()
    for old, new, _ in changes:
        assert old in text, f"{old!r} is not in {SMALLEST.name}"
        text = text.replace(old, new)
    (folder / "rows.cu").write_text(text)
    return folder


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The section of the unchanged smallest passes."""
    return section(90, stand_ins(tmp_path_factory.mktemp("good")))


@needs_nvcc
def test_a_kernel_s_numbers_are_found(good: dict[str, Any]) -> None:
    (row,) = good["kernels"]
    found = {name: row[name] for name in ("kernel", "source", "registers", "threads", "spills", "remarks")}
    assert found == {
        "kernel": "pass_kernel<64>",
        "source": "rows.cu",
        "registers": 168,
        "threads": 384,
        "spills": 0,
        "remarks": [],
    }
    assert (row["matrix"], row["bulk_copies"], row["given_back"], row["taken"]) == (1, 1, [24], [240])
    assert row["loops"] == [], "its product is in no loop"
    assert row["static_shared"] > 0
    assert row["dynamic_shared"] == 200 * 1024
    assert row["limit"] == SHARED_MEMORY[90]


@needs_nvcc
def test_every_launch_of_the_passes_is_recorded(good: dict[str, Any]) -> None:
    (row,) = good["kernels"]
    assert len(row["launched_by"]) == LAUNCHES, row["launched_by"]
    assert {"row_pass fp16 D192, own values, value bias", "column_pass bf16 D384, usage"} <= set(row["launched_by"])


@needs_nvcc
def test_good_kernels_have_no_fault(good: dict[str, Any]) -> None:
    assert not faults(good), faults(good)
    assert good["nvcc"].count(".") == 2


@needs_nvcc
@pytest.mark.parametrize("broken", BREAKS)
def test_broken_kernels_are_found(broken: str, tmp_path: Path) -> None:
    """Negative control."""
    found = "\n".join(faults(section(90, stand_ins(tmp_path, *BREAKS[broken]))))
    missed = [said for _, _, said in BREAKS[broken] if said not in found]
    assert not missed, f"{missed} is not said in:\n{found}"


@needs_nvcc
def test_a_part_without_the_passes_has_no_fault(tmp_path: Path) -> None:
    other = section(80, stand_ins(tmp_path))
    assert not faults(other), faults(other)
    assert not other["kernels"][0]["launched_by"]


@needs_nvcc
def test_a_pass_that_declines_its_part_is_found(tmp_path: Path) -> None:
    """Negative control."""
    found = faults(section(90, stand_ins(tmp_path, ("if (major != 9)", "if (major != 8)", ""))))
    assert f"row_pass bf16 D64, own values returns error {launches.NOT_SUPPORTED}" in found, found


@needs_nvcc
def test_what_does_not_compile_says_why(tmp_path: Path) -> None:
    (tmp_path / "rows.cu").write_text("int wrong() { return nothing; }\n")
    with pytest.raises(RuntimeError, match=r'(?s)nvcc failed on rows.cu:.*"nothing" is undefined'):
        section(90, tmp_path)


def test_the_flags_are_those_of_the_build() -> None:
    build_script = (ROOT / "setup.py").read_text()
    missing = [flag for flag in toolchain.FLAGS if f'"{flag}"' not in build_script]
    assert not missing, f"setup.py has no {missing}"


def test_without_sources_there_is_no_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "nvcc_version", lambda: "13.0.88")
    with pytest.raises(FileNotFoundError, match=r"has no \.cu file"):
        section(90, tmp_path)


def test_without_nvcc_the_report_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "which", lambda *arguments, **options: None)
    path = tmp_path / "report.json"
    assert compile_report.main(["--arch", "90", "--kernels", "cuda", "--json", str(path)]) == 0
    assert "csrc/cuda is not compiled: nvcc was not found" in capsys.readouterr().out
    assert "nvcc was not found" in json.loads(path.read_text())["cuda"]["absent"]


@pytest.mark.parametrize(("arch", "kept"), [(90, True), (80, False)])
def test_a_report_keeps_the_other_kernels_of_its_part(
    arch: int, kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = {"nvcc": "13.0.88", "kernels": [], "problems": ["row_pass is slow"], "source": "x"}
    monkeypatch.setattr(report, "section", lambda *arguments, **options: made)
    path = tmp_path / "report.json"
    path.write_text(json.dumps({"arch": 90, "triton": "3.7.1", "cuda": {"absent": "an older one"}}))
    assert compile_report.main(["--arch", str(arch), "--kernels", "cuda", "--json", str(path)]) == 1
    assert json.loads(path.read_text()) == {"arch": arch, "cuda": made} | ({"triton": "3.7.1"} if kept else {})


def good_row(**changes: Any) -> dict[str, Any]:
    row = {"kernel": "rows_kernel<256>", "source": "rows.cu", "registers": 168, "given_back": [24], "taken": [240]}
    row |= {"threads": 384, "most_threads": 384, "spills": 0, "static_shared": 1024, "dynamic_shared": 231_424}
    row |= {"unasked_shared": 0, "limit": SHARED_MEMORY[90], "matrix": 8, "bulk_copies": 4, "asynchronous_copies": 0}
    row |= {"multicast_copies": 0, "cluster": 1}
    row |= {"loops": []}
    return row | {"remarks": [], "launched_by": ["row_pass bf16 D256, own values"]} | changes


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"spills": 3}, "spills 3 times"),
        ({"static_shared": 1040}, "takes 232464 bytes of shared memory; the part has 232448"),
        ({"unasked_shared": 16}, "16 bytes more dynamic shared memory than was asked for"),
        ({"threads": 512, "registers": 120}, "launched with 512 threads; its bounds allow 384"),
        ({"registers": 169}, "takes 176 registers for 384 threads; a multiprocessor has 65536"),
        ({"given_back": [40]}, "asks for 2 x 240 + 40 registers by warpgroup, 66560 in all; its launch has 64512"),
        ({"given_back": []}, "takes registers, and none that gives any back"),
        ({"cluster": 2}, "has 0 copies into several blocks; it is launched in clusters of 2"),
        ({"multicast_copies": 3}, "has 3 copies into several blocks; it is launched in clusters of 1"),
        ({"remarks": ["ptxas info: serialized"]}, "rows_kernel<256> in rows.cu: ptxas info: serialized"),
    ],
)
def test_a_fault_is_found(changes: dict[str, Any], said: str) -> None:
    """Negative control; 512 threads are four warpgroups, which ask for more registers as well."""
    found = faults({"kernels": [good_row(), good_row(**changes)], "problems": []})
    assert any(said in fault for fault in found), f"{found}"
    assert len(found) <= 2, f"{found}"


@pytest.mark.parametrize("changes", [{}, {"threads": None}, {"given_back": [], "taken": []}, {"unasked_shared": -9}])
def test_what_is_no_fault_is_not_found(changes: dict[str, Any]) -> None:
    found = faults({"kernels": [good_row(**changes)], "problems": []})
    assert not found, found


@pytest.mark.parametrize(
    ("case", "said"),
    [
        (Case("rows", error=1), "rows returns error 1"),
        (Case("rows", problems=["too wide"]), "rows: too wide"),
        (Case("rows"), "rows launches 0 kernels, 0 of them compiled"),
        (Case("rows", [Launch("k", (1, 1, 1), 128, 0, 0)]), "rows launches 1 kernels, 0 of them compiled"),
    ],
    ids=["error", "problem", "no launch", "unknown kernel"],
)
def test_a_wrong_launch_is_found(case: Case, said: str) -> None:
    """Negative control."""
    found = list(report._problems([case], [], 90))
    assert any(said in problem for problem in found), found


def test_recorded_lines_are_read() -> None:
    printed = [
        {"case": "a", "kernel": "k", "grid": [2, 3, 1], "threads": 64, "dynamic_shared": 7, "allowed_shared": 9}
        | {"cluster": 2},
        {"case": "a", "error": 0},
        {"case": "b", "problem": "no"},
        {"case": "b", "error": 801},
    ]
    cases = parsed("\n".join(json.dumps(line) for line in printed))
    assert cases == [Case("a", [Launch("k", (2, 3, 1), 64, 7, 9, 2)]), Case("b", problems=["no"], error=801)]


@pytest.mark.parametrize(
    ("symbol", "name"),
    [
        ("_ZN3vmf4cuda11rows_kernelILNS0_7ElementE0ELi256EEEvPKfi", "rows_kernel<(Element)0, 256>"),
        ("_ZN3vmf4cuda12_GLOBAL__N_14packEPf", "pack"),
        ("plain_c", "plain_c"),
    ],
)
def test_names_are_readable(symbol: str, name: str) -> None:
    assert readable(symbol) == name


def test_the_assembler_s_remarks_go_to_their_kernels() -> None:
    log = """ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized in '_Z4rowsv'
ptxas /tmp/x.ptx, line 12; warning : Advisory: everything is slow
rows.cu(3): warning #177-D: variable "x" was declared but never referenced"""
    assert toolchain._remarks(log, "_Z4rowsv") == (
        "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized in 'it'",
        "ptxas warning : Advisory: everything is slow",
    )
    assert toolchain._remarks(log, "_Z7columnsv") == ("ptxas warning : Advisory: everything is slow",)


@pytest.mark.parametrize(
    ("old", "new", "changes"),
    [
        ("// The smallest kernels that", "// Kernels that", False),
        ("sums[0] + sums[1]", "sums[0]\n    +/* the second */sums[1]", False),
        ("sums[0] + sums[1]", "sums[0] - sums[1]", True),
        ("240", "232", True),
    ],
    ids=["comment", "formatting", "code", "assembly"],
)
def test_only_code_changes_the_digest(old: str, new: str, changes: bool, tmp_path: Path) -> None:
    path = tmp_path / "rows.cu"
    path.write_text(text := SMALLEST.read_text())
    assert old in text
    before = source_digest(tmp_path)
    path.write_text(text.replace(old, new))
    assert (source_digest(tmp_path) != before) is changes


def test_the_table_has_a_cell_for_every_column() -> None:
    lines = table([good_row(), good_row(threads=None, launched_by=[])]).splitlines()
    assert len({line.count("|") for line in lines}) == 1, "\n".join(lines)
    assert "| 24 / 240 |" in lines[2]


@pytest.fixture(params=ARCHITECTURES, ids=lambda arch: f"sm_{arch}")
def committed(request: pytest.FixtureRequest) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((COMMITTED / f"sm_{request.param}.json").read_text())
    assert "kernels" in found.get("cuda", {}), f"csrc/cuda is not in it; {regenerate(request.param)}"
    return found


def regenerate(arch: int) -> str:
    path = f"bench/results/compiled/sm_{arch}.json"
    return f"regenerate it: python -m bench.compile_report --arch {arch} --kernels cuda --json {path}"


def test_the_committed_report_is_of_this_code(committed: dict[str, Any]) -> None:
    assert committed["cuda"]["source"] == source_digest(), f"csrc/cuda has changed; {regenerate(committed['arch'])}"


def test_the_committed_report_has_no_fault(committed: dict[str, Any]) -> None:
    found = faults(committed["cuda"])
    assert not found, found


def test_the_committed_report_covers_the_passes(committed: dict[str, Any]) -> None:
    rows = committed["cuda"]["kernels"]
    assert {row["source"] for row in rows} == {path.name for path in SOURCES.glob("*.cu")}
    launched = {case for row in rows for case in row["launched_by"]}
    assert len(launched) == (LAUNCHES if committed["arch"] == report.STREAMING_ARCH else 0)


def test_the_committed_report_has_clusters_where_blocks_pair_up() -> None:
    rows = json.loads((COMMITTED / "sm_90.json").read_text())["cuda"]["kernels"]
    paired = [case for row in rows if row["cluster"] == 2 for case in row["launched_by"]]
    alone = [case for row in rows if row["cluster"] == 1 for case in row["launched_by"] if "in clusters" in case]
    assert len(paired) == 2 * 4 * (3 + 2), paired  # elements, widths from 128, modes with sums over values
    assert all(any(word in case for word in ("D64", "no values", "usage", "odd")) for case in alone), alone
