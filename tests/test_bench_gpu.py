"""The benchmark of a GPU, on the CPU: every stage runs, failures are recorded and end nothing, the tables can be made."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.baselines import BASELINES, Baseline, UnavailableError
from bench.gpu import __main__ as program
from bench.gpu import head, losses, probes, processes, sanitizer_case
from bench.gpu.record import Record, attempt
from bench.gpu.settings import Settings
from bench.gpu.tables import short_table
from bench.gpu.targets import Target, targets
from bench.gpu.timing import Stopwatch, Times, interleaved, rounds_within
from bench.report import table
from bench.workloads import TOY_HEAD_SHAPES, HeadInputs

ROOT = Path(__file__).parents[1]
NOT_ON_A_CPU = {"B4", "B5", "B6"}


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(backend="streaming", dry=True, deadline=time.monotonic() + 100, out=tmp_path)


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a dry run in which one stage fails and one baseline has a wrong temperature."""
    out = tmp_path_factory.mktemp("dry")

    def broken(settings: Settings, record: Record) -> None:
        record.put("matmul_size", value=1)
        raise RuntimeError("no matmul today")

    def wrong(inputs: HeadInputs) -> torch.Tensor:
        return BASELINES["B1"].prepare(inputs, lambda function: function)(replace(inputs, teacher_temperature=0.07))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bench.gpu.ceilings.run", broken)
        patch.setitem(BASELINES, "wrong", Baseline("B1 at another temperature", lambda inputs, compile_: wrong))
        program.main(["--dry-run", "--backend", "streaming", "--out", str(out)])
    return out


