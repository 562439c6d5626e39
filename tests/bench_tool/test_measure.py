"""One case: what is timed, what is not and why, and what follows from the times."""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.bench_tool.toy import CPU, RATES, SHAPES, case, session
from vmf_bench.inputs import HeadInputs
from vmf_bench.measure import fitting, is_slow, measure
from vmf_bench.peers.stored import published
from vmf_bench.run import _measured, has_fault
from vmf_bench.session import FIRST_COMPILATION
from vmf_bench.table import case_table
from vmf_bench.variants import OURS, VARIANTS, Variant

pytestmark = pytest.mark.quick


def broken(inputs: HeadInputs) -> Tensor:
    raise KeyError("what others raise")


def other_loss(inputs: HeadInputs) -> Tensor:
    return 1.01 * published(inputs)


def fails_from_call(first: int) -> Any:
    calls: list[int] = []

    def loss(inputs: HeadInputs) -> Tensor:
        calls.append(0)
        if len(calls) >= first:
            raise RuntimeError("an illegal memory access")
        return published(inputs)

    return loss


def rows_of(record: dict[str, Any]) -> dict[str, Any]:
    return {row["name"]: row for row in record["rows"]}


def variant(loss: Any, *, is_ours: bool) -> Variant:
    return Variant("a loss", lambda inputs, compile_: loss, is_ours=is_ours)


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """A case with a loss that fails, one that is wrong, and one that is not to be timed."""
    names = ("streaming", "triton", "published", "one-log-softmax", "published-compiled", "reference")
    added = {"broken": variant(broken, is_ours=False), "wrong": variant(other_loss, is_ours=False)}
    return measure(case(), {name: VARIANTS[name] for name in names} | added, session(), share=0.3)


def test_a_row_follows_from_its_rounds(found: dict[str, Any]) -> None:
    rows, mm = rows_of(found), statistics.median(found["mm_seconds"])
    row, baseline = rows["streaming"], rows["published"]
    median = statistics.median(row["seconds"])
    students, teachers, prototypes, dim = (found[k] for k in ("student_rows", "teacher_rows", "prototypes", "dim"))
    operations = (6 * students + 2 * teachers) * prototypes * dim
    assert row["median"] == median
    assert row["operations_per_second"] == pytest.approx(operations / median)
    assert row["share_of_mm"] == pytest.approx(operations / median / (2 * 32**3 / mm))
    assert row["share_of_roof"] < row["share_of_mm"] + found["roof"]["parts"]["exponentials"] / median + 1e-9
    assert row["speedup"] == pytest.approx(statistics.median(baseline["seconds"]) / median)
    assert len(row["seconds"]) == len(found["mm_seconds"]) >= 3, "every round runs everything"


def test_memory_grows_with_what_is_stored(found: dict[str, Any]) -> None:
    rows = rows_of(found)
    logits_mib = 12 * 301 * 4 / 2**20
    assert rows["published"]["extra_mib"] > 2 * logits_mib, f"{rows['published']['extra_mib']} MiB"


@pytest.mark.parametrize(
    ("name", "status", "reason"),
    [
        ("triton", "not available", "it needs an NVIDIA GPU"),
        ("published-compiled", "left out", "compiled for the main sizes only"),
        ("broken", "failed", "KeyError: 'what others raise'"),
        ("wrong", "disagrees", "loss is off by 1.0e-02 from the published loss"),
    ],
)
def test_a_loss_that_is_not_timed_says_why(found: dict[str, Any], name: str, status: str, reason: str) -> None:
    row = rows_of(found)[name]
    assert (row["status"], "seconds" in row) == (status, False)
    assert reason in row["reason"], row["reason"]


def test_the_reference_is_not_timed(found: dict[str, Any]) -> None:
    assert "reference" not in rows_of(found)


@pytest.mark.parametrize(("loss", "fault"), [(published, False), (other_loss, True), (broken, True)])
def test_only_faults_of_this_library_count(loss: Any, fault: bool) -> None:
    for is_ours in (True, False):
        record = measure(case(), {"it": variant(loss, is_ours=is_ours)}, session(), share=0.05)
        assert has_fault({"checks": [], "cases": [record]}) == (fault and is_ours)


