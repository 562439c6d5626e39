"""Duplicates among prototypes against a greedy count written pair by pair."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.fuzz.statements.spread import greedy_groups
from tests.measure import allocations_of
from vmf_kernels import diagnostics, unique_prototypes, weight_norm_prototypes

DIM = 6


def partition(groups: list[int]) -> set[frozenset[int]]:
    """The sets of prototypes, whatever the groups are called."""
    return {frozenset(i for i, g in enumerate(groups) if g == group) for group in groups}


def members(groups: list[int]) -> list[list[int]]:
    """The prototypes of each group, in the order of the groups."""
    return [[i for i, g in enumerate(groups) if g == group] for group in sorted(set(groups))]


def clustered(prototypes: int, clusters: int, spread: float) -> Tensor:
    """[K, D] rows of any norm near a few directions, in random order."""
    centers = torch.randn(clusters, DIM)
    weight = centers[torch.randint(clusters, (prototypes,))] + spread * torch.randn(prototypes, DIM)
    return weight * (0.1 + 10 * torch.rand(prototypes, 1))


@pytest.mark.parametrize("block", [7, 1024])
@pytest.mark.parametrize("spread", [0.0, 0.05, 0.5])
@pytest.mark.parametrize(("metric", "eps"), [("cosine", 0.025), ("euclidean", 0.025), ("euclidean", 0.3)])
def test_groups_equal_the_greedy_count(
    metric: str, eps: float, spread: float, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diagnostics, "BLOCK", block)
    weight = clustered(120, 20, spread)
    found = unique_prototypes(weight, eps, metric)
    expected = greedy_groups(weight, eps, metric)
    # without zero rows groups are numbered in the order of their first members, as in the naive count
    assert found.group.tolist() == expected
    assert found.count == len(set(expected))
    assert found.largest_share == max(expected.count(g) for g in expected) / 120
    assert found.largest.tolist() == max(members(expected), key=len)


@pytest.mark.quick
@pytest.mark.parametrize("block", [2, 5, 1024])
def test_zero_rows_form_one_group_across_blocks(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnostics, "BLOCK", block)
    weight = torch.randn(9, DIM)
    weight[[1, 4, 8]] = 0
    found = unique_prototypes(weight)
    assert partition(found.group.tolist()) == partition(greedy_groups(weight, 0.025, "cosine"))
    assert unique_prototypes(torch.zeros(5, DIM)).count == 1


@pytest.mark.quick
@pytest.mark.parametrize("block", [3, 1024])
def test_the_greedy_rule_depends_on_the_order(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a chain a, b, c of neighbours, the middle first makes one group, an end first makes two."""
    monkeypatch.setattr(diagnostics, "BLOCK", block)
    angles = torch.tensor([0.0, 0.2, 0.4])
    chain = torch.stack([angles.cos(), angles.sin()], dim=1)
    counts = [unique_prototypes(chain[order], 0.025).count for order in ([1, 0, 2], [0, 1, 2], [2, 1, 0])]
    assert counts == [1, 2, 2]


@pytest.mark.quick
def test_duplicates_share_a_group_in_any_order() -> None:
    weight = torch.randn(30, DIM).repeat(3, 1)
    order = torch.randperm(90)
    found = unique_prototypes(weight[order])
    assert found.count == 30
    assert found.largest_share == 3 / 90
    assert all(len({int(found.group[order == i + 30 * copy]) for copy in range(3)}) == 1 for i in range(30))


@pytest.mark.quick
def test_the_largest_group_may_be_that_of_zero_rows() -> None:
    weight = torch.eye(DIM)
    weight[[0, 3, 5]] = 0
    found = unique_prototypes(weight)
    assert found.largest.tolist() == [0, 3, 5]
    assert found.largest_share == 0.5
    assert found.largest.dtype == torch.int64


@pytest.mark.quick
def test_of_equally_large_groups_the_first_is_the_largest() -> None:
    assert unique_prototypes(torch.eye(DIM)).largest.tolist() == [0]


