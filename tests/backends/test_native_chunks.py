"""Chunks of the native backend: the rows of each, the sum of their results, and the memory they save.

Legend: S / T student / teacher rows, G / V their views, B images, R rows of either, K prototypes, D embedding dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch

from tests.backends.native_calls import check, check_log_sums, damaged
from tests.measure import allocations_of
from vmf_kernels import prototype_usage
from vmf_kernels.backends.native import chunks, module, operator, scores
from vmf_kernels.backends.native.chunks import Chunk, chunks_of, row_ranges, rows_at_once
from vmf_kernels.backends.native.scores import Logits
from vmf_kernels.ops.assignments import column_log_sum_exp, row_log_sum_exp
from vmf_kernels.prototypes import KINDS, Prototypes
from vmf_kernels.testing import Problem, library_outcome, random_problem

pytestmark = pytest.mark.skipif(module.native() is None, reason="vmf_kernels._native was not built")

PROTOTYPES = 1000
# images, (teacher views, student views), rows that the workspace holds, chunks that come of it
CASES = {
    "images": (23, (2, 4), 54, 3),
    "single images": (5, (2, 4), 11, 5),
    "one to one": (65, (1, 1), 16, 9),
    "views of an image": (2, (9, 33), 11, 28),
    "teachers' views": (1, (63, 2), 17, 8),
    "single rows": (1, (3, 4), 2, 12),
    "rows": (1, (63, 65), 100, 4),
}


@contextmanager
def workspace_of(rows: int, prototypes: int = PROTOTYPES) -> Iterator[None]:
    """The workspace of so many rows' logits, however few rows there are."""
    sizes: dict[str, Any] = {"WORKSPACE_BYTES": rows * prototypes * 4, "LEAST_WORKSPACE_BYTES": rows * prototypes * 4}
    with mock.patch.multiple(chunks, **sizes, LEAST_ROWS=1):
        yield


def problem_of(case: str, dtype: torch.dtype = torch.float32, kind: str = "weight_norm_vmf") -> Problem:
    images, views, _, _ = CASES[case]
    return random_problem(images=images, views=views, prototypes=PROTOTYPES, dim=24, dtype=dtype, kind=kind)


@pytest.mark.parametrize("case", [*CASES, "none"])
def test_every_pair_of_views_and_every_row_is_in_one_chunk(case: str) -> None:
    images, views, most, count = CASES.get(case, (0, (2, 4), 11, 0))
    pairs = torch.zeros(*views, images)
    students, teachers = torch.zeros(views[1], images), torch.zeros(views[0], images)
    with workspace_of(most):
        made = chunks_of(views, images, PROTOTYPES)
    for chunk in made:
        pairs[chunk.teacher_views, chunk.student_views, chunk.images] += 1
        chunk.students_of(students).add_(1)
        chunk.teachers_of(teachers).add_(1)
        rows = chunk.students_of(students).numel() + chunk.teachers_of(teachers).numel()
        assert rows <= most, f"a chunk of {rows} rows does not fit the workspace of {most}"
    assert len(made) == count
    assert (pairs == 1).all(), f"pairs are in {sorted(set(pairs.flatten().tolist()))} chunks, expected 1"
    assert students.all(), "some student rows are in no chunk"
    assert teachers.all(), "some teacher rows are in no chunk"


@pytest.mark.parametrize("rows", [0, 1, 16, 17, 700])
def test_ranges_of_rows_follow_each_other(rows: int) -> None:
    with workspace_of(16):
        ranges = list(row_ranges(rows, PROTOTYPES))
    assert [i for r in ranges for i in range(r.start, r.stop)] == list(range(rows))
    assert all(r.stop - r.start <= 16 for r in ranges)


@pytest.mark.parametrize(
    ("rows", "prototypes", "expected"),
    [
        (160, 65536, 80),  # half of them: a small batch saves memory too
        (1280, 65536, 384),  # the workspace
        (40, 65536, 64),  # the least workspace
        (10**4, 1000, 768),  # the cache
        (640, 10**7, 16),
    ],
)
def test_how_many_rows_go_at_once(rows: int, prototypes: int, expected: int) -> None:
    sizes: dict[str, Any] = {"WORKSPACE_BYTES": 96 * 2**20, "LEAST_WORKSPACE_BYTES": 16 * 2**20}
    with mock.patch.multiple(chunks, **sizes, MOST_ROWS=768, LEAST_ROWS=16, WORKSPACE_SHARE=0.5):
        assert rows_at_once(rows, prototypes) == expected


