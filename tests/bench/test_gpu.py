"""The benchmark of a GPU, on the CPU: every stage runs, failures are recorded and end nothing, the tables can be made."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.baselines import BASELINES
from bench.gpu import __main__ as program
from bench.gpu import head, jobs, losses, plan, probes, sanitizer_case
from bench.gpu.hang import limited
from bench.gpu.record import Record, attempt
from bench.gpu.settings import Settings
from bench.gpu.tables import short_table, workloads
from bench.gpu.targets import Target, targets
from bench.report import table
from bench.workloads import TOY_HEAD_SHAPES
from tests.bench.gpu_calls import fake_first_light
from vmf_bench.errors import UnavailableError
from vmf_bench.inputs import HeadInputs
from vmf_bench.memory import peak_extra_mib
from vmf_bench.peers.peer import Peer
from vmf_bench.timing import Stopwatch, Times, interleaved, rounds_within, training_step

NOT_ON_A_CPU = {"B4", "B5"} | ({"B6"} if importlib.util.find_spec("liger_kernel") is None else set())


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(backend="streaming", dry=True, deadline=time.monotonic() + 100, out=tmp_path)


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of both calls, dry, in which one stage fails and one baseline has a wrong temperature."""
    out = tmp_path_factory.mktemp("dry")

    def broken(settings: Settings, record: Record) -> None:
        record.put("matmul_size", value=1)
        raise RuntimeError("no matmul today")

    def wrong(inputs: HeadInputs) -> torch.Tensor:
        return BASELINES["B1"].prepare(inputs, lambda function: function)(replace(inputs, teacher_temperature=0.07))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bench.gpu.ceilings.run", broken)
        patch.setitem(BASELINES, "wrong", Peer("B1 at another temperature", lambda inputs, compile_: wrong))
        patch.setitem(jobs.COMMANDS, "module", [sys.executable, "-c", "print('_cuda.so')"])
        patch.setitem(jobs.COMMANDS, "first light", [sys.executable, str(fake_first_light(out / "fake"))])
        patch.setattr("bench.gpu.suite.DRY_RUN_TESTS", (str(a_test(out / "fake")),))
        for call in ("first", "second"):
            program.main([call, "--dry-run", "--backend", "streaming", "--out", str(out)])
    shutil.rmtree(out / "fake")
    return out


def a_test(folder: Path) -> Path:
    path = folder / "test_of_a_dry_run.py"
    path.write_text("import pytest\n\n\n@pytest.mark.gpu\ndef test_sums() -> None:\n    assert 1 + 1 == 2\n")
    return path