@pytest.mark.quick
@pytest.mark.parametrize("weight", [torch.randn(64, DIM), torch.eye(DIM).repeat(3, 1), torch.zeros(4, DIM)])
def test_the_prototypes_stay_as_they_are(weight: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnostics, "BLOCK", 8)
    before = weight.clone()
    unique_prototypes(weight)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("duplicates", [False, True], ids=["distinct", "duplicates"])
def test_memory_is_that_of_tiles_and_directions(duplicates: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnostics, "BLOCK", 256)
    prototypes, dim = 2048, 16
    weight = torch.randn(prototypes, dim)
    if duplicates:
        weight[8:] = weight[torch.randint(8, (prototypes - 8,))]
    found = allocations_of(lambda: unique_prototypes(weight))
    tile, copy = 4 * diagnostics.BLOCK**2, weight.numel() * 4
    assert found.largest <= tile, f"one allocation of {found.largest} bytes"
    budget = 2 * copy + 4 * tile  # a tile, the rows of it that are found, and their comparison as booleans and integers
    assert found.peak <= budget, f"{found.peak} bytes at once, budget {budget}"
    assert allocations_of(lambda: weight[: diagnostics.BLOCK] @ weight.T).largest > budget, "negative control"


@pytest.mark.quick
def test_opposite_directions_and_norms() -> None:
    weight = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [100.0, 0.0]])
    assert unique_prototypes(weight).group.tolist() == [0, 1, 0]


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_dtype_is_counted(dtype: torch.dtype) -> None:
    weight = torch.eye(DIM).repeat(2, 1).to(dtype)
    assert unique_prototypes(weight).count == DIM


@pytest.mark.quick
def test_autocast_does_not_round_the_similarities() -> None:
    angles = torch.tensor([0.0, 0.05])  # 1 - cos is 1.2e-3, under half a step of bfloat16 below 1
    weight = torch.stack([angles.cos(), angles.sin()], dim=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert unique_prototypes(weight, 1e-4).count == 2


@pytest.mark.quick
def test_weights_that_require_a_gradient_are_counted() -> None:
    assert unique_prototypes(torch.randn(4, DIM, requires_grad=True)).count == 4


@pytest.mark.quick
@pytest.mark.parametrize(
    ("weight", "options", "message"),
    [
        (torch.randn(3), {}, r"weight is torch.float32 of shape \(3,\)"),
        (torch.randn(0, 4), {}, r"expected a floating-point matrix \[K, D\] with K >= 1"),
        (torch.ones(3, 4, dtype=torch.int64), {}, "weight is torch.int64"),
        (torch.randn(3, 4), {"eps": -0.1}, "eps -0.1; expected .* an eps >= 0"),
        (torch.randn(3, 4), {"metric": "angle"}, "metric is 'angle'; expected one of cosine, euclidean"),
    ],
    ids=["vector", "empty", "integers", "eps", "metric"],
)
def test_wrong_arguments_are_refused(weight: Tensor, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        unique_prototypes(weight, **options)  # type: ignore[arg-type]


@pytest.mark.quick
def test_freed_prototypes_are_refused_not_read() -> None:
    weight = torch.randn(5, DIM)
    assert unique_prototypes(weight).count == 5
    weight.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="has been freed"):
        unique_prototypes(weight)


@pytest.mark.quick
def test_prototypes_count_as_their_effective_weight() -> None:
    g, v = torch.randn(7, 1), torch.randn(7, 3)
    g[1] = 2 * g[0]
    v[1] = v[0]
    assert unique_prototypes(weight_norm_prototypes(g, v), 0.01).count == 6
    g[1] = -g[1]  # a negative norm turns the direction around
    assert unique_prototypes(weight_norm_prototypes(g, v), 0.01).count == 7
    with pytest.raises(ValueError, match=r"weight is a list; expected Prototypes, or a matrix"):
        unique_prototypes([1.0])  # type: ignore[arg-type]
