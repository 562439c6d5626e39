"""The benchmark of the CUDA kernels beside Triton's, without a GPU: made-up kernels, tools and results."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.gpu import counters, head, losses, passes, processes, wins
from bench.gpu.record import Record
from bench.gpu.settings import Settings
from bench.gpu.tables import gpu_table
from bench.gpu.targets import targets
from bench.pass_case import PROTOTYPES, PassCase
from bench.workloads import TOY_HEAD_SHAPES
from vmf_bench.errors import UnavailableError
from vmf_bench.inputs import HeadInputs
from vmf_kernels.backends.choice import BACKENDS
from vmf_kernels.backends.cuda import measured
from vmf_kernels.backends.triton.tiles import Tile

CPU = torch.device("cpu")
CASE = passes.CASES[0]
K = PROTOTYPES
SOURCE = "bench/results/some-gpu/head.json"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(backend="triton", dry=True, deadline=time.monotonic() + 100, out=tmp_path)


class Kernels:
    """Made-up ``operator.Kernels``: a pass takes some time and leaves a number behind."""

    def __init__(self, value: float = 1.0, seconds: float = 0.0) -> None:
        self.value, self.seconds, self.passes = value, seconds, list[str]()

    def tile(self, name: str, features: torch.Tensor, layout: Any) -> Tile:
        return Tile(128, 64)

    def row_pass(self, rows: Any, keys: Any, values: Any, name: str, tile: Tile) -> torch.Tensor:
        self.passes.append(name)
        time.sleep(self.seconds)
        return torch.full((3,), self.value)


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> dict[str, Kernels]:
    """Both backends, on the CPU; what a row pass leaves is its result."""
    kernels = {"triton": Kernels(seconds=4e-3), "cuda": Kernels(1.001, seconds=2e-3)}
    kernels["cuda clusters"] = Kernels(1.001, seconds=1e-3)
    monkeypatch.setattr(passes, "_kernels", kernels.__getitem__)
    for name in ("triton", "cuda"):
        monkeypatch.setattr(BACKENDS[name], "unsupported", lambda rows, weight: None)
    monkeypatch.setattr(PassCase, "results", lambda case, tile, kernels: {"usage": case.run(tile, kernels)})
    monkeypatch.setattr(passes, "SECONDS", 0.01)
    return kernels


def test_a_pass_is_timed_on_both_backends_and_compared(made_up: dict[str, Kernels]) -> None:
    found = passes.measure(CASE, "student", CPU)
    assert found["operations"] == 4 * 3840 * K * 256
    assert found["difference"] == dict.fromkeys(("cuda", "cuda clusters"), pytest.approx(1e-3, rel=1e-3))
    assert found["wrong"] == {}
    for name in made_up:
        assert found[name]["tflops"] == pytest.approx(found["operations"] / found[name]["ms"]["median"] / 1e9)
    assert made_up["cuda"].passes == ["student"] * len(made_up["triton"].passes)
    assert found["cuda"]["ms"]["median"] < found["triton"]["ms"]["median"]


@pytest.mark.parametrize("value", [1.2, float("nan")])
def test_a_wrong_pass_says_where_and_is_timed_all_the_same(value: float, made_up: dict[str, Kernels]) -> None:
    """Negative control."""
    made_up["cuda"].value = value
    found = passes.measure(CASE, "teacher", CPU)
    assert (found["wrong"]["cuda"]["usage"]["wrong"], found["wrong"]["cuda"]["usage"]["of"]) == (3, 3)
    assert found["cuda"]["tflops"] > 0


def test_only_what_is_more_than_rounding_is_a_wrong_element() -> None:
    expected = {"vectors": torch.randn(300, 24), "usage": torch.rand(300)}
    got = {name: tensor * 1.01 for name, tensor in expected.items()}
    got["vectors"][131::16, 5] += 2.0
    got["vectors"][131, 7] = torch.nan
    found = passes.wrong_elements("columns", got, expected)
    assert found.keys() == {"vectors"}
    report = found["vectors"]
    assert (report["wrong"], report["of"], report["nan"], report["window"]) == (12, 7200, 1, [128, 300])
    assert [place["at"] for place in report["first"][:3]] == [[3, 5], [3, 7], [19, 5]]
    assert report["first"][0]["got"] == float(got["vectors"][131, 5])
    assert report["classes"]["prototype"]["16"] == "3"
    assert not passes.wrong_elements("columns", expected, expected)


def test_wrong_elements_are_counted_beyond_those_that_are_described(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "DESCRIBED_ROWS", 128)
    expected = {"barycentre": torch.ones(1000, 3)}
    report = passes.wrong_elements("student", {"barycentre": torch.zeros(1000, 3)}, expected)["barycentre"]
    assert (report["wrong"], report["window"], report["shape"]) == (3000, [0, 128], (128, 3))
    assert "every wrong element is 0 times the exact one" in report["hints"]


def test_a_backend_that_is_left_out_says_so(made_up: dict[str, Kernels]) -> None:
    found = passes.measure(CASE, "student", CPU, skip=("cuda",))
    for name in ("cuda", "cuda clusters"):
        assert found[name] == {"status": "not available", "reason": "an earlier run did not come back from it"}
        assert not made_up[name].passes
    assert found["triton"]["tflops"] > 0


def test_clusters_are_left_out_alone(made_up: dict[str, Kernels]) -> None:
    found = passes.measure(CASE, "student", CPU, skip=("cuda clusters",))
    assert found["cuda"]["tflops"] > 0
    assert found["cuda clusters"]["status"] == "not available"


def test_the_kernels_in_clusters_are_the_third() -> None:
    asked = [passes._kernels(name).blocks_in_cluster for name in passes.BACKENDS_BESIDE[1:]]
    assert asked == [1, 2]


def test_without_a_gpu_every_pass_says_why(settings: Settings) -> None:
    record = Record(settings.out / "part.json")
    passes.run(settings, record, (384, 128))
    assert set(record.data["passes"]) == {"D384 bfloat16", "D128 bfloat16"}
    for entry in (entry for case in record.data["passes"].values() for entry in case.values()):
        assert entry["status"] == "not available", entry
        assert "dry run" in entry["reason"]


def test_where_no_backend_runs_a_pass_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BACKENDS["triton"], "unsupported", lambda rows, weight: "there is none")
    with pytest.raises(UnavailableError, match=r"triton: there is none; cuda: it runs on NVIDIA GPUs"):
        passes.measure(CASE, "student", CPU)


def test_the_other_backend_is_measured_beside(settings: Settings) -> None:
    shape = TOY_HEAD_SHAPES[0]
    assert "cuda" in losses.variants("triton", shape)
    assert "triton" in losses.variants("cuda", shape)
    assert "cuda" not in losses.variants("streaming", shape)
    record = Record(settings.out / "part.json")
    others = set(losses.variants("triton", shape)) - {"cuda"}
    head.run(settings, record, shape, tuple(others))
    entry = record.data["variants"]["cuda"]
    assert entry["status"] == "not available", entry
    assert "NVIDIA GPUs" in entry["reason"]


def test_a_backend_that_cannot_run_is_not_available() -> None:
    with pytest.raises(UnavailableError, match="NVIDIA GPUs"):
        losses.prepare_beside(HeadInputs.of(TOY_HEAD_SHAPES[0], device=CPU), "cuda")


def fake_tool(folder: Path, script: str) -> str:
    path = folder / "ncu"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_counters_are_kept_as_text(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counters, "find_ncu", lambda: fake_tool(tmp_path, 'echo "Tensor (%) 71.5"; echo "$@"'))
    found = counters.run(settings, 20.0, "cuda")
    assert found["status"] == "ok", found
    text = (settings.out / found["text"]).read_text()
    assert "Tensor (%) 71.5" in text
    assert "-m bench.gpu.counters cuda" in text
    assert "--clock-control none" in text, "ncu would set the GPU's clocks"
    assert all(f"--section {section}" in text for section in counters.SECTIONS)


@pytest.mark.parametrize(
    ("script", "status", "said"),
    [
        (f'echo "==ERROR== {counters.NO_PERMISSION} - no permission"', "not permitted", counters.NO_PERMISSION),
        ('echo "==WARNING== No kernels were profiled."', "failed", "No kernels"),
        ("echo broken; exit 3", "failed", "broken"),
        ("exec sleep 60", "timed out", ""),
    ],
    ids=["no permission", "no kernels", "error", "hang"],
)
def test_counters_that_fail_say_why(
    script: str, status: str, said: str, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control."""
    monkeypatch.setattr(counters, "find_ncu", lambda: fake_tool(tmp_path, script))
    found = counters.run(settings, 1.0, "cuda")
    assert found["status"] == status, found
    assert said in found["reason"]
    assert not (settings.out / "counters-cuda.txt").exists()


