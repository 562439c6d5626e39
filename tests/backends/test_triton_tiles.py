"""The Triton backend's tiles: how the embedding dim is cut, which entry of the table a pass uses, and the table itself.

Legend: R rows, K prototypes, D embedding dim.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, fields
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmf_kernels.backends.triton import launch, tiles
from vmf_kernels.backends.triton.launch import INTERPRETER_ARCH, Target
from vmf_kernels.backends.triton.passes import shared_out
from vmf_kernels.backends.triton.prototypes import PackedPrototypes
from vmf_kernels.backends.triton.tiles import (
    FEW_ROWS,
    MAX_DIM,
    MOST_SPLITS,
    NOTE,
    PASSES,
    PRECISIONS,
    ROW_PASSES,
    WIDEST_CHUNK,
    WIDTHS,
    Layout,
    Tile,
    family,
    has_tile,
    layout_of,
    pad_to,
    precision_of,
    split_count,
    tile_of,
)

pytestmark = pytest.mark.quick

FAMILIES = ("80", "86", "90", "100")
# Wide fp32, of which the smallest blocks there are, 16 rows and 16 prototypes, spill or take more than the shared memory.
UNSERVED = {
    ("80", "tf32", 1024),
    ("86", "tf32", 768),
    ("86", "tf32", 1024),
    ("86", "ieee", 768),
    ("86", "ieee", 1024),
}
HOPPER = Target(90, 132)
# how long a draw takes says how busy the machine is, not whether the property holds
UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
SPLIT_ARGUMENTS = {
    "row_blocks": st.integers(1, 2000),
    "prototype_blocks": st.integers(1, 10_000),
    "multiprocessors": st.integers(1, 160),
    "most": st.integers(1, 1000),
}


def next_power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def entries() -> Iterator[tuple[str, str, int, str, Mapping[str, Any]]]:
    """Family, precision, width, name and fields of every entry of the shipped table."""
    for part, of_precision in tiles.table().items():
        for precision, of_width in of_precision.items():
            for width, of_name in of_width.items():
                for name, entry in of_name.items():
                    yield part, precision, int(width), name, entry


def offenders(is_right: Callable[[str, int, str, Mapping[str, Any]], bool]) -> list[str]:
    """Entries for which ``is_right(precision, width, name, entry)`` is not so."""
    return [
        f"{part} {precision} {width} {name}: {dict(entry)}"
        for part, precision, width, name, entry in entries()
        if not is_right(precision, width, name, entry)
    ]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_dim_fits_its_layout_with_less_padding_than_a_power_of_two_would_have(precision: str) -> None:
    for dim in range(2, MAX_DIM + 1):
        layout = layout_of(dim, precision)
        assert dim <= layout.width <= max(16, next_power_of_two(dim)), f"D = {dim}: {layout}, {layout.width} wide"


@pytest.mark.parametrize("precision", PRECISIONS)
def test_chunks_are_powers_of_two_up_to_the_widest(precision: str) -> None:
    for dim in range(2, MAX_DIM + 1):
        layout = layout_of(dim, precision)
        assert layout.chunk == next_power_of_two(layout.chunk), f"D = {dim}: {layout}"
        assert 16 <= layout.chunk <= WIDEST_CHUNK[precision], f"D = {dim}: {layout}"


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("width", WIDTHS)
def test_the_widths_of_the_table_have_no_padding(width: int, precision: str) -> None:
    layout = layout_of(width, precision)
    assert layout.width == width, f"{layout}, {layout.width} wide"


@pytest.mark.parametrize(
    ("dim", "chunk", "chunks"), [(2, 16, 1), (192, 64, 3), (200, 256, 1), (384, 128, 3), (768, 256, 3), (1024, 256, 4)]
)
def test_three_quarters_of_a_power_of_two_are_three_chunks(dim: int, chunk: int, chunks: int) -> None:
    layout = layout_of(dim, "16-bit")
    assert (layout.chunk, layout.chunks) == (chunk, chunks)


@pytest.mark.parametrize(
    ("arch", "expected"),
    [(80, "80"), (86, "86"), (87, "80"), (89, "86"), (90, "90"), (100, "100"), (103, "100"), (120, "86"), (121, "86")],
)
def test_a_family_has_the_same_amount_of_shared_memory(arch: int, expected: str) -> None:
    assert family(arch) == expected


@pytest.fixture
def restored_switches() -> Iterator[None]:
    """Torch's switches of fp32 products as they were."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    yield
    torch.set_float32_matmul_precision("highest")  # so that the older switches agree with each other again
    matmul.fp32_precision = before


def through_the_newer_switch(on: bool) -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32" if on else "ieee"


def through_the_matmul_precision(on: bool) -> None:
    torch.set_float32_matmul_precision("high" if on else "highest")