Run = Callable[..., None]


@contextmanager
def each_chunk(change: Callable[[Run, int, dict[str, Any]], None]) -> Iterator[list[Chunk]]:
    """Every chunk of a loss run by ``change(run, its index, its arguments)``; the chunks seen."""
    seen: list[Chunk] = []
    run = operator._Step.run

    def changed(self: operator._Step, chunk: Chunk, *rest: Any, **options: Any) -> None:
        seen.append(chunk)
        change(lambda chunk, **options: run(self, chunk, *rest, **options), len(seen) - 1, {"chunk": chunk} | options)

    with mock.patch.object(operator._Step, "run", changed):
        yield seen


def as_they_are(run: Run, index: int, arguments: dict[str, Any]) -> None:
    run(**arguments)


def one_is_lost(run: Run, index: int, arguments: dict[str, Any]) -> None:
    if index != 1:
        run(**arguments)


def one_runs_twice(run: Run, index: int, arguments: dict[str, Any]) -> None:
    for _ in range(2 if index == 1 else 1):
        run(**arguments)


def each_is_the_first(run: Run, index: int, arguments: dict[str, Any]) -> None:
    run(**arguments | {"first": True})


def each_is_the_last(run: Run, index: int, arguments: dict[str, Any]) -> None:
    run(**arguments | {"last": True})


def none_is_the_last(run: Run, index: int, arguments: dict[str, Any]) -> None:
    run(**arguments | {"last": False})


