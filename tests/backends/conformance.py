"""Measures how well a backend fulfils the contract: the largest error of all its results against the dense formula in fp64.

Legend: R rows of a query, K prototypes, D embedding dim, J column weightings.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from vmf_kernels.backends.contract import Assignment, Query
from vmf_kernels.prototypes import Keys


def dense_assignment(rows_RD: Tensor, keys: Keys, values: Keys | None = None) -> tuple[Assignment, Tensor]:
    """Contract of the backends by the dense formula in fp64: the assignment, and the probabilities [R, K]."""
    l_RK = rows_RD.double() @ _weight_of(keys).T * keys.scale.double()
    if keys.bias is not None:
        l_RK = l_RK + keys.bias.double()
    p_RK = l_RK.softmax(dim=1)
    return Assignment(
        log_sum_exp=l_RK.logsumexp(dim=1),
        entropy=-torch.xlogy(p_RK, p_RK).sum(dim=1),
        barycentre=None if values is None else p_RK @ _weight_of(values),
    ), p_RK


class Case(NamedTuple):
    """Arguments of one ``assign``; sums start at 1 and vectors as NaN, for one is added to and the other is written."""

    queries: list[Query]
    values: Keys | None
    vectors_KD: Tensor | None


def random_case(
    rows: Sequence[int],
    prototypes: int,
    dim: int,
    dtype: torch.dtype = torch.float64,
    *,
    biased: bool = True,
    weightings: int = 2,
) -> Case:
    """One query for each number of rows; the first against keys of its own, the others against the values."""

    def keys(scale: float) -> Keys:
        bias = torch.randn(prototypes, dtype=torch.float64) - 3 if biased else None
        return Keys(
            torch.randn(prototypes, dim, dtype=torch.float64).to(dtype),
            (0.5 + torch.rand(prototypes, dtype=torch.float64)).to(dtype) if biased else None,
            torch.tensor(scale, dtype=dtype),
            None if bias is None else bias.to(dtype),
        )

    own, values = keys(3.0), keys(1.5)
    queries = [
        Query(
            rows=torch.nn.functional.normalize(torch.randn(r, dim, dtype=torch.float64), dim=1).to(dtype),
            keys=values if index else own,
            cotangents=torch.randn(r, dim, dtype=torch.float64).to(dtype),
            weights=torch.rand(weightings, r, dtype=torch.float64).to(dtype),
            sums=torch.ones(weightings, prototypes, dtype=dtype),
        )
        for index, r in enumerate(rows)
    ]
    return Case(queries, values, torch.full((prototypes, dim), torch.nan, dtype=dtype))


def worst_error(backend: ModuleType, case: Case) -> float:
    """Largest error of any result, relative to the largest element of the exact one; infinity for NaN."""
    exact_vectors: Tensor | float = 0.0
    pairs: list[tuple[Tensor | None, Tensor | None]] = []
    for query in case.queries:
        assignment, p_RK = dense_assignment(query.rows, query.keys, case.values)
        pairs.extend((None, exact) for exact in assignment)
        if query.weights is not None and query.sums is not None:
            pairs.append((query.sums, query.sums.double() + query.weights.double() @ p_RK))
        if query.cotangents is not None:
            exact_vectors = exact_vectors + p_RK.T @ query.cotangents.double()
    if case.vectors_KD is not None:
        assert isinstance(exact_vectors, Tensor)
        pairs.append((case.vectors_KD, exact_vectors))
    results = iter([x for assignment in backend.assign(*case) for x in assignment])
    return max(_error(exact, next(results) if got is None else got) for got, exact in pairs)


def _weight_of(keys: Keys) -> Tensor:
    return keys.weight.double() if keys.gain is None else keys.weight.double() * keys.gain.double()[:, None]


def _error(exact: Tensor | None, got: Tensor | None) -> float:
    if exact is None or got is None:
        assert exact is got, f"expected {exact}, got {got}"
        return 0.0
    assert got.shape == exact.shape, f"shape {tuple(got.shape)}, expected {tuple(exact.shape)}"
    if not exact.numel():
        return 0.0
    largest = exact.abs().max().clamp(min=torch.finfo(torch.float64).tiny)
    return float(((got.double() - exact).abs().max() / largest).nan_to_num(nan=torch.inf))


def column_error(backend: ModuleType, case: Case) -> float:
    """Largest error of ``column_log_sum_exp``, in nats."""
    errors = [0.0]
    for query in case.queries:
        offset_R = torch.randn(len(query.rows), dtype=query.rows.dtype)
        assignment, p_RK = dense_assignment(query.rows, query.keys)
        l_RK = p_RK.log() + assignment.log_sum_exp[:, None]
        exact = (l_RK - offset_R.double()[:, None]).logsumexp(dim=0)
        got = backend.column_log_sum_exp(query.rows, query.keys, offset_R)
        assert (got.shape, got.dtype) == (exact.shape, query.rows.dtype)
        errors.append(0.0 if got.tolist() == exact.tolist() else float((got.double() - exact).abs().max()))
    return max(errors)
