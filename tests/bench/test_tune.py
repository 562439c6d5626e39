"""The search for tile sizes: the candidates, their order, and the written table; nothing is compiled or timed here."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import tune
from bench.ahead_of_time import SHARED_MEMORY, TENSOR_MEMORY, Compiled
from bench.pass_case import PassCase
from bench.tune import (
    EXPECTED,
    MEASURED,
    MEASURED_PAIRS,
    candidates,
    entry_names,
    expected_cost,
    goes_in_pairs,
    is_clean,
    measured_candidates,
    measured_entry,
    measured_times,
    merged,
    write,
)
from tests.backends.test_triton_tiles import UNSERVED
from vmf_kernels.backends.triton.tiles import (
    FEW_ROWS,
    MAX_WIDTH_OF_ANY_CHUNKS,
    NOTE,
    PASSES,
    PRECISIONS,
    TABLE_PATH,
    WIDTHS,
    Tile,
    family,
    layout_of,
)

CPU = torch.device("cpu")
GOOD = Compiled(
    registers=255, spills=0, shared=1, tensor_memory=0, matrix=1, bulk_copies=0, asynchronous_copies=1, loops=()
)
ENTRY = {"rows": 64, "prototypes": 64, NOTE: "a test"}


def every_candidate(precision: str, arch: int = 90) -> list[tuple[str, int, Tile]]:
    return [
        (name, width, tile)
        for name in entry_names()
        for width in WIDTHS
        for tile in candidates(name, precision, width, SHARED_MEMORY[arch])
    ]


@pytest.mark.parametrize("arch", SHARED_MEMORY)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_pass_has_candidates(precision: str, arch: int) -> None:
    found = {(name, width) for name, width, _ in every_candidate(precision, arch)}
    served = [width for width in WIDTHS if (family(arch), precision, width) not in UNSERVED]
    required = {(name, width) for name in PASSES for width in served}
    assert not required - found, f"nothing to try for {sorted(required - found)}"


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", entry_names())
def test_candidates_come_best_first(name: str, precision: str) -> None:
    found = candidates(name, precision, 384, SHARED_MEMORY[90])
    costs = [expected_cost(name.removesuffix(" few"), tile, precision) for tile in found]
    assert costs == sorted(costs)
    assert len(set(found)) == len(found), "a tile is tried twice"


@pytest.mark.parametrize("arch", [86, 90])
def test_candidates_hold_less_than_the_shared_memory(arch: int) -> None:
    """At the very least the block that stays and the stages of one that streams, in 2-byte elements."""
    limit = SHARED_MEMORY[arch]
    least = {
        (name, width, tile): 2 * width * (tile.rows + tile.stages * tile.prototypes)
        for name, width, tile in every_candidate("16-bit", arch)
        if name.startswith("s")
    }
    over = {candidate: size for candidate, size in least.items() if size > limit}
    assert least
    assert not over, f"{over}, limit {limit}"


@pytest.mark.parametrize("precision", PRECISIONS)
def test_sums_fit_the_registers(precision: str) -> None:
    """The fp32 sums of a row pass alone: [rows, D / parts] over 32 threads a warp, of 255 registers."""
    needed = {
        (name, width, tile): tile.rows * width / tile.parts / (32 * tile.warps)
        for name, width, tile in every_candidate(precision)
        if name.startswith(("student", "teacher"))
    }
    over = {candidate: count for candidate, count in needed.items() if count > 255}
    assert not over, f"{over}"


@pytest.mark.parametrize("name", ["student few", "teacher few", "scores few"])
def test_candidates_for_few_rows_hold_few(name: str) -> None:
    most = max(tile.rows for each, _, tile in every_candidate("16-bit") if each == name)
    assert most <= FEW_ROWS, f"{most} rows, at most {FEW_ROWS} are few"


@pytest.mark.parametrize("precision", PRECISIONS)
def test_parts_divide_the_chunks_of_every_dim_of_a_width(precision: str) -> None:
    """Of D = 193 to 256, all served by the entries of 256, only some have an even number of chunks."""
    shared = [(name, width, tile) for name, width, tile in every_candidate(precision) if tile.parts > 1]
    assert shared
    for name, width, tile in shared:
        narrower = max(other for other in WIDTHS if other < width)
        counts = {layout_of(dim, precision).chunks for dim in range(narrower + 1, width + 1)}
        assert width > MAX_WIDTH_OF_ANY_CHUNKS, f"{name} {width} {tile}"
        assert all(count % tile.parts == 0 for count in counts), f"{name} {width} {tile}: {counts} chunks"
        assert name not in ("scores", "scores few"), f"{name} cannot share the columns"


@pytest.mark.parametrize(
    ("name", "cheaper", "dearer"),
    [
        ("student", Tile(128, 32), Tile(64, 32)),
        ("student", Tile(64, 64), Tile(64, 32)),
        ("columns", Tile(32, 128), Tile(32, 64)),
        ("columns", Tile(64, 64), Tile(32, 64)),
        ("teacher", Tile(64, 64, parts=1), Tile(64, 64, parts=2)),
        ("teacher", Tile(64, 64, stages=3), Tile(64, 64, stages=2)),
        ("teacher", Tile(64, 64, stages=2), Tile(64, 64, stages=1)),
        ("scores", Tile(64, 64, warps=4), Tile(64, 64, warps=8)),
        ("scores", Tile(128, 64, warps=8), Tile(128, 64, warps=4)),
    ],
    ids=[
        "more rows that stay",
        "more prototypes that stream",
        "more prototypes that stay",
        "more rows that stream",
        "no logits twice",
        "a longer pipeline",
        "a pipeline",
        "a warpgroup for 64 rows",
        "two for 128",
    ],
)
def test_the_expected_cost_prefers(name: str, cheaper: Tile, dearer: Tile) -> None:
    costs = [expected_cost(name, tile, "16-bit") for tile in (cheaper, dearer)]
    assert costs[0] < costs[1], f"{cheaper} {costs[0]:.3f}, {dearer} {costs[1]:.3f}"


@pytest.mark.parametrize(
    ("report", "precision", "expected"),
    [
        (GOOD, "16-bit", True),
        (Compiled(**asdict(GOOD) | {"spills": 1}), "16-bit", False),
        (Compiled(**asdict(GOOD) | {"shared": SHARED_MEMORY[90] + 1}), "16-bit", False),
        (Compiled(**asdict(GOOD) | {"tensor_memory": TENSOR_MEMORY + 1}), "16-bit", False),
        (Compiled(**asdict(GOOD) | {"matrix": 0}), "tf32", False),
        (Compiled(**asdict(GOOD) | {"matrix": 0}), "ieee", True),
    ],
    ids=["good", "spills", "shared memory", "tensor memory", "no tensor cores", "none of ieee"],
)
def test_only_a_kernel_without_a_fault_is_clean(report: Compiled, precision: str, expected: bool) -> None:
    assert is_clean(report, precision, 90) is expected


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> list[Tile]:
    """Tiles that were compiled, by one that refuses the first and lets the second spill."""
    seen: list[Tile] = []

    def fake(name: str, precision: str, width: int, tile: Tile, arch: int) -> Compiled:
        seen.append(tile)
        if len(seen) == 1:
            raise RuntimeError("the compiler refuses it")
        return Compiled(**asdict(GOOD) | {"spills": int(len(seen) == 2)})

    monkeypatch.setattr(tune, "compiled", fake)
    return seen


def test_the_expected_entry_is_the_first_clean_candidate(compiler: list[Tile]) -> None:
    entry = tune.expected_entry(("student", "16-bit", 256, 90))
    third = candidates("student", "16-bit", 256, SHARED_MEMORY[90])[2]
    assert entry is not None
    assert asdict(third).items() <= entry.items()
    assert compiler[-1] == third
    assert NOTE not in entry, "what chose it is said once, of the file"


def test_without_a_clean_candidate_there_is_no_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "compiled", lambda *job: Compiled(**asdict(GOOD) | {"spills": 1}))
    assert tune.expected_entry(("student", "16-bit", 256, 90)) is None


@pytest.mark.parametrize("name", ["student", "teacher", "columns"])
@pytest.mark.parametrize("width", [128, 256, 384])
def test_the_best_and_those_that_go_in_pairs_are_measured(name: str, width: int) -> None:
    shared, found = SHARED_MEMORY[90], measured_candidates(name, width, 90)
    best = candidates(name, "16-bit", width, shared)
    pairs = [tile for tile in best if goes_in_pairs(name, tile, width, shared)]
    assert pairs, "nothing goes in pairs"
    assert {*best[:MEASURED], *pairs[:MEASURED_PAIRS]} == {tile for tile in found if not tile.tma}
    assert len(set(found)) == len(found) <= 2 * (MEASURED + MEASURED_PAIRS)


@pytest.mark.parametrize(("arch", "expected"), [(80, False), (86, False), (90, True), (100, True)])
def test_descriptors_are_measured_where_there_are_any(arch: int, expected: bool) -> None:
    found = measured_candidates("student", 256, arch)
    assert any(tile.tma for tile in found) is expected
    assert not all(tile.tma for tile in found)


@pytest.mark.parametrize(
    ("tile", "expected"),
    [
        (Tile(64, 32, warps=4, stages=2), True),
        (Tile(64, 32, warps=8, stages=2), False),
        (Tile(128, 64, warps=4, stages=2), False),
    ],
    ids=["small", "eight warps", "large"],
)
def test_two_small_programs_of_four_warps_go_in_pairs(tile: Tile, expected: bool) -> None:
    assert goes_in_pairs("student", tile, 256, SHARED_MEMORY[90]) is expected


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[str, Tile], float]], None]:
    """``PassCase.median_ms`` from a function of the pass and the tile, on a machine with a made-up GPU."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Imaginary 1")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch, "device", lambda kind: CPU)
    monkeypatch.setattr(PassCase, "results", lambda case, tile: {"usage": torch.ones(3)})

    def set_to(milliseconds: Callable[[str, Tile], float]) -> None:
        monkeypatch.setattr(PassCase, "median_ms", lambda case, tile: milliseconds(case.name, tile))

    return set_to