@pytest.fixture(scope="module")
def results(dry_run: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((dry_run / "head.json").read_text())
    return loaded


def test_every_stage_is_on_record(results: dict[str, Any]) -> None:
    stages = {name: entry["status"] for name, entry in results["stages"].items()}
    untimed = {"build", "tests", "sanitizer", "compile 0", "errors"}
    expected = untimed | {"ceilings", "passes", "counters", "head 0", "head 1"}
    assert stages.keys() == expected
    well = {name for name, status in stages.items() if status == "ok"}
    not_here = {"build", "tests", "sanitizer", "counters"}
    assert well == expected - not_here - {"ceilings"}, f"stages ended as {stages}"
    assert results["environment"]["versions"]["torch"] == torch.__version__


def test_a_failing_stage_is_recorded_with_what_it_had(results: dict[str, Any]) -> None:
    assert results["stages"]["ceilings"]["status"] == "failed"
    assert "no matmul today" in results["stages"]["ceilings"]["reason"]
    assert results["results"]["ceilings"] == {"matmul_size": 1}


def test_the_tests_stage_counts(results: dict[str, Any]) -> None:
    entry = results["stages"]["tests"]
    assert (entry["status"], entry["exit_code"], entry["failures"]) == ("no tests", 5, 0)


@pytest.mark.parametrize("index", range(len(TOY_HEAD_SHAPES)))
def test_every_workload_and_variant_is_on_record(results: dict[str, Any], index: int) -> None:
    workload, shape = results["results"][f"head {index}"], TOY_HEAD_SHAPES[index]
    assert workload["name"] == shape.name
    assert workload["variants"].keys() == losses.variants("streaming", shape).keys() | {"wrong"}
    for name, variant in workload["variants"].items():
        if name in NOT_ON_A_CPU:
            assert variant["status"] == "not available", f"{name}: {variant}"
            assert variant["reason"]
        elif name != "wrong":
            assert variant["status"] == "ok", f"{name}: {variant}"
            for key in ("step_ms", "wall_ms", "forward_ms"):
                assert 0 < variant[key]["p10"] <= variant[key]["median"] <= variant[key]["p90"]
            assert variant["tflops"] == pytest.approx(shape.flops / variant["step_ms"]["median"] / 1e9)


@pytest.mark.parametrize("index", range(len(TOY_HEAD_SHAPES)))
def test_baselines_agree_and_a_wrong_one_is_not_timed(results: dict[str, Any], index: int) -> None:
    variants = results["results"][f"head {index}"]["variants"]
    assert variants["wrong"]["status"] == "refused"
    assert "step_ms" not in variants["wrong"]
    for name in ("B1", "B2", "B3", "B3g"):
        assert variants[name]["relative_errors"].keys() == {"loss", "features", "magnitude", "direction"}
    assert variants[losses.OURS]["disagreement"] is None


def test_ours_is_looked_into(results: dict[str, Any]) -> None:
    mine = results["results"]["head 0"]["variants"][losses.OURS]
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


def test_a_stage_runs_as_a_process(settings: Settings) -> None:
    status, part = processes.run_stage_in_child("ceilings", settings, 60)
    assert status["status"] == "ok", status
    assert part["matmul_tflops"] > 0
    assert part["copy_gb_per_s"] > 0
    assert "===== ceilings" in (settings.out / "log.txt").read_text()


def test_a_process_that_hangs_is_ended_and_its_output_kept(tmp_path: Path) -> None:
    log = tmp_path / "log"
    start = time.monotonic()
    hanging = processes.start([sys.executable, "-c", "print('begun'); import time; time.sleep(60)"], log)
    ended = processes.finish(hanging, log, 3.0)  # Python starts within them on a busy machine, too
    assert ended.code is None
    assert ended.status()["status"] == "timed out"
    assert "begun" in ended.output
    assert time.monotonic() - start < 20


def test_a_process_that_dies_says_why(tmp_path: Path) -> None:
    log = tmp_path / "log"
    ended = processes.finish(processes.start([sys.executable, "-c", "raise SystemExit('gone')"], log), log, 30)
    assert (ended.code, ended.status()["status"]) == (1, "failed")
    assert "gone" in ended.status()["reason"]


def test_the_variant_that_loses_the_device_is_left_out_of_the_next_run(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, ...]] = []

    def fake(
        stage: str, settings: Settings, seconds: float, skip: tuple[str, ...] = ()
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        asked.append(skip)
        if not skip:
            return {"status": "failed"}, {"device_lost_to": "ours", "variants": {"ours": {"status": "failed"}}}
        if len(skip) == 1:
            return {"status": "failed"}, {"device_lost_to": "B4", "variants": {"B4": {"status": "failed"}}}
        return {"status": "ok"}, {"variants": {"B1": {"status": "ok"}, "B4": {"status": "skipped"}}}

    monkeypatch.setattr(program, "run_stage_here", fake)
    record = Record(settings.out / "head.json")
    status = program.run_and_merge("head 0", settings, 100.0, record)
    assert asked == [(), ("ours",), ("ours", "B4")]
    assert status == {"status": "ok", "lost_the_device": ["ours", "B4"]}
    statuses = {name: entry["status"] for name, entry in record.data["results"]["head 0"]["variants"].items()}
    assert statuses == {"B1": "ok", "ours": "failed", "B4": "failed"}


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


def test_no_stage_is_started_without_time(settings: Settings) -> None:
    record = Record(settings.out / "head.json")
    wet = replace(settings, dry=False)
    assert program.run_and_merge("head 0", wet, 3.0, record)["status"] == "skipped"


def test_limits_add_up_to_the_time_there_is() -> None:
    left, used = 300.0, []
    for remaining in range(8, 0, -1):
        used.append(program.limit_of("head", remaining, left))
        left -= used[-1]
    assert sum(used) <= 300
    assert min(used[:4]) >= program.LEAST_HEAD_SECONDS


def test_preparing_too_long_is_recorded() -> None:
    def slow() -> None:
        with head.limited(0.2):
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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_probes_measure_on_a_gpu() -> None:
    device, buffer_mib = torch.device("cuda"), 64
    inputs = HeadInputs.of(TOY_HEAD_SHAPES[0], device=device)

    def loss(inputs: HeadInputs) -> torch.Tensor:
        buffer = torch.ones(buffer_mib * 2**18, device=device)
        total: torch.Tensor = sum((leaf.float().square().sum() for leaf in inputs.leaves.values()), buffer.sum())
        return total

    step, stopwatch = probes.training_step(loss, inputs), Stopwatch(device)
    stopwatch.warm_up(step)
    assert 0 < stopwatch.device_milliseconds(step) < 100
    assert buffer_mib <= probes.peak_extra_mib(step, inputs) < buffer_mib + 4
    counted = probes.kernels(loss, inputs)
    assert counted["forward"]["launches"] >= 2 * len(inputs.leaves), counted
    assert counted["forward"]["launches"] == int(counted["forward"]["launches"]), "runs launch the same kernels"
    replay, equals_eager = probes.captured(loss, inputs)
    assert equals_eager
    assert stopwatch.device_milliseconds(replay) > 0


def test_the_sanitizer_s_case_runs() -> None:
    assert sanitizer_case.run("cpu", "streaming") > 0


def test_script_is_valid_shell() -> None:
    done = subprocess.run(
        ["bash", "-n", str(ROOT / "bench" / "run_gpu.sh")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_without_a_gpu_the_program_names_the_dry_run(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit):
        program.main([])
    assert "--dry-run" in capsys.readouterr().err
