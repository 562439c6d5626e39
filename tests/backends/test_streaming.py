"""The streaming backend against the contract, in one chunk and in many, and what it allocates."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.backends.conformance import Case, column_error, random_case, worst_error
from tests.measure import allocations_of
from vmf_kernels.backends import reference, streaming
from vmf_kernels.backends.contract import Query
from vmf_kernels.prototypes import LOWEST_BIAS

FP64_BUDGET = 1e-12
ROUNDING = 1e-6  # of fp32, on top of twice the reference's error
ROWS = [(1,), (0,), (63, 65), (0, 7), (7, 0), (65, 0, 1, 257)]


@pytest.fixture
def many_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 48 prototypes, and a workspace for few rows: no shape of these tests is a multiple of either."""
    monkeypatch.setattr(streaming, "BLOCK_PROTOTYPES", 48)
    monkeypatch.setattr(streaming, "WORKSPACE_BYTES", 11 * 127 * 8)
    monkeypatch.setattr(streaming, "LEAST_WORKSPACE_BYTES", 0)
    monkeypatch.setattr(streaming, "LEAST_CHUNK_ROWS", 5)


def counted_chunks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every chunk that runs from now on."""
    rows: list[int] = []
    run = streaming._assign_chunk

    def counting(segments: list[Query], *rest: object) -> object:
        rows.append(sum(len(query.rows) for query in segments))
        return run(segments, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(streaming, "_assign_chunk", counting)
    return rows


@pytest.mark.quick
@pytest.mark.parametrize("biased", [True, False], ids=["gain and bias", "plain"])
@pytest.mark.parametrize("rows", ROWS, ids=str)
@pytest.mark.parametrize(("prototypes", "dim"), [(1, 2), (127, 24), (1000, 256), (4099, 24)])
def test_assignment_and_sums_follow_the_contract(
    prototypes: int, dim: int, rows: tuple[int, ...], biased: bool
) -> None:
    error = worst_error(streaming, random_case(rows, prototypes, dim, biased=biased))
    assert error <= FP64_BUDGET, f"relative error {error:.1e}, budget {FP64_BUDGET:.0e}"


@pytest.mark.parametrize("rows", ROWS, ids=str)
@pytest.mark.parametrize(("prototypes", "dim"), [(1, 2), (127, 24), (4099, 256)])
def test_fp32_is_as_good_as_the_reference(prototypes: int, dim: int, rows: tuple[int, ...]) -> None:
    errors = []
    for backend in (streaming, reference):
        torch.manual_seed(1)
        errors.append(worst_error(backend, random_case(rows, prototypes, dim, torch.float32)))
    budget = 2 * errors[1] + ROUNDING
    assert errors[0] <= budget, f"relative error {errors[0]:.1e}, budget {budget:.1e}"


@pytest.mark.quick
@pytest.mark.parametrize("rows", ROWS, ids=str)
def test_many_chunks_and_ragged_blocks_follow_the_contract(
    rows: tuple[int, ...], many_chunks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunks = counted_chunks(monkeypatch)
    error = worst_error(streaming, random_case(rows, 127, 24))
    assert sum(chunks) == sum(rows)
    assert max(chunks) <= 11, f"chunks of {chunks} rows do not fit the workspace"
    assert error <= FP64_BUDGET, f"relative error {error:.1e} in {len(chunks)} chunks, budget {FP64_BUDGET:.0e}"


@pytest.mark.quick
@pytest.mark.parametrize("damage", ["a chunk", "a block"])
def test_a_lost_chunk_or_block_fails(damage: str, many_chunks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: the last of them is left out of the sums over rows."""
    add = streaming._Vectors.add

    def lossy(self: streaming._Vectors, block: slice, p_BR: Tensor, cotangents_RD: Tensor) -> None:
        lost = not self.overwrite if damage == "a chunk" else block.stop == 127
        add(self, block, 0 * p_BR if lost else p_BR, cotangents_RD)

    monkeypatch.setattr(streaming._Vectors, "add", lossy)
    error = worst_error(streaming, random_case((63, 65), 127, 24))
    assert error > FP64_BUDGET, f"without {damage} it passes: relative error {error:.1e}"


@pytest.mark.quick
@pytest.mark.parametrize("rows", ROWS, ids=str)
@pytest.mark.parametrize("prototypes", [1, 127, 4099])
def test_column_sums_follow_the_contract(prototypes: int, rows: tuple[int, ...]) -> None:
    error = column_error(streaming, random_case(rows, prototypes, 24))
    assert error <= FP64_BUDGET, f"error {error:.1e} nats, budget {FP64_BUDGET:.0e}"