@pytest.fixture(scope="module")
def results(dry_run: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((dry_run / "head.json").read_text())
    return loaded


def test_every_stage_of_both_calls_is_on_record(results: dict[str, Any]) -> None:
    wanted = {stage.name for stage in (*plan.FIRST, *plan.SECOND)}
    left_out = {"build", "first light bounded", "race check"}
    stages = {name: entry["status"] for name, entry in results["stages"].items()}
    assert stages.keys() == wanted - left_out
    bad = {name: status for name, status in stages.items() if status != "ok"}
    assert bad == {"ceilings": "failed", "counters cuda": "not available", "tune": "not available"}
    assert results["calls"].keys() == {"first", "second"}
    assert results["environment"]["versions"]["torch"] == torch.__version__


def test_what_comes_back_is_few_small_files(dry_run: Path) -> None:
    found = {str(path.relative_to(dry_run)) for path in dry_run.rglob("*") if path.is_file()}
    of_calls = {f"{call}{suffix}" for call in ("first", "second") for suffix in (".log", "_tests.jsonl")}
    assert found == {"head.json", "report.md"} | of_calls
    log = (dry_run / "first.log").read_text()
    for line in ("[module] _cuda.so", "[first light cuda] cuda right", "[tests cuda 0] ", "[first] ceilings: failed"):
        assert line in log, f"{line!r} is not in\n{log}"


def test_a_failing_stage_is_recorded_with_what_it_had(results: dict[str, Any]) -> None:
    assert results["stages"]["ceilings"]["status"] == "failed"
    assert "no matmul today" in results["stages"]["ceilings"]["reason"]
    assert results["results"]["ceilings"] == {"matmul_size": 1}


def test_the_tests_stages_count(results: dict[str, Any]) -> None:
    for name in ("tests cuda", "tests gpu"):
        entry = results["stages"][name]
        assert (entry["tests"], entry["selected"], entry["failures"]) == (1, 1, 0)


@pytest.mark.parametrize("index", range(len(TOY_HEAD_SHAPES)))
def test_every_workload_and_variant_is_on_record(results: dict[str, Any], index: int) -> None:
    workload, shape = results["results"][f"rivals {index}"], TOY_HEAD_SHAPES[index]
    assert workload["name"] == shape.name
    assert workload["variants"].keys() == losses.variants("streaming", shape).keys() | {"wrong"}
    for name, variant in workload["variants"].items():
        if name in NOT_ON_A_CPU:
            assert variant["status"] == "not available", f"{name}: {variant}"
            assert variant["reason"]
        elif name != "wrong":
            assert variant["status"] == "ok", f"{name}: {variant}"
            for key in ("step_ms", "wall_ms", "host_ms", "forward_ms"):
                assert 0 < variant[key]["p10"] <= variant[key]["median"] <= variant[key]["p90"]
            assert variant["tflops"] == pytest.approx(shape.flops / variant["step_ms"]["median"] / 1e9)


@pytest.mark.parametrize("index", range(len(TOY_HEAD_SHAPES)))
def test_baselines_agree_and_a_wrong_one_is_not_timed(results: dict[str, Any], index: int) -> None:
    variants = results["results"][f"rivals {index}"]["variants"]
    assert variants["wrong"]["status"] == "refused"
    assert "step_ms" not in variants["wrong"]
    for name in ("B1", "B2", "B3", "B3g"):
        assert variants[name]["relative_errors"].keys() == {"loss", "features", "magnitude", "direction"}
    assert variants[losses.OURS]["disagreement"] is None


def test_the_first_call_measures_the_quick_variants_only(results: dict[str, Any]) -> None:
    assert results["results"]["head 0"]["variants"].keys() == {"B1", losses.OURS}
    assert {entry["name"] for entry in results["results"]["heads 2 3 6 7"].values()} == {
        s.name for s in TOY_HEAD_SHAPES
    }


def test_ours_is_looked_into(results: dict[str, Any]) -> None:
    mine = workloads(results)[0]["variants"][losses.OURS]
    assert mine["step_ms"] == results["results"]["rivals 0"]["variants"][losses.OURS]["step_ms"], (
        "the more complete one's"
    )
    assert mine["repeatable"] is True
    assert mine["graph"] == {"status": "not available", "reason": "graphs need a GPU"}
    for way in ("forward", "backward"):
        assert mine["kernels"][way]["launches"] > 0
        assert mine["kernels"][way]["by_name"][0]["microseconds"] > 0


def test_errors_are_measured(results: dict[str, Any]) -> None:
    for case, entry in results["results"]["errors"].items():
        assert entry["status"] == "ok", f"{case}: {entry}"
        assert all(0 <= error < 0.1 for error in entry["ours"].values()), f"{case}: {entry}"


def test_report_prints_every_table(dry_run: Path) -> None:
    printed = table(dry_run / "head.json")
    for wanted in (
        "DRY RUN",
        "| 12/6 K301 D32 | B1: ",
        "is off by",
        "no matmul today",
        "vs best of B3 to B6",
        "flex_attention",
    ):
        assert wanted in printed, f"{wanted!r} is not in\n{printed}"
    rows = [line for line in printed.splitlines() if line.startswith("|")]
    assert not [row for row in rows if not row.endswith("|")]


def test_short_table_has_a_row_a_workload(results: dict[str, Any]) -> None:
    rows = [line for line in short_table(results).splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(TOY_HEAD_SHAPES)
    assert len({row.count("|") for row in rows}) == 1, f"ragged:\n{rows}"
    assert "not available" in rows[-1]


def test_a_skipped_variant_says_so(settings: Settings) -> None:
    record = Record(settings.out / "part.json")
    names = set(losses.variants("streaming", TOY_HEAD_SHAPES[1]))
    head.run(settings, record, TOY_HEAD_SHAPES[1], tuple(names - {"B1"}))
    statuses = {name: variant["status"] for name, variant in record.data["variants"].items()}
    assert statuses == {name: "ok" if name == "B1" else "skipped" for name in names}


def test_variants_on_the_kernels_that_crashed_are_spared(settings: Settings) -> None:
    record = Record(settings.out / "part.json")
    others = set(losses.variants("streaming", TOY_HEAD_SHAPES[1])) - {"B1", *losses.SAME_KERNELS}
    head.run(settings, record, TOY_HEAD_SHAPES[1], (*others, losses.OURS))
    assert record.data["variants"]["ours vMF"]["status"] == "skipped"
    assert record.data["variants"]["B1"]["status"] == "ok"


def test_taking_too_long_is_recorded() -> None:
    def slow() -> None:
        with limited(0.2, may_hang=False):
            time.sleep(20)

    _, outcome = attempt(slow)
    assert outcome["status"] == "failed"
    assert "OvertimeError: took more than" in outcome["reason"]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (UnavailableError("no"), "not available"),
        (torch.cuda.OutOfMemoryError("no"), "out of memory"),
        (ValueError("no"), "failed"),
    ],
)
def test_reasons_are_told_apart(error: Exception, status: str) -> None:
    def fail() -> None:
        raise error

    result, outcome = attempt(fail)
    assert result is None
    assert (outcome["status"], "no" in outcome["reason"]) == (status, True)


def test_a_record_is_on_disk_at_once(tmp_path: Path) -> None:
    record = Record(tmp_path / "new" / "head.json")
    record.put("a", "b", value=1)
    record.put("a", "c", value=2)
    assert json.loads(record.path.read_text()) == {"a": {"b": 1, "c": 2}}