def through_the_oldest_switch(on: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = on


@pytest.mark.parametrize(
    "switch",
    [through_the_newer_switch, through_the_matmul_precision, through_the_oldest_switch],
    ids=lambda switch: switch.__name__,
)
def test_fp32_products_are_formed_as_torch_is_set_to(switch: Callable[[bool], None], restored_switches: None) -> None:
    chosen = []
    for on in (True, False, True):
        switch(on)
        chosen.append(precision_of(torch.float32))
    assert chosen == ["tf32", "ieee", "tf32"]


def test_fp32_products_are_exact_unless_told_otherwise(restored_switches: None) -> None:
    torch.backends.cuda.matmul.fp32_precision = "none"
    assert precision_of(torch.float32) == "ieee"


def test_both_kinds_of_switch_may_have_been_used(restored_switches: None) -> None:
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    assert precision_of(torch.float32) == "tf32"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_does_not_depend_on_the_switches(dtype: torch.dtype, restored_switches: None) -> None:
    torch.set_float32_matmul_precision("high")
    assert precision_of(dtype) == "16-bit"


@UNHURRIED
@given(**SPLIT_ARGUMENTS)
def test_splits_stay_within_their_bounds(
    row_blocks: int, prototype_blocks: int, multiprocessors: int, most: int
) -> None:
    splits = split_count(row_blocks, prototype_blocks, multiprocessors, most)
    assert 1 <= splits <= min(prototype_blocks, most, MOST_SPLITS), f"{splits} splits"


@UNHURRIED
@given(**SPLIT_ARGUMENTS)
def test_no_split_is_empty(row_blocks: int, prototype_blocks: int, multiprocessors: int, most: int) -> None:
    """After rounding to whole blocks as ``passes.row_pass`` does; nor do they become more than the workspace holds."""
    asked = split_count(row_blocks, prototype_blocks, multiprocessors, most)
    split_blocks = -(-prototype_blocks // asked)
    splits = -(-prototype_blocks // split_blocks)
    last = prototype_blocks - (splits - 1) * split_blocks
    assert 1 <= last <= split_blocks, f"{splits} splits of {split_blocks} leave {last} blocks to the last one"
    assert splits <= asked, f"{splits} splits, {asked} asked for"


@UNHURRIED
@given(**SPLIT_ARGUMENTS, part_blocks=st.floats(0, 20))
def test_no_number_of_splits_takes_less_time(
    row_blocks: int, prototype_blocks: int, multiprocessors: int, most: int, part_blocks: float
) -> None:
    """Time in blocks of prototypes that a multiprocessor passes one after the other; parts are merged at memory's rate."""

    def time(splits: int) -> float:
        waves = math.ceil(row_blocks * splits / multiprocessors)
        return waves * math.ceil(prototype_blocks / splits) + row_blocks * splits / multiprocessors * part_blocks

    chosen = split_count(row_blocks, prototype_blocks, multiprocessors, most, part_blocks)
    counts = range(1, min(prototype_blocks, most, MOST_SPLITS) + 1)
    best = min(counts, key=time)
    assert (chosen, time(chosen)) == (best, time(best)), (
        f"{chosen} splits take {time(chosen)}, {best} take {time(best)}"
    )


@pytest.mark.parametrize(
    ("rows", "width", "tile", "splits"),
    [
        # one wave of 256 blocks of prototypes, or three of 79: 7 % fewer, which merging 13 parts does not cost
        (3840, 256, Tile(128, 64), 13),
        (3840, 384, Tile(128, 64, parts=2), 11),
        (16_384, 256, Tile(128, 64), 1),
        (640, 256, Tile(128, 64), 26),
        (128, 256, Tile(128, 64), 128),
    ],
)
def test_splits_of_the_workloads(rows: int, width: int, tile: Tile, splits: int) -> None:
    """On 132 multiprocessors, K = 65,536, with a barycentre; worked out by hand from the waves and the workspace."""
    keys = PackedPrototypes(
        torch.empty(65_536, width), torch.empty(0), torch.empty(0), 65_536, Layout(width, 1, "16-bit"), False
    )
    with mock.patch.object(launch, "target_of", return_value=HOPPER):
        assert shared_out(torch.empty(rows, width), keys, keys, tile)[0] == splits


@pytest.mark.parametrize("rows", [1, FEW_ROWS, FEW_ROWS + 1, None])
def test_only_few_rows_take_the_tile_for_few(rows: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    many, few = Tile(128, 64), Tile(16, 32, warps=8)
    made = {"student": asdict(many), "student few": asdict(few) | {NOTE: "a test"}}
    monkeypatch.setattr(tiles, "table", lambda: {"90": {"16-bit": {"256": made}}})
    expected = few if rows is not None and rows <= FEW_ROWS else many
    assert tile_of("student", HOPPER, "16-bit", 200, rows) == expected


def test_without_a_tile_for_few_rows_there_is_the_one_for_many(monkeypatch: pytest.MonkeyPatch) -> None:
    made = {"student": asdict(Tile(128, 64))}
    monkeypatch.setattr(tiles, "table", lambda: {"90": {"16-bit": {"64": made}}})
    assert tile_of("student", HOPPER, "16-bit", 2, 1) == Tile(128, 64)


def test_a_pass_has_a_tile_where_the_table_has_an_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    made = {"columns": asdict(Tile(32, 32))}
    monkeypatch.setattr(tiles, "table", lambda: {"90": {"16-bit": {"256": made, "384": {}}}})
    assert has_tile("columns", HOPPER, "16-bit", 256)
    assert not has_tile("student", HOPPER, "16-bit", 256), "there is no entry of this pass"
    assert not has_tile("columns", HOPPER, "16-bit", 257), "there is no entry of this width"
    assert not has_tile("columns", HOPPER, "tf32", 256), "there is no entry of this precision"


@pytest.mark.parametrize("part", FAMILIES)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", PASSES)
def test_the_shipped_table_has_a_tile_for_every_dim(name: str, precision: str, part: str) -> None:
    of_width = tiles.table()[part].get(precision, {})
    missing = {
        width
        for width in WIDTHS
        if (part, precision, width) not in UNSERVED and name not in of_width.get(str(width), {})
    }
    assert not missing, f"{part} {precision}: no {name} for {sorted(missing)}"


def test_what_the_table_does_not_serve_is_named() -> None:
    """The list of exceptions holds nothing that has become possible."""
    served = {
        (part, precision, width)
        for part, precision, width in UNSERVED
        if set(PASSES) <= tiles.table()[part].get(precision, {}).get(str(width), {}).keys()
    }
    assert not served, f"{served} have tiles now"


def test_every_shipped_entry_is_a_tile_of_a_pass() -> None:
    known = {field.name for field in fields(Tile)}
    names = {*PASSES, *(f"{name} few" for name in ROW_PASSES)}
    wrong = offenders(lambda precision, width, name, entry: name in names and entry.keys() - {NOTE} == known)
    assert not wrong, f"{wrong}"


def test_what_chose_an_entry_is_said_of_it_only_if_it_is_not_what_chose_the_others() -> None:
    of_all = json.loads(tiles.TABLE_PATH.read_text())[NOTE]
    wrong = offenders(lambda precision, width, name, entry: entry.get(NOTE, "something else") not in ("", of_all))
    assert of_all, "nothing is said"
    assert not wrong, f"{wrong}"


def test_every_shipped_tile_divides_the_padding() -> None:
    padding = pad_to(HOPPER)
    wrong = offenders(
        lambda precision, width, name, entry: (
            padding % entry["prototypes"] == 0 and entry["rows"] == next_power_of_two(entry["rows"])
        )
    )
    assert not wrong, f"sides that leave a part of a block: {wrong}"


def test_every_shipped_tile_divides_the_chunks_of_every_dim_it_serves() -> None:
    """A part with a fraction of a chunk would leave columns out."""

    def is_right(precision: str, width: int, name: str, entry: Mapping[str, Any]) -> bool:
        narrower = max((other for other in WIDTHS if other < width), default=1)
        chunks = {layout_of(dim, precision).chunks for dim in range(narrower + 1, width + 1)}
        return all(count % entry["parts"] == 0 for count in chunks)

    wrong = offenders(is_right)
    assert not wrong, f"parts that do not divide the chunks: {wrong}"


def test_shipped_passes_that_have_no_parts_are_whole() -> None:
    wrong = offenders(
        lambda precision, width, name, entry: entry["parts"] == 1 or name.removesuffix(" few") != "scores"
    )
    assert not wrong, f"passes that cannot share the columns: {wrong}"


def test_shipped_tiles_for_few_rows_hold_few() -> None:
    wrong = offenders(
        lambda precision, width, name, entry: not name.endswith(" few") or entry["rows"] <= FEW_ROWS,
    )
    assert not wrong, f"more than {FEW_ROWS} rows: {wrong}"


def test_shipped_descriptors_are_for_parts_that_have_them() -> None:
    wrong = [f"{part} {name}" for part, _, _, name, entry in entries() if entry["tma"] and int(part) < 90]
    assert not wrong, f"tensor descriptors before sm_90: {wrong}"


@pytest.mark.parametrize("name", PASSES)
def test_the_interpreters_tiles_divide_its_padding(name: str) -> None:
    target = Target(INTERPRETER_ARCH, 2)
    tile = tile_of(name, target, "16-bit", 24)
    assert pad_to(target) % tile.prototypes == 0, f"{tile}"