@pytest.mark.quick
@pytest.mark.parametrize("rows", ROWS, ids=str)
def test_column_sums_follow_the_contract_in_many_chunks(rows: tuple[int, ...], many_chunks: None) -> None:
    error = column_error(streaming, random_case(rows, 127, 24))
    assert error <= FP64_BUDGET, f"error {error:.1e} nats, budget {FP64_BUDGET:.0e}"


@pytest.mark.quick
def test_no_element_is_left_unwritten(many_chunks: None, uninitialised_memory_is_nan: None) -> None:
    error = worst_error(streaming, random_case((63, 0, 65), 127, 24))
    assert error <= FP64_BUDGET, f"relative error {error:.1e}, budget {FP64_BUDGET:.0e}"


@pytest.mark.quick
@pytest.mark.parametrize("left_out", [slice(0, 48), slice(48, 96), slice(96, 127), slice(0, 126)], ids=str)
def test_blocks_of_left_out_prototypes_weigh_nothing(left_out: slice, many_chunks: None) -> None:
    case = random_case((9, 4), 127, 24, torch.float32)
    for query in case.queries:
        assert query.keys.bias is not None
        query.keys.bias[left_out] = LOWEST_BIAS
    first, second = streaming.assign(case.queries, None, case.vectors_KD)
    kept = torch.ones(127, dtype=torch.bool)
    kept[left_out] = False
    assert case.vectors_KD is not None
    assert not case.vectors_KD[left_out].any(), "a prototype that is left out has a gradient"
    fewer = [
        query._replace(
            keys=query.keys._replace(
                weight=query.keys.weight[kept],
                gain=None if query.keys.gain is None else query.keys.gain[kept],
                bias=None if query.keys.bias is None else query.keys.bias[kept],
            ),
            sums=None,
        )
        for query in case.queries
    ]
    for got, expected in zip((first, second), streaming.assign(fewer), strict=True):
        torch.testing.assert_close(got.log_sum_exp, expected.log_sum_exp, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(got.entropy, expected.entropy, rtol=1e-5, atol=1e-5)


@pytest.mark.quick
@pytest.mark.parametrize("layout", [lambda x: x.T.contiguous().T, lambda x: x.repeat(1, 2)[:, : x.shape[1]]])
def test_strides_do_not_matter(layout: Callable[[Tensor], Tensor], many_chunks: None) -> None:
    case = random_case((63, 65), 127, 24)
    assert case.values is not None
    strided_values = case.values._replace(weight=layout(case.values.weight))
    queries = [
        query._replace(
            rows=layout(query.rows),
            keys=strided_values if query.keys is case.values else query.keys._replace(weight=layout(query.keys.weight)),
            cotangents=None if query.cotangents is None else layout(query.cotangents),
            weights=None if query.weights is None else layout(query.weights),
        )
        for query in case.queries
    ]
    error = worst_error(streaming, Case(queries, strided_values, case.vectors_KD))
    assert error <= FP64_BUDGET, f"relative error {error:.1e}, budget {FP64_BUDGET:.0e}"


@pytest.mark.quick
def test_a_repeat_is_bitwise_equal(many_chunks: None) -> None:
    torch.set_num_threads(2)
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        case = random_case((63, 65), 127, 24, torch.float32)
        assignments = streaming.assign(*case)
        sums = [query.sums for query in case.queries]
        results.append([*(x for a in assignments for x in a), *sums, case.vectors_KD])
    changed = [
        i for i, (a, b) in enumerate(zip(*results, strict=True)) if a is None or b is None or not torch.equal(a, b)
    ]
    assert not changed, f"results {changed} differ on repeat"


def peak_of(backend: object, rows: int) -> int:
    case = random_case((rows, rows // 4), 4099, 8, torch.float32)
    return allocations_of(lambda: backend.assign(*case)).peak  # type: ignore[attr-defined]


def test_memory_does_not_grow_with_rows_times_prototypes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "WORKSPACE_BYTES", 2**21)
    monkeypatch.setattr(streaming, "LEAST_WORKSPACE_BYTES", 2**21)
    growth, logits = peak_of(streaming, 2048) - peak_of(streaming, 512), (2048 - 512) * 5 // 4 * 4099 * 4
    assert growth < logits / 20, f"{growth} bytes more for rows whose logits take {logits}"


def test_the_reference_does_grow() -> None:
    """Negative control of the one above."""
    growth, logits = peak_of(reference, 512) - peak_of(reference, 128), (512 - 128) * 4099 * 4
    assert growth > logits, f"{growth} bytes more for rows whose logits take {logits}"
