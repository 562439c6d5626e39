"""First light without a GPU: its inputs and exact results, stand-ins for its kernels, and its processes with their faults."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import bench.first_light as program
from bench.light import child, columns, exact, inputs, rows
from bench.light.stand import Stand
from bench.light.variants import KERNELS, Variant, parsed, variants
from tests.backends.cuda_stand_in import Damage, standing_in
from tests.backends.interpreted import correct_bf16
from vmf_kernels.backends.triton.tiles import Tile

CPU = torch.device("cpu")
SMALLEST_WEIGHT = 2.0**-14  # the least normal number of fp16
FAULTY = ["cuda/rows-keys/fp16/64", "cuda/columns/fp16/64", "cuda/rows-own/fp16/64", "cuda/usage/fp16/64"]
FAULTY += ["cuda/pack/fp16/64", "cuda/rows-scores/fp16/64"]

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the kernels run on the GPU here: bench/first_light.py"
)


def test_there_are_fifty_passes_of_the_cuda_kernels_and_five_dims_of_tritons() -> None:
    passes = [one for one in variants("cuda") if one.kernels == "cuda" and one.family not in ("pack", "pull-back")]
    assert len(passes) == 50
    assert {one.dim for one in variants("triton")} == {24, 64, 128, 256, 384}
    assert passes[0].name == "cuda/rows-scores/bf16/256", "the most telling width comes first"
    assert all(parsed(one.name) == one for one in variants("all"))
    assert all(one.family in child.FAMILIES for one in variants("all"))


def test_the_inputs_are_the_same_everywhere() -> None:
    """What was written on another machine is read by these."""
    assert inputs.hashed(4, 1).tolist() == [301794027, 2789948889, 2117216093, 1959625965]
    sparse = inputs.sparse_signs(50, 24, 6, 1)
    assert (abs(sparse).sum(axis=1) == 6).all()
    assert sorted(np.unique(sparse)) == [-1, 0, 1]


class Sizes:
    """``operator.Kernels`` that have nothing but the sizes of csrc/cuda."""

    def tile(self, *_: Any) -> Tile:
        return Tile(128, 256)


def stand_of(name: str, say: Callable[..., None] = lambda *_: None, kernels: Any = None) -> Stand:
    return Stand(parsed(name), kernels or Sizes(), CPU, say)


def test_the_row_pass_at_the_sizes_of_a_gpu_is_exact_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stand, "keys_of_tile", lambda *_, own_values: 64)
    stand = stand_of("cuda/rows-own/bf16/256")
    stand.toy = False
    for case in (rows.CASES[1], rows.CASES[2], rows.CASES[4]):
        problem, _, _ = rows.problem_of(stand, case, "own")
        known = rows.expected(problem, "own", has_value_bias=True)["barycentre"]
        first = rows.logits_of(problem.rows, problem.keys, problem.bias, 0.5)[:, : problem.split_size]
        weights = np.exp2(first - first.max(axis=1)[:, None])
        assert weights[weights > 0].min() >= SMALLEST_WEIGHT
        in_fp32 = weights.astype(np.float32) @ problem.values[: problem.split_size].astype(np.float32)
        np.testing.assert_array_equal(in_fp32, known.value[0])


def test_the_base_2_scales_are_powers_of_two_as_the_device_forms_them() -> None:
    stand = stand_of("cuda/rows-own/bf16/64")
    for scale in {*rows.SCALES.values(), *columns.SCALES.values()}:
        assert np.float32(1.0 / stand.temperature(scale).item() * inputs.LOG2_E) == scale


def results_of(names: list[str], folder: Path, damage: Damage = lambda name, arguments: None) -> dict[str, Any]:
    """What the process says of variants, in this one."""
    out = io.StringIO()
    with standing_in(damage), correct_bf16(), np.errstate(all="ignore"):
        child.serve(io.StringIO("\n".join(names)), out, CPU, folder)
    said = [json.loads(line) for line in out.getvalue().splitlines()]
    assert said[0]["state"] == "ready"
    assert {one["state"] for one in said} >= {"preparing", "compiling", "done"}
    return {one["name"]: one["result"] for one in said if one["state"] == "done"}


def test_every_family_is_right_on_the_stand_ins(tmp_path: Path) -> None:
    names = [one.name for one in variants("cuda") if one.kernels == "cuda" and (one.element, one.dim) == ("bf16", 64)]
    names += [f"triton/{family}/fp16/24" for family in ("rows-own", "columns", "usage")]
    results = results_of(names, tmp_path)
    assert {name: result["status"] for name, result in results.items()} == dict.fromkeys(names, "right")
    assert results["cuda/rows-own/bf16/64"]["largest_error"] == 0
    assert len(results["cuda/rows-own/bf16/64"]["cases"]) == len(rows.TOY_CASES)


def without_value_bias(name: str, arguments: dict[str, Any]) -> None:
    arguments["value_bias"] = 0


def another_bias(name: str, arguments: dict[str, Any]) -> None:
    arguments["bias"] = arguments["value_bias"] or arguments["bias"]


def rows_for_cotangents(name: str, arguments: dict[str, Any]) -> None:
    arguments["cotangents"] = arguments["teacher"].features


def test_a_wrong_pass_is_found_and_saved(tmp_path: Path) -> None:
    rows_own, both = "cuda/rows-own/fp16/64", "cuda/columns/fp16/64"
    for name, damage, tensors, words in (
        (rows_own, without_value_bias, {"statistics"}, "only statistic 3 of 4"),
        (rows_own, another_bias, {"statistics", "barycentre"}, "the weights themselves are wrong"),
        (both, rows_for_cotangents, {"vectors"}, "logits are right, the second product is not"),
    ):
        result = results_of([name], tmp_path, damage)[name]
        assert result["status"] == "wrong", damage
        assert {one["tensor"] for one in result["differences"]} == tensors, damage
        assert words in program.line_of(name, result | {"at_seconds": 0.0})
        saved = np.load(result["saved"])
        case = result["differences"][0]
        got = saved[f"{case['case']}, {case['tensor']}, got"]
        assert tuple(saved[f"{case['case']}, {case['tensor']}, shape"]) == tuple(case["shape"])
        first = case["first"][0]
        assert got[np.ravel_multi_index(first["at"], case["shape"])] == np.float32(first["got"])


def test_a_kernel_that_raises_is_recorded(tmp_path: Path) -> None:
    def damage(name: str, arguments: dict[str, Any]) -> None:
        raise RuntimeError("the row pass failed: an illegal memory access was encountered")

    result = results_of(["cuda/usage/fp16/64"], tmp_path, damage)["cuda/usage/fp16/64"]
    assert result["status"] == "failed"
    assert "an illegal memory access" in result["reason"]


def test_kernels_that_the_library_does_not_have_are_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = KERNELS["cuda-clusters"]._replace(attribute="NOTHING")
    monkeypatch.setitem(KERNELS, "cuda-clusters", source)
    result = child.attempt(parsed("cuda-clusters/usage/fp16/64"), CPU, lambda *_, **__: None, tmp_path)
    assert (result["status"], "has no NOTHING" in result["reason"]) == ("absent", True)


def run_once(write: Callable[[Tensor], object]) -> Stand:
    """A stand after launches of something that is to leave zeros."""
    stand = stand_of("cuda/usage/bf16/64")

    def launch() -> dict[str, Tensor]:
        room = stand.poisoned("usage", 256)
        room.zero_()
        write(room)
        return {"usage": room}

    stand.run("one", launch, {"usage": exact.Exact(np.zeros(256), np.zeros(256), ("prototype",))})
    return stand


def test_what_is_written_outside_and_what_changes_between_launches_is_noted() -> None:
    launches = iter(range(10))
    beyond = lambda room: room.as_strided((257,), (1,), room.storage_offset())[256:].fill_(1.0)  # noqa: E731
    assert run_once(lambda room: None).notes == []
    assert run_once(beyond).notes[0] == "one: 1 elements before or after usage are written to"
    changing = run_once(lambda room: room[3:4].fill_(float(next(launches))))
    assert changing.notes == ["one: launch 2 gives another usage than launch 1"]
    assert [one.report["first"][0]["at"] for one in changing.differences] == [[3]]
    unwritten = run_once(lambda room: room[5:6].fill_(float("nan")))
    assert unwritten.differences[0].report["nan"] == 1


@pytest.fixture
def faulty_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., SimpleNamespace]:
    """Runs the program with the made-up process; exit code, record, lines, and what was printed."""

    def run(*arguments: str) -> SimpleNamespace:
        command = ["--dry-run", "--out", str(tmp_path), "--child", "tests.bench.first_light_child", "--kernels", "cuda"]
        code = program.main([*command, *arguments])
        record = json.loads((tmp_path / "first_light.json").read_text())
        lines = (tmp_path / "first_light.txt").read_text()
        assert capsys.readouterr().out == lines, "what is printed and what is kept"
        return SimpleNamespace(code=code, results=record["results"], summary=record["summary"], lines=lines)

    return run


def test_one_that_hangs_dies_or_is_wrong_spoils_no_other(faulty_run: Callable[..., SimpleNamespace]) -> None:
    start = time.monotonic()
    run = faulty_run("--seconds", "60", "--hang-seconds", "0.5", "--workers", "1", "--only", *FAULTY)
    statuses = {name: result["status"] for name, result in run.results.items()}
    expected = dict(zip(FAULTY, ("hung", "died", "wrong", "right", "right", "right"), strict=True))
    assert statuses == expected, run.lines
    assert run.results[FAULTY[0]]["reason"].startswith("launched (one) for 0.5")
    assert "exit code -6: last words" in run.results[FAULTY[1]]["reason"]
    assert run.results[FAULTY[4]]["after_others"] == {"status": "wrong"}, "pack is right in a process of its own"
    assert run.code == 1
    assert run.summary == {"cuda": {"right": 3, "hung": 1, "died": 1, "wrong": 1}}
    assert time.monotonic() - start < 20, "the one that hangs was not ended"


def test_what_is_not_reached_is_neither_right_nor_wrong(faulty_run: Callable[..., SimpleNamespace]) -> None:
    run = faulty_run("--seconds", "3.0", "--workers", "1", "--only", *FAULTY[3:4], FAULTY[0])
    assert run.code == 2
    assert run.results[FAULTY[0]]["status"] == "not reached"
    right = faulty_run("--seconds", "60", "--workers", "1", "--only", FAULTY[3])
    assert right.code == 0


def test_where_no_process_starts_nothing_is_right(faulty_run: Callable[..., SimpleNamespace]) -> None:
    run = faulty_run("--seconds", "60", "--workers", "1", "--module", "a file", "--only", *FAULTY)
    assert run.code == 2
    assert run.summary == {"cuda": {"unavailable": len(FAULTY)}}
    assert run.lines.count("the process does not start: that module is of another Python") == 1
    assert run.lines.count("no process starts") == 1, "after some it is not tried again"


def test_the_rehearsal_runs_the_process_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    only = ["cuda/rows-own/fp16/64", "triton/usage/fp16/24"]
    code = program.main(["--dry-run", "--out", str(tmp_path), "--workers", "1", "--only", *only])
    printed = capsys.readouterr().out
    assert code == 0, printed
    assert len([line for line in printed.splitlines() if line.startswith("right")]) == len(only)


def test_the_saved_tensors_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "SAVED_BYTES", 3000)
    log = program.Log(tmp_path / "out", [Variant("cuda", "usage", "fp16", 64)] * 3, {})
    kept = []
    for i in range(3):
        np.savez_compressed(tmp_path / "one.npz", got=inputs.hashed(300, i))  # some 1.4 kB
        kept.append(log.keep(f"variant {i}", tmp_path / "one.npz"))
    assert kept == [True, True, False]
    saved = np.load(tmp_path / "out" / "first_light.npz")
    np.testing.assert_array_equal(saved["variant 1, got"], inputs.hashed(300, 1))


def test_a_name_that_no_variant_has_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        SystemExit, match=r"no variant of cuda has rows-none in its name, such as cuda/columns/bf16/256"
    ):
        program.main(["--out", str(tmp_path), "--kernels", "cuda", "--only", "rows-none"])