def test_the_fastest_tile_is_the_entry(clock: Any) -> None:
    favourite = measured_candidates("student", 256, 90)[4]
    clock(lambda name, tile: 2.0 if tile == favourite else 3.0)
    times = measured_times("student", 256, 90, CPU)
    entry = measured_entry("student", 256, times)
    assert asdict(favourite).items() <= entry.items()
    rate = 2.0 * 2 * 3840 * 65_536 * 256 / 2e-3 / 1e12
    expected = f"measured: 2.000 ms, {rate:.0f} TFLOP/s, best of {len(times)} on Imaginary 1, torch {torch.__version__}"
    assert entry[NOTE] == expected


def test_a_tile_that_fails_is_no_candidate(clock: Any) -> None:
    def only_descriptors(name: str, tile: Tile) -> float:
        if not tile.tma:
            raise RuntimeError("out of resources")
        return 1.0

    clock(only_descriptors)
    times = measured_times("student", 256, 90, CPU)
    assert times
    assert all(tile.tma for tile in times), f"{times}"


def test_a_tile_that_computes_something_else_is_no_candidate(clock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = measured_candidates("student", 256, 90)[2]
    clock(lambda name, tile: 1.0)
    monkeypatch.setattr(
        PassCase, "results", lambda case, tile: {"usage": torch.ones(3) * (1.05 if tile == wrong else 1.0)}
    )
    times = measured_times("student", 256, 90, CPU)
    assert wrong not in times
    assert len(times) == len(measured_candidates("student", 256, 90)) - 1


def test_every_pass_is_measured(clock: Any, tmp_path: Path) -> None:
    clock(lambda name, tile: 1.0)
    tune.measured_table(1e6, (128,), tmp_path / "tiles.json")
    entries = json.loads((tmp_path / "tiles.json").read_text())["tiles"]["90"]["16-bit"]["128"]
    assert entries.keys() == set(entry_names())


def test_a_pass_of_which_every_tile_fails_gets_no_entry_and_ends_nothing(clock: Any, tmp_path: Path) -> None:
    def no_teacher(name: str, tile: Tile) -> float:
        if name == "teacher":
            raise RuntimeError("out of resources")
        return 1.0

    clock(no_teacher)
    tune.measured_table(1e6, (128, 256), tmp_path / "tiles.json")
    entries = json.loads((tmp_path / "tiles.json").read_text())["tiles"]["90"]["16-bit"]
    assert {width: set(entry_names()) - of_width.keys() for width, of_width in entries.items()} == {
        "128": {"teacher", "teacher few"},
        "256": {"teacher", "teacher few"},
    }


def test_measuring_ends_with_its_time(clock: Any, tmp_path: Path) -> None:
    clock(lambda name, tile: 1.0)
    tune.measured_table(-1.0, (128,), tmp_path / "tiles.json")
    assert not (tmp_path / "tiles.json").exists()


def test_merging_keeps_other_entries_and_replaces_whole_ones() -> None:
    old = {"90": {"16-bit": {"256": {"student": ENTRY | {"stages": 3}, "teacher": ENTRY}}}, "80": {}}
    new = {"90": {"16-bit": {"256": {"student": ENTRY}, "384": {"student": ENTRY}}, "tf32": {"64": {"scores": ENTRY}}}}
    assert merged(old, new) == {
        "90": {
            "16-bit": {"256": {"student": ENTRY, "teacher": ENTRY}, "384": {"student": ENTRY}},
            "tf32": {"64": {"scores": ENTRY}},
        },
        "80": {},
    }
    assert "stages" in old["90"]["16-bit"]["256"]["student"], "the old table was changed"


def test_a_written_table_keeps_what_the_file_has(tmp_path: Path) -> None:
    path = tmp_path / "tiles.json"
    for width in ("256", "384"):
        write({"90": {"16-bit": {width: {"student": ENTRY}}}}, path)
    written = json.loads(path.read_text())["tiles"]
    assert written == {"90": {"16-bit": {"256": {"student": ENTRY}, "384": {"student": ENTRY}}}}
    assert json.loads(path.read_text())[NOTE] == EXPECTED
    assert [left.name for left in tmp_path.iterdir()] == ["tiles.json"]


def test_the_shipped_table_says_of_its_entries_what_a_written_one_does() -> None:
    assert json.loads(TABLE_PATH.read_text())[NOTE] == EXPECTED


def test_installing_merges_into_the_packages_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped, measured = tmp_path / "shipped.json", tmp_path / "measured.json"
    write({"80": {"16-bit": {"64": {"student": ENTRY}}}}, shipped)
    write({"90": {"16-bit": {"64": {"student": ENTRY}}}}, measured)
    monkeypatch.setattr(tune, "TABLE_PATH", shipped)
    tune.main(["--install", str(measured)])
    assert json.loads(shipped.read_text())["tiles"].keys() == {"80", "90"}


def test_without_a_gpu_or_an_architecture_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        tune.main([])
    assert ended.value.code == 2
    assert "no GPU here to measure on; --arch compiles for one without it" in capsys.readouterr().err