@pytest.mark.parametrize("first", [3, 5], ids=["warm-up", "second round"])
def test_a_loss_that_fails_while_it_is_timed_is_a_fault_and_ends_nothing(first: int) -> None:
    """It is compared in its first call, and the second takes its memory."""
    wanted = {"it": variant(fails_from_call(first), is_ours=True), "published": VARIANTS["published"]}
    record = _measured(case(), wanted, session(), share=0.05)
    assert record is not None
    it, other = rows_of(record)["it"], rows_of(record)["published"]
    assert (it["status"], it["reason"]) == ("failed", "RuntimeError: an illegal memory access")
    assert "seconds" not in it, "its earlier rounds are none of a loss that works"
    assert len(other["seconds"]) == len(record["mm_seconds"]) >= 3, "the others go on"
    assert has_fault({"checks": [], "cases": [record]})


@pytest.mark.parametrize("when", ["at once", "in a round"])
def test_without_torch_mm_the_rate_of_the_start_has_to_do(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = HeadInputs.of(SHAPES[0], device=CPU)

    def product(*_: Any) -> Any:
        if when == "at once":
            raise torch.OutOfMemoryError("it is full")
        fails = fails_from_call(3)
        return lambda: fails(inputs)

    monkeypatch.setattr("vmf_bench.measure.square_product", product)
    record = measure(case(), {"published": VARIANTS["published"]}, session(), share=0.05)
    assert record["mm_seconds"] == []
    assert record["rates"]["operations"] == RATES.operations
    assert len(rows_of(record)["published"]["seconds"]) >= 3
    assert f"of the start of the run, as it failed here ({record['mm_reason']})" in case_table(record)


def test_a_case_in_which_everything_fails_is_a_record(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmf_bench.measure.square_product", lambda *_: broken)
    record = measure(case(), {"it": variant(fails_from_call(3), is_ours=False)}, session(), share=0.05)
    assert rows_of(record)["it"]["status"] == "failed"
    assert "0 rounds" in case_table(record)


def test_a_compilation_is_refused_before_it_begins_and_the_longest_is_expected() -> None:
    known = session(seconds=60.0)
    begun: list[int] = []

    def slow(inputs: HeadInputs, compile_: Any) -> Any:
        begun.append(0)
        time.sleep(0.2 / len(begun))
        return published

    wanted = {"published": VARIANTS["published"], "it": Variant("it", slow, is_ours=False, compiles=True)}
    quick = {"it": variant(broken, is_ours=False)._replace(compiles=True)}
    measure(case(compiles=True), quick, known, share=0.05)
    assert known.compilation == FIRST_COMPILATION, "what fails at once tells nothing"
    measure(case(compiles=True), wanted, known, share=0.05)
    longest = known.compilation
    assert 0.2 <= longest < FIRST_COMPILATION, "what preparation takes counts"
    measure(case(compiles=True), wanted, known, share=0.05)
    assert known.compilation == longest, "the second took half as long"
    known.compiled(40.0, whole=False)
    assert known.compilation == 40.0, "one that broke off after long tells something"
    known.end = time.monotonic() + 30.0
    known.waiting = 50_000 * [case()]
    record = measure(case(compiles=True), wanted, known, share=0.05)
    assert rows_of(record)["it"]["reason"] == "compiling takes about 40 s and would not fit the time"
    assert len(begun) == 2, "it began"


def test_a_compilation_that_would_not_fit_is_left_out() -> None:
    compiled = variant(broken, is_ours=False)._replace(compiles=True)
    known, wanted = session(seconds=30.0), {"published": VARIANTS["published"], "it": compiled}
    assert rows_of(measure(case(compiles=True), wanted, known, share=0.05))["it"]["status"] == "failed", "it fits"
    known = session(seconds=30.0)
    known.waiting = 50_000 * [case()]
    record = measure(case(compiles=True), wanted, known, share=0.05)
    assert rows_of(record)["it"]["reason"] == "compiling takes about 20 s and would not fit the time"


def test_products_that_are_imitated_are_left_out() -> None:
    slow = session(rates=replace(RATES, operations=1e5))
    names = ("native", "streaming", "published")
    record = measure(case(torch.bfloat16), {name: VARIANTS[name] for name in names}, slow, share=0.05)
    rows = rows_of(record)
    assert rows["published"]["status"] == "left out"
    assert "torch.mm reaches 0.0001 Gop/s in bfloat16 here" in rows["published"]["reason"]
    assert "seconds" in rows["streaming"], f"this library multiplies such rows in fp32: {rows['streaming']}"
    assert not is_slow(VARIANTS["published"], case(), slow, share=0.05), "fp32 products are what they are"


def test_an_image_alone_tells_whether_a_backend_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = HeadInputs.of(SHAPES[0], device=CPU, dtype=torch.float32)
    rows: list[int] = []

    def refusing(name: str) -> Any:
        def loss(inputs: HeadInputs) -> Tensor:
            rows.append(len(inputs.student_features))
            raise RuntimeError(f"backend {name!r} cannot run here: it is too small")

        return loss

    monkeypatch.setattr("vmf_bench.variants.ours", refusing)
    with pytest.raises(RuntimeError, match=r"^it is too small$"):
        OURS["native"].prepare(inputs, lambda function: function)
    assert rows == [4], f"it was called with {rows} rows"


def test_what_does_not_fit_the_time_is_left_out_by_name_and_the_baseline_goes_first() -> None:
    names = ("native", "streaming", "published", "one-log-softmax", "published-compiled", "reference")
    known, wanted = session(seconds=1.0), {name: VARIANTS[name] for name in names}
    for name, seconds in {"streaming": 0.02, "published": 0.05, "one-log-softmax": 10.0}.items():
        known.remember(name, case(), seconds)
    known.prepared("native", "not available")
    found = fitting(case(), wanted, known, share=1.0)
    assert found == ["published", "streaming"], "native cannot run, and one-log-softmax would take a minute"
    rows = rows_of(measure(case(), wanted, known, 0.05, found))
    assert rows["one-log-softmax"]["reason"] == "there is no time for it at this size"
    assert rows["native"]["status"] != "left out", "that it cannot run takes no time"
    assert "seconds" in rows["streaming"]
    known.remember("published", case(), 10.0)
    assert fitting(case(), wanted, known, share=1.0) == [], "nothing is measured without what it is compared with"


@pytest.mark.parametrize(
    ("loss", "is_tried"), [(published, False), (broken, True)], ids=["left out for time", "failed"]
)
def test_only_a_loss_that_cannot_run_is_tried_again_without_a_look_at_the_time(loss: Any, is_tried: bool) -> None:
    known = session()
    wanted = {"published": VARIANTS["published"], "it": variant(loss, is_ours=False)}
    first = [] if loss is published else ["it"]
    measure(case(), wanted, known, 0.05, ["published", *first])
    row = rows_of(measure(case(), wanted, known, 0.05, ["published"]))["it"]
    assert (row["status"] == "failed") == is_tried, f"{row}"
    assert (row["status"] == "left out") != is_tried, f"{row}"
    assert ("it" in fitting(case(), wanted, known, share=1.0)) != is_tried, "its time is foreseen if it may run"


def test_a_step_of_another_size_predicts_one_of_this() -> None:
    known = session()
    large = replace(case(), shape=replace(SHAPES[0], prototypes=3010))
    assert known.predicted("streaming", case()) == pytest.approx(2 * known.operations(case()) / RATES.operations)
    known.remember("streaming", case(), 0.5)
    assert known.predicted("streaming", large) == pytest.approx(5.0)
    assert known.predicted("streaming", replace(large, dtype=torch.bfloat16)) == pytest.approx(5.0), "another dtype"


def test_a_size_that_memory_cannot_hold_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmf_bench.run.free_gib", lambda device: 1.0)
    huge = replace(case(), shape=replace(SHAPES[0], images=1000, prototypes=65_536))
    known = session(rates=replace(RATES, operations=1e15))
    assert _measured(huge, VARIANTS, known, share=1.0) is None
    assert known.left_out == [
        "main: multi-crop 4000/2000 K65536 D32 in float32: needs 12 GiB of memory, and 1 GiB are free"
    ]