DAMAGES = [
    one_is_lost,
    one_runs_twice,
    each_is_the_first,
    each_is_the_last,
    none_is_the_last,
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_several_chunks_match_the_fp64_truth(
    case: str, dtype: torch.dtype, isa: str, uninitialised_memory_is_nan: None
) -> None:
    with workspace_of(CASES[case][2]), each_chunk(as_they_are) as seen:
        check(problem_of(case, dtype), isa)
    assert len(seen) == CASES[case][3]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", ["images", "views of an image"])
def test_every_kind_in_several_chunks_matches_the_fp64_truth(case: str, kind: str, isa: str) -> None:
    with workspace_of(CASES[case][2]), each_chunk(as_they_are) as seen:
        check(problem_of(case, kind=kind), isa)
    assert len(seen) == CASES[case][3]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damaged_chunks_fail_the_budget(damage: Callable[[Run, int, dict[str, Any]], None], isa: str) -> None:
    """Negative control."""
    case = "views of an image"
    with workspace_of(CASES[case][2]), each_chunk(damage), pytest.raises(AssertionError, match=r"error .*, budget"):
        check(problem_of(case), isa)


def test_chunks_in_threads_repeat_bitwise(isa: str) -> None:
    outcomes = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        with workspace_of(CASES["images"][2]):
            outcomes.append(library_outcome(problem_of("images"), "native"))
    for other in outcomes[1:]:
        changed = [name for name, value in outcomes[0].items() if not torch.equal(value, other[name])]
        assert not changed, f"{changed} differ"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_usage_and_log_sums_in_several_ranges_match_the_dense_formula(
    dtype: torch.dtype, isa: str, uninitialised_memory_is_nan: None
) -> None:
    problem = random_problem(views=(1, 65), prototypes=PROTOTYPES, dim=24, dtype=dtype)
    assert problem.teacher_bias is not None
    with workspace_of(17), damaged(lambda name, arguments: None) as names:
        check_log_sums(problem.student_features, problem.student_prototypes, problem.teacher_bias, isa)
    # usage and rows in four ranges each; the columns of 1000 prototypes against 65 rows in four of 250
    assert (names.count("Score"), names.count("Gather")) == (12, 4)


def a_lost_range(name: str, arguments: dict[str, Any]) -> None:
    if name == "Gather":
        images = arguments["images"]
        arguments["image_weights"] = (torch.arange(images) < images // 2).float()


def test_lost_rows_fail_the_budget_of_usage(isa: str) -> None:
    """Negative control of the one above."""
    problem = random_problem(views=(1, 65), prototypes=PROTOTYPES, dim=24, dtype=torch.float32)
    assert problem.teacher_bias is not None
    with workspace_of(17), damaged(a_lost_range), pytest.raises(AssertionError, match=r"usage: error .*, budget"):
        check_log_sums(problem.student_features, problem.student_prototypes, problem.teacher_bias, isa)


def loss_of(problem: Problem, backend: str) -> Any:
    return library_outcome(problem, backend)


def usage_of(problem: Problem, backend: str) -> Any:
    return prototype_usage(problem.student_features, problem.student_prototypes, 0.1, backend=backend)


def log_sums_of(problem: Problem, backend: str) -> Any:
    x, prototypes = problem.student_features, problem.student_prototypes
    rows = row_log_sum_exp(x, prototypes, 0.1, backend=backend)
    return column_log_sum_exp(x, prototypes, 0.1, rows, backend=backend)


def peak_of(run: Callable[[Problem, str], Any], backend: str, images: int) -> int:
    problem = random_problem(images=images, views=(1, 4), prototypes=4099, dim=8, dtype=torch.float32)
    return allocations_of(lambda: run(problem, backend)).peak


@pytest.mark.parametrize("run", [loss_of, usage_of, log_sums_of])
def test_memory_does_not_grow_with_rows_times_prototypes(run: Callable[[Problem, str], Any]) -> None:
    with workspace_of(128, 4099):
        growth = peak_of(run, "native", 512) - peak_of(run, "native", 128)
    logits = (512 - 128) * 4 * 4099 * 4
    assert growth < logits / 20, f"{growth} bytes more for rows whose logits take {logits}"


@pytest.mark.parametrize("run", [loss_of, usage_of, log_sums_of])
def test_the_reference_does_grow(run: Callable[[Problem, str], Any]) -> None:
    """Negative control of the one above."""
    growth, logits = peak_of(run, "reference", 64) - peak_of(run, "reference", 16), (64 - 16) * 4 * 4099 * 4
    assert growth >= logits, f"{growth} bytes more for rows whose logits take {logits}"


@pytest.mark.parametrize(
    ("views", "images", "dim", "first", "count"),
    [
        ((2, 4), 23, 64, 8, 2),  # 16 + 32 of 64 columns, and the rest in as many chunks as without
        ((2, 4), 8, 64, 8, 1),
        ((2, 4), 23, 32, 12, 2),  # 4 images in the gradient would make a third chunk
        ((1, 1), 3771, 4096, 384, 77),  # as many as stay in cache, however much is free
    ],
    ids=str,
)
def test_the_first_chunk_takes_what_is_free(
    views: tuple[int, int], images: int, dim: int, first: int, count: int
) -> None:
    with workspace_of(90):
        made = chunks_of(views, images, PROTOTYPES, dim)
    got = [chunk.images.stop - chunk.images.start for chunk in made]
    assert (sum(got), got[0], len(got)) == (images, first, count), f"chunks of {got} images"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("images", [8, 23])
def test_logits_in_the_gradient_and_in_pieces_match_the_fp64_truth(
    images: int, dtype: torch.dtype, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scores, "PIECE_BYTES", 333 * 96 * 4)
    problem = random_problem(images=images, views=(2, 4), prototypes=PROTOTYPES, dim=64, dtype=dtype)
    with workspace_of(90), mock.patch.object(Logits, "empty", wraps=Logits.empty) as elsewhere:
        check(problem, isa)
    assert [call.args[1] for call in elsewhere.call_args_list] == [[], [96]][images > 8], (
        "logits did not go where expected"
    )


@pytest.mark.quick
def test_constants_are_those_of_the_module() -> None:
    built = module.built()
    assert (chunks.ROW_PADDING, scores.MOST_PIECES) == (built.ROW_PADDING, built.MOST_PIECES)


def test_bf16_rounds_the_difference_where_views_are_cut_as_well() -> None:
    """Prototypes that are all alike: p and q cancel, in every chunk by itself."""
    problem = random_problem(
        images=1, views=(40, 60), prototypes=PROTOTYPES, dim=64, dtype=torch.bfloat16, kind="linear"
    )
    alike = Prototypes(problem.student_prototypes.weight[:1].expand(PROTOTYPES, 64).contiguous(), None, "linear")
    problem = replace(problem, student_prototypes=alike, teacher_prototypes=alike, teacher_bias=None)
    with workspace_of(30):
        outcome = library_outcome(problem, "native")
    largest = outcome["feature_gradient"].abs().max().item()
    assert largest <= 1e-6, f"gradient of {largest:.1e} where p = q"
