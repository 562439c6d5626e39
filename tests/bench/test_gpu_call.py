"""A call on a GPU, tested without one: its plan, its processes and shares of tests, and how failures and hangs are handled."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench.gpu import call, head, jobs, plan, processes, share, suite
from bench.gpu.plan import Stage
from bench.gpu.processes import Ended, Running
from bench.gpu.record import Record
from bench.gpu.settings import Settings
from tests.bench.gpu_calls import fake_first_light

ROOT = Path(__file__).parents[2]
SLEEP, DEAF = (
    "import time; print('begun'); time.sleep(60)",
    "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); ",
)
GB_OF_A_CARD, ERRORS_GB, FIRST_LIGHT_GB = 79.0, 3.0, 1.0  # the last of one of its processes, with the context
TESTS = """
import os, signal, sys, time, types
import pytest

pytestmark = pytest.mark.gpu


def test_passes(): pass
def test_fails(): assert 1 == 2, "one is not two"
def test_is_skipped(): pytest.skip("not here")
def test_kills(): os._exit(7)
def test_is_slow(): time.sleep(30)
def test_hangs():
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})  # as a kernel that never ends: no handler runs
    time.sleep(30)
def test_loses_the_device():
    def synchronize(): raise RuntimeError("an illegal memory access")
    sys.modules["torch"] = types.SimpleNamespace(
        cuda=types.SimpleNamespace(is_initialized=lambda: True, synchronize=synchronize))
def test_after_all_that_passes(): assert "torch" not in sys.modules
"""


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(backend="triton", dry=True, deadline=time.monotonic() + 100, out=tmp_path)


def python(code: str, tmp_path: Path) -> Running:
    return Running([sys.executable, "-c", code], "stage", tmp_path / "first.log")


@pytest.mark.parametrize(
    ("name", "done"),
    [
        ("first", {"module": "ok", "first light cuda": "ok"}),
        ("second", {"first light cuda": "ok", "passes 256": "ok", "tests cuda": "ok"}),
    ],
)
def test_a_call_s_stages_fit_its_time(name: str, done: dict[str, str]) -> None:
    total, stages = plan.PLANS[name]
    data = {"stages": {stage: {"status": status} for stage, status in {"module": "ok", **done}.items()}, "results": {}}
    planned = sum(stage.seconds for stage in stages if plan.is_wanted(stage, data) and not stage.beside)
    assert planned <= total - plan.RESERVE, f"{planned} s are planned of {total}"


@pytest.mark.parametrize("name", plan.PLANS)
def test_every_stage_has_a_job_and_a_known_need(name: str) -> None:
    names = [stage.name for stage in plan.PLANS[name][1]]
    assert len(names) == len(set(names))
    for stage in plan.PLANS[name][1]:
        assert any(stage.name.startswith(job) for job in jobs.JOBS), stage
        assert stage.needs in plan.NEEDS, stage


def test_the_gpu_tests_are_named_file_by_file() -> None:
    """Rather than collected from the whole suite, which takes as long as they run."""
    named = [path for paths in suite.PATHS.values() for path in paths]
    marked = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "tests").rglob("test_*.py")
        if "@pytest.mark.gpu" in path.read_text()
    }
    assert sorted(named) == sorted(marked - {str(Path(__file__).relative_to(ROOT))})


def test_what_runs_side_by_side_fits_a_card_of_80_gb() -> None:
    per_test = suite.TEST_GB + suite.CONTEXT_GB
    compiling = 2 * head.COMPILE_MEMORY_SHARE * GB_OF_A_CARD
    first_light = jobs.TRITON_WORKERS * FIRST_LIGHT_GB
    assert suite.PROCESSES["cuda"] * per_test + first_light < GB_OF_A_CARD
    assert suite.PROCESSES["gpu"] * per_test + compiling + ERRORS_GB < GB_OF_A_CARD


def test_time_that_a_stage_did_not_take_goes_to_the_next_that_needs_more() -> None:
    stages = (Stage("ceilings", 10), Stage("head 0", 20), Stage("build", 70, "no module"), Stage("tune", 30))
    data = {"stages": {"module": {"status": "ok"}}, "results": {}}
    assert plan.seconds_for(0, stages, data, 60.0) == 10.0
    assert plan.seconds_for(1, stages, data, 58.0) == 28.0
    assert plan.seconds_for(1, stages, data, 15.0) == 15.0
    assert plan.seconds_for(3, stages, data, 31.0) == 31.0


def test_a_slow_process_is_ended_and_its_output_kept_as_it_came(tmp_path: Path) -> None:
    running, seen = python(SLEEP, tmp_path), list[str]()
    log = tmp_path / "first.log"
    ended = running.finish(
        3.0, lambda: seen.append(log.read_text() if log.exists() else "")
    )  # Python starts within them
    assert ended.status()["status"] == "timed out", "it answered the interrupt"
    assert "[stage] begun\n" in seen[-2], "the log grows while the process runs"


def test_a_process_that_answers_nothing_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control of the slow one; the traceback of ``faulthandler`` tells the same."""
    monkeypatch.setattr(processes, "INTERRUPT_SECONDS", 0.3)
    assert python(DEAF + SLEEP, tmp_path).finish(1.5).status()["status"] == "hung"
    stuck = "import faulthandler, time; faulthandler.dump_traceback_later(0.1, exit=True); time.sleep(60)"
    assert python(stuck, tmp_path).finish(20).status()["status"] == "hung"