def test_without_ncu_counters_are_not_available(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counters, "find_ncu", lambda: None)
    assert counters.run(settings, 20.0, "cuda")["status"] == "not available"


@pytest.mark.parametrize(("capability", "arch"), [((9, 0), "90a"), ((8, 0), "80"), ((10, 0), "100")])
def test_the_build_is_for_the_gpu_there_is(
    capability: tuple[int, int], arch: str, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    started: list[Any] = []

    class FakeRunning:
        def __init__(self, command: list[str], title: str, log: Path, **environment: str) -> None:
            started.append((command[1:], environment))

        def finish(self, seconds: float) -> processes.Ended:
            return processes.Ended(0, "")

    monkeypatch.setattr(processes, "Running", FakeRunning)
    wet = Settings(backend="triton", dry=False, deadline=0.0, out=settings.out)
    assert processes.run_build(wet, 9.0) == {"status": "ok", "exit_code": 0, "arch": arch}
    ((command, environment),) = started
    assert command == ["setup.py", "build_ext", "--inplace"]
    assert (environment["VMF_CUDA_ARCHS"], environment["VMF_REQUIRE_CUDA"]) == (arch, "1")
    assert environment["PATH"].endswith(str(processes.CUDA_BIN)), "nvcc need not be on PATH"


def results(**changes: Any) -> dict[str, Any]:
    """A ``head.json`` of three workloads."""

    def workload(rows: int, dim: int, ours_ms: float, cuda_ms: float | None) -> dict[str, Any]:
        cuda = {"status": "failed"} if cuda_ms is None else {"status": "ok", "step_ms": {"median": cuda_ms}}
        ours = {"status": "ok", "step_ms": {"median": ours_ms}}
        variants = {"ours": ours, "cuda": cuda, "B1": {"status": "ok", "step_ms": {"median": 9.0}}}
        sizes = {"student_rows": rows, "prototypes": 65536, "dim": dim}
        return {"name": f"{rows} D{dim}", **sizes, "variants": variants}

    tests = {"tests": 40, "skipped": 2, "failed": []}
    found = [workload(3771, 256, 2.0, 1.6), workload(640, 256, 0.5, 0.6), workload(640, 200, 0.5, None)]
    found += [workload(640, 384, 0.9, 0.8), workload(640, 768, 3.0, 2.0)]
    return {
        "dry_run": False,
        "backend": "triton",
        "environment": {"device": {"compute_capability": "9.0"}, "uncommitted_changes": False},
        "stages": {"tests": {"tests": 90, "failed": []}, "tests cuda": tests},
        "results": {f"head {i}": each for i, each in enumerate(found)},
    } | changes


def test_the_table_of_wins_has_what_was_measured_side_by_side() -> None:
    table = wins.measured_table(results(), SOURCE)
    entry = {"rows": 640, "prototypes": 65536, "cuda_ms": 0.6, "triton_ms": 0.5, "source": SOURCE}
    assert table["90"]["bf16"]["256"] == [entry, entry | {"rows": 3771, "cuda_ms": 1.6, "triton_ms": 2.0}]
    assert set(table["90"]["bf16"]) == {"256", "384"}, "768 has no such kernels, and 200 was not timed"


def test_where_cuda_was_asked_for_triton_is_beside() -> None:
    data = results(backend="cuda")
    for each in data["results"].values():
        each["variants"]["triton"] = each["variants"].pop("cuda")
    first, *_ = wins.measured_table(data, SOURCE)["90"]["bf16"]["256"]
    assert (first["cuda_ms"], first["triton_ms"]) == (0.5, 0.6)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dry_run": True}, "dry run"),
        (
            {"environment": {"device": {"compute_capability": "9.0"}, "uncommitted_changes": True}},
            "uncommitted changes",
        ),
        ({"stages": {}}, "no test of the backend was run"),
        ({"stages": {"tests cuda": {"status": "timed out", "reason": "..."}}}, "no test of the backend was run"),
        (
            {"stages": {"tests cuda": {"tests": 9, "skipped": 9, "failed": []}}},
            "all 9 tests of the backend were skipped",
        ),
        (
            {"stages": {"tests cuda": {"tests": 9, "skipped": 2, "failed": [], "not_run": 3, "selected": 12}}},
            "3 of 12 tests of the backend were not reached",
        ),
        (
            {"stages": {"tests cuda": {"tests": 9, "skipped": 8, "failed": ["tests.gpu.test_cuda::test_x"]}}},
            "failed: tests.gpu.t",
        ),
        ({"results": {}}, "no workload in which both cuda and triton were timed"),
    ],
)
def test_unfit_results_give_no_table(changes: dict[str, Any], said: str) -> None:
    """Negative control."""
    with pytest.raises(wins.UntrustworthyError, match=said):
        wins.measured_table(results(**changes), SOURCE)


