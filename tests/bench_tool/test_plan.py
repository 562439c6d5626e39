"""Which sizes are measured, and what a user may ask for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.bench_tool.toy import CPU
from vmf_bench.errors import BenchError
from vmf_bench.plan import MAIN, PROTOTYPES, ROWS, Options, cases, reduced
from vmf_bench.roof import operations_of

pytestmark = pytest.mark.quick


def test_main_sizes_come_first_and_curves_have_their_ends_before_their_middle() -> None:
    found = list(cases(Options.of(device=CPU)))
    assert [case.part for case in found[:4]] == [MAIN] * 4
    assert [(case.shape.matched, case.dtype) for case in found[:4]] == [
        (False, torch.float32),
        (True, torch.float32),
        (False, torch.bfloat16),
        (True, torch.bfloat16),
    ]
    assert [case.shape.student_rows for case in found if case.part == ROWS] == [40, 640, 80, 320]
    assert [case.shape.prototypes for case in found if case.part == PROTOTYPES] == [4096, 65_536, 8192, 32_768]


def test_a_gpu_starts_with_the_dtype_of_training() -> None:
    options = Options.of(device=torch.device("cuda"))
    assert options.dtypes == (torch.bfloat16, torch.float32)
    assert (options.rows, options.prototypes) == (640, 65_536)


def test_options_replace_defaults() -> None:
    options = Options.of(rows=20, prototypes=100, dim=64, dtype="bfloat16", quick=True, device=CPU)
    found = list(cases(options))
    assert {case.dtype for case in found} == {torch.bfloat16}
    assert {case.shape.dim for case in found} == {64}
    assert (found[0].shape.student_rows, found[0].shape.teacher_rows, found[0].shape.prototypes) == (20, 4, 100)
    assert (found[1].shape.student_rows, found[1].shape.teacher_rows) == (20, 20)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"rows": 65}, "--rows got 65; expected a positive multiple of 10"),
        ({"rows": 0}, "--rows got 0"),
        ({"prototypes": 1}, "--prototypes got 1; expected 16 or more"),
        ({"dim": -8}, "--dim got -8; expected a multiple of 8"),
        ({"dim": 100}, "--dim got 100; expected a multiple of 8"),
    ],
)
def test_sizes_that_make_no_sense_are_refused(asked: dict[str, Any], said: str) -> None:
    with pytest.raises(BenchError, match=said):
        Options.of(**asked, device=CPU)


def test_a_reduced_case_has_fewer_prototypes_and_as_many_rows() -> None:
    case = next(iter(cases(Options.of(device=CPU))))
    small = reduced(case, operations_of(case.shape) / 64, 1.0)
    assert small.shape.prototypes == case.shape.prototypes // 64, "both count the same operations"
    assert small.shape.student_rows == case.shape.student_rows
    assert not small.compiles