def test_a_process_that_dies_says_why(tmp_path: Path) -> None:
    ended = python("raise SystemExit('gone')", tmp_path).finish(30)
    assert (ended.code, ended.status()["status"]) == (1, "failed")
    assert "gone" in ended.status()["reason"]


def test_a_stage_runs_as_a_process_and_its_results_are_kept_as_they_come(settings: Settings) -> None:
    kept: list[dict[str, Any]] = []
    status, part = processes.run_stage_in_child("ceilings", settings, 60, keep=kept.append)
    assert status["status"] == "ok", status
    assert part["copy_gb_per_s"] > 0
    assert kept[-1] == part


def run_stages(
    settings: Settings, stages: tuple[Stage, ...], patch: pytest.MonkeyPatch, **commands: list[str]
) -> dict[str, Any]:
    for name, command in commands.items():
        patch.setitem(jobs.COMMANDS, name.replace("_", " "), command)
    return call.drive(settings, stages).data


def test_a_stage_that_hangs_is_killed_and_one_without_time_is_skipped(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(call, "LEAST_SECONDS", 0.5)
    monkeypatch.setattr(processes, "INTERRUPT_SECONDS", 0.3)
    hanging = [sys.executable, "-c", DEAF + SLEEP]
    stages = (Stage("module", 2), Stage("first light cuda", 5), Stage("tune", 5))
    short = replace(settings, deadline=time.monotonic() + 2.2)
    data = run_stages(short, stages, monkeypatch, module=hanging, first_light=hanging)
    found = {name: entry["status"] for name, entry in data["stages"].items()}
    assert found == {"module": "hung", "first light cuda": "skipped", "tune": "skipped"}
    assert "it is not started" in data["stages"]["tune"]["reason"]
    log = short.log.read_text()
    assert "[module] begun" in log
    assert "[first] tune: skipped" in log


def test_what_runs_beside_has_ended_before_anything_is_timed(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def job(work: jobs.Work) -> dict[str, Any]:
        seen.append(f"{work.stage} starts")
        time.sleep(0.3 if work.stage == "compile 0" else 0.0)
        seen.append(f"{work.stage} ends")
        return {"status": "ok"}

    for name in ("compile", "tests", "ceilings"):
        monkeypatch.setitem(jobs.JOBS, name, job)
    stages = (Stage("compile 0", 20, beside=True), Stage("tests gpu", 20), Stage("ceilings", 9))
    data = run_stages(replace(settings, dry=False), stages, monkeypatch)
    assert {entry["status"] for entry in data["stages"].values()} == {"ok"}
    assert seen.index("tests gpu ends") < seen.index("compile 0 ends") < seen.index("ceilings starts"), seen


@pytest.mark.parametrize(
    ("variant", "kernels", "status", "distrusted"),
    [
        ("right", "cuda", "ok", ()),
        ("wrong", "cuda", "wrong", ()),
        ("wrong", "cuda-clusters", "ok", ()),
        ("not reached", "cuda", "incomplete", ()),
        ("slow", "cuda", "incomplete", ()),
        ("died", "cuda", "wrong", ()),
        ("hung", "cuda", "wrong", ("cuda",)),
    ],
)
def test_only_kernels_that_were_seen_to_hang_are_not_measured(
    variant: str,
    kernels: str,
    status: str,
    distrusted: tuple[str, ...],
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake = [sys.executable, str(fake_first_light(settings.out / "fake", variant, kernels))]
    stages = (
        Stage("first light cuda", 20),
        Stage("race check", 20, "wrong"),
        Stage("first light bounded", 9, "a hang"),
    )
    data = run_stages(settings, stages, monkeypatch, first_light=fake)
    assert jobs.distrusted(data) == distrusted
    assert data["stages"]["first light cuda"]["status"] == status
    assert ("race check" in data["stages"]) == (status == "wrong")
    assert ("first light bounded" in data["stages"]) == (variant == "hung")
    assert not (settings.out / "cuda").exists(), "all of it is in the record and in the log"


def test_a_slow_stage_distrusts_nobody() -> None:
    """Negative control: what timed out is on record, and is measured again."""
    stages = {"tests cuda": {"status": "timed out"}, "passes 256": {"status": "timed out"}}
    assert jobs.distrusted({"stages": stages, "results": {}}) == ()
    stages["passes 256"] = {"status": "hung", "hung_in": "cuda"}
    assert jobs.distrusted({"stages": stages, "results": {}}) == ("cuda",)


@pytest.mark.parametrize(
    ("status", "part", "culprit"),
    [
        ("ok", {"in_hand": "cuda"}, None),
        ("timed out", {"in_hand": "cuda"}, None),
        ("hung", {"in_hand": "cuda"}, "cuda"),
        ("failed", {"in_hand": None}, None),
        ("failed", {"in_hand": "cuda", "device_lost_to": "ours"}, "ours"),
        ("failed", {"640/128": {"name": "640/128"}, "1280/256": {"name": "1280/256", "in_hand": "cuda"}}, "cuda"),
        ("failed", {}, None),
    ],
)
def test_who_lost_the_device_is_known(status: str, part: dict[str, Any], culprit: str | None) -> None:
    assert jobs.culprit_of({"status": status}, part) == culprit


def test_the_variant_that_loses_the_device_is_left_out_of_the_next_run(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, ...]] = []

    def fake(work: jobs.Work, seconds: float, skip: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, Any]]:
        asked.append(skip)
        if not skip:
            return {"status": "failed"}, {"device_lost_to": "ours", "variants": {"ours": {"status": "failed"}}}
        if len(skip) == 1:
            return {"status": "hung"}, {"in_hand": "B4", "variants": {}}
        return {"status": "ok"}, {"variants": {"B1": {"status": "ok"}, "B4": {"status": "skipped"}}}

    monkeypatch.setattr(jobs, "run_and_keep", fake)
    record = Record(settings.out / "head.json")
    record.data = {"stages": {}, "results": {}}
    status = jobs.measure(jobs.Work(settings, record, "head 0", 100.0))
    assert asked == [(), ("ours",), ("ours", "B4")]
    assert status == {"status": "ok", "lost_the_device": ["ours", "B4"]}
    statuses = {name: entry["status"] for name, entry in record.data["results"]["head 0"]["variants"].items()}
    assert statuses == {"B1": "ok", "ours": "failed", "B4": "hung"}


def test_a_test_that_ends_its_process_spoils_no_other(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    path = settings.out / "test_of_shares.py"
    path.write_text(TESTS)
    monkeypatch.setitem(suite.PATHS, "cuda", (str(path),))
    monkeypatch.setitem(suite.PROCESSES, "cuda", 2)
    monkeypatch.setattr(suite, "TEST_SECONDS", 1.0)
    monkeypatch.setattr(suite, "HANG_SECONDS", 1.0)
    found = suite.run(replace(settings, dry=False), "cuda", 60)
    entries = {
        entry["test"].split("::")[1]: entry
        for entry in share.entries(settings.journal, "tests cuda")
        if "test" in entry
    }
    assert {name.removeprefix("test_"): entry["outcome"] for name, entry in entries.items()} == {
        "passes": "passed",
        "fails": "failed",
        "is_skipped": "skipped",
        "kills": "ended the process",
        "is_slow": "failed",
        "hangs": "hung",
        "loses_the_device": "lost the device",
        "after_all_that_passes": "passed",
    }
    assert "SlowTestError: took more than 1 s" in entries["test_is_slow"]["reason"]
    assert "one is not two" in entries["test_fails"]["reason"]
    assert "illegal memory access" in entries["test_loses_the_device"]["reason"]
    counts = {key: found[key] for key in ("status", "tests", "selected", "not_run", "skipped", "failures")}
    assert counts == {"status": "failed", "tests": 8, "selected": 8, "not_run": 0, "skipped": 1, "failures": 5}
    assert "test_of_shares.py::test_hangs" in settings.log.read_text()


@pytest.mark.parametrize(
    ("entries", "ends", "status"),
    [
        ([{"share": 0, "selected": 1}, {"share": 0, "test": "a", "outcome": "passed"}], [Ended(0, "")], "ok"),
        ([{"share": 0, "selected": 2}, {"share": 0, "test": "a", "outcome": "passed"}], [Ended(None, "")], "timed out"),
        (
            [{"share": 0, "selected": 1}, {"share": 0, "test": "a", "outcome": "out of time"}],
            [Ended(None, "")],
            "timed out",
        ),
        ([{"share": 0, "selected": 0}], [Ended(5, "")], "no tests"),
        ([], [Ended(2, "no module")], "failed"),
    ],
)
def test_shares_out_of_time_are_slow_and_nothing_else(entries: list[Any], ends: list[Ended], status: str) -> None:
    assert suite.judged(ends, entries)["status"] == status


def test_results_of_other_sources_are_put_aside(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    first = call.opened(settings, None)
    first.put("stages", "passes 256", value={"status": "ok"})
    again = call.opened(replace(settings, call="second"), first.path).data
    assert again["stages"] == {"passes 256": {"status": "ok"}}
    assert set(again["calls"]) == {"first", "second"}
    monkeypatch.setattr("bench.gpu.environment.sources", lambda: "mended")
    mended = call.opened(replace(settings, call="second"), first.path).data
    assert mended["stages"] == {}
    assert mended["before"]["stages"] == {"passes 256": {"status": "ok"}}


@pytest.mark.parametrize(
    ("name", "status", "left_out", "bounded"),
    [
        ("cuda/columns/bf16/256", "hung", ("cuda",), True),
        ("cuda/columns/bf16/256", "wrong", (), False),  # is timed all the same
        ("cuda/columns/bf16/64", "hung", (), True),
        ("cuda-clusters/columns/bf16/256", "hung", ("cuda clusters",), False),
        ("cuda-clusters/rows-own/fp16/256", "died", ("cuda clusters",), False),
        ("cuda-clusters/rows-own/fp16/384", "died", (), False),
    ],
)
def test_who_is_left_out_of_the_passes(name: str, status: str, left_out: tuple[str, ...], bounded: bool) -> None:
    """By first light; kernels that no backend takes yet cost nobody else's time."""
    data = {"stages": {}, "results": {"first light cuda": {"results": {name: {"status": status}}}}}
    assert jobs.distrusted(data) == left_out
    assert plan.has_hung(data) is bounded


def test_a_first_light_that_fails_itself_is_not_ok() -> None:
    """Its exit code is that of a wrong kernel."""
    crashed = jobs.verdict(Ended(1, "Traceback"), {"cuda/columns/bf16/256": {"status": "right"}})
    assert crashed["status"] == "failed"