def test_a_wrong_result_gives_no_table() -> None:
    """Negative control."""
    data = results()
    data["results"]["head 0"]["variants"]["cuda"]["disagreement"] = "loss is off by 1e-01"
    with pytest.raises(wins.UntrustworthyError, match="loss is off"):
        wins.measured_table(data, SOURCE)


def test_auto_goes_by_the_table_that_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, source = tmp_path / "measured.json", tmp_path / "head.json"
    kept: dict[str, Any] = {"rows": 1, "prototypes": 9, "cuda_ms": 2.0, "triton_ms": 1.0, "source": "an older one"}
    path.write_text(json.dumps({"measured": {"90": {"fp16": {"256": [kept]}}}}))
    source.write_text(json.dumps(results()))
    wins.main([str(source), "--out", str(path)])
    assert "sm_90 bf16 D 256: 640 rows 0.83x, 3771 rows 1.25x of cuda over triton" in capsys.readouterr().out
    monkeypatch.setattr(measured, "TABLE_PATH", path)
    measured.table.cache_clear()
    try:
        found = {rows: measured.wins(90, "bf16", 256, rows, 65_536) for rows in (100, 640, 2000, 3771, 9999)}
        assert found == {100: False, 640: False, 2000: False, 3771: True, 9999: True}
        by_prototypes = {k: measured.wins(90, "bf16", 256, 3771, k) for k in (8192, 32767, 32768, 131072)}
        assert by_prototypes == {8192: False, 32767: False, 32768: True, 131072: True}
        assert measured.measurements(90, "fp16", 256) == [measured.Measurement(**kept)]
    finally:
        measured.table.cache_clear()