def test_times_are_interleaved_and_their_order_turns() -> None:
    order: list[str] = []

    def measure(step: Any) -> float:
        step()
        return float(len(order))

    steps = {name: (lambda name=name: order.append(name)) for name in "xyz"}
    times = interleaved(measure, steps, 3)
    assert "".join(order) == "xyzyzxzxy"
    assert times["x"] == Times.of([1.0, 6.0, 8.0])


def test_rounds_fit_the_time() -> None:
    assert [rounds_within(1.0, ms) for ms in (1000.0, 100.0, 1.0)] == [5, 10, 50]


def test_targets_are_judged() -> None:
    """Ratios of made-up times against the design's numbers."""
    ours_ms = {"step_ms": {"median": 1.0}, "tflops": 450.0, "extra_mib": 120.0, "repeatable": True}
    workload = {
        "name": "3771/3771",
        "student_rows": 3771,
        "teacher_rows": 3771,
        "prototypes": 65_536,
        "dim": 256,
        "variants": {
            losses.OURS: ours_ms | {"graph": {"status": "failed"}},
            "B1": {"step_ms": {"median": 3.5}, "extra_mib": 4000.0},
            "B2": {"step_ms": {"median": 1.9}, "extra_mib": 4000.0},
            "B3": {"step_ms": {"median": 1.2}, "extra_mib": 500.0},
        },
    }
    errors = {"case": {"ours": {"loss": 3e-3}, "dense": {"loss": 1e-3}}}
    found = {(t.quantity, t.to_reach): t for t in targets({"results": {"errors": errors}}, [workload])}
    met = {key: target.met for key, target in found.items()}
    assert met["640/128 vs B1", ">= 8x"] is None
    assert met["3771/3771 vs B1", ">= 3x"] is True
    assert met["3771/3771 vs B2", ">= 2x"] is False
    assert found["3771/3771 vs best of B3 to B6", "> 1x"] == Target(
        "3771/3771 vs best of B3 to B6", "> 1x", "1.20x (B3)", True
    )
    assert met["3771/3771 memory of B3", "< 1/5"] is False
    assert (met["3771/3771 rate", ">= 400 TFLOP/s"], met["3771/3771 rate", ">= 550 TFLOP/s"]) == (True, False)
    assert met["3771/3771 extra memory", "<= 95 MiB"] is False
    assert met["3771/3771 in a CUDA graph", "same bits"] is False
    assert met["errors", "<= 2x the dense formula's"] is False


def test_ratios_against_a_wrong_result_count_for_nothing() -> None:
    """Negative control."""
    mine = {"step_ms": {"median": 1.0}, "tflops": 1.0, "extra_mib": 1.0, "disagreement": "loss is off"}
    sizes = {"student_rows": 640, "teacher_rows": 128, "prototypes": 65_536, "dim": 256}
    workload = {"name": "640/128", "variants": {losses.OURS: mine, "B1": {"step_ms": {"median": 99.0}}}, **sizes}
    first = next(iter(targets({"results": {}}, [workload])))
    assert (first.quantity, first.met) == ("640/128 vs B1", None)


@pytest.mark.parametrize(("host_ms", "met"), [(0.3, True), (1.1, False)])
def test_a_step_that_the_host_holds_up_shows(host_ms: float, met: bool) -> None:
    mine = {"step_ms": {"median": 1.0}, "host_ms": {"median": host_ms}}
    sizes = {"student_rows": 640, "teacher_rows": 128, "prototypes": 65_536, "dim": 256}
    found = targets({"results": {}}, [{"name": "640/128", "variants": {losses.OURS: mine}, **sizes}])
    assert [t.met for t in found if t.quantity == "640/128 host time"] == [met]


@pytest.mark.gpu
def test_probes_measure_on_a_gpu() -> None:
    device, buffer_mib = torch.device("cuda"), 64
    inputs = HeadInputs.of(TOY_HEAD_SHAPES[0], device=device)

    def loss(inputs: HeadInputs) -> torch.Tensor:
        buffer = torch.ones(buffer_mib * 2**18, device=device)
        total: torch.Tensor = sum((leaf.float().square().sum() for leaf in inputs.leaves.values()), buffer.sum())
        return total

    step, stopwatch = training_step(loss, inputs), Stopwatch(device)
    stopwatch.warm_up(step)
    assert 0 < stopwatch.device_milliseconds(step) < 100
    assert buffer_mib <= peak_extra_mib(step, inputs) < buffer_mib + 4
    counted = probes.kernels(loss, inputs)
    assert counted["forward"]["launches"] >= 2 * len(inputs.leaves), counted
    assert counted["forward"]["launches"] == int(counted["forward"]["launches"]), "runs launch the same kernels"
    replay, equals_eager = probes.captured(loss, inputs)
    assert equals_eager
    assert stopwatch.device_milliseconds(replay) > 0


def test_the_sanitizer_s_case_runs() -> None:
    assert sanitizer_case.run("cpu", "streaming") > 0
