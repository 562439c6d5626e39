"""One case: what is timed, what is not and why, and what follows from the times."""

from __future__ import annotations

import statistics
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
from vmf_bench.variants import OURS, VARIANTS, Variant

pytestmark = pytest.mark.quick


def broken(inputs: HeadInputs) -> Tensor:
    raise KeyError("what others raise")


def other_loss(inputs: HeadInputs) -> Tensor:
    return 1.01 * published(inputs)


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
    found = fitting(case(), wanted, known, share=1.0)
    assert found == ["published", "streaming"], "native never ran, and one-log-softmax would take a minute"
    rows = rows_of(measure(case(), wanted, known, 0.05, found))
    assert rows["one-log-softmax"]["reason"] == "there is no time for it at this size"
    assert "seconds" in rows["streaming"]
    known.remember("published", case(), 10.0)
    assert fitting(case(), wanted, known, share=1.0) == [], "nothing is measured without what it is compared with"


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