def test_the_rates_of_the_passes_are_judged_and_printed() -> None:
    fast = {"status": "ok", "ms": {"median": 0.4}, "tflops": 600.0}
    slow = {"status": "ok", "ms": {"median": 0.6}, "tflops": 400.0}
    case = {"student": {"status": "ok", "triton": slow, "cuda": fast, "difference": {"cuda": 1e-3}}}
    case["columns"] = {"status": "ok", "triton": fast, "cuda": slow, "difference": {"cuda": 1e-3}}
    case["teacher"] = {"status": "ok", "triton": fast, "cuda": fast, "difference": {"cuda": 0.3}, "wrong": {"cuda": {}}}
    data = {"results": {"passes": {"passes": {"D256 bfloat16": case}}}}
    met = {(t.quantity.split()[1], t.to_reach): t.met for t in targets(data, []) if t.quantity.startswith("cuda,")}
    goal, more = ">= 550 TFLOP/s", "> 1x Triton"
    assert met == {
        ("student", goal): True,
        ("student", more): True,
        ("columns", goal): False,
        ("columns", more): False,
        ("teacher", goal): None,
        ("teacher", more): None,
    }
    environment: dict[str, Any] = {
        "device": {"name": "x"},
        "versions": {"torch": "2", "triton": "3"},
        "driver": "1",
        "commit": "c",
    }
    environment |= {"uncommitted_changes": False}
    whole = data | {
        "environment": environment,
        "clocks_before": {},
        "stages": {},
        "dry_run": False,
        "backend": "triton",
    }
    printed = gpu_table(whole)
    assert "| D256 bfloat16 | student | cuda | 0.400 | 600 |  | 1.0e-03 |" in printed, printed
    assert "| D256 bfloat16 | teacher | cuda | 0.400 | 600 |  | 3.0e-01 WRONG |" in printed
