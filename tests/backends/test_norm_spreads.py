"""The vMF loss for widely different norms: rows use biases that are small compared with those of prototypes they do not use.

Legend: G / V teacher / student views, B images, R rows of either network, K prototypes, D embedding dim.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from vmf_kernels.backends import composed
from vmf_kernels.backends.native import module
from vmf_kernels.testing import Problem, assert_within_budget, library_outcome, random_problem

# images, prototypes, dim, how many of them are large: small ones under Triton's interpreter
SIZES = {
    "reference": (32, 1000, 64, 600),
    "streaming": (32, 1000, 64, 600),
    "native": (32, 1000, 64, 600),
    "triton": (2, 65, 16, 39),
}


def spread(factor: float, near: str, size: tuple[int, int, int, int]) -> Problem:
    """Two networks whose first prototypes are ``factor`` times as long as the others, and rows near either kind."""
    images, prototypes, dim, large = size
    problem = random_problem(images=images, views=(2, 2), prototypes=prototypes, dim=dim, kind="linear_vmf")
    weight = problem.student_prototypes.weight
    teacher = weight + 0.1 * problem.teacher_prototypes.weight
    mine = weight[:large] if near == "large" else weight[large:]

    def rows_near(rows: Tensor) -> Tensor:
        return normalize(normalize(mine[torch.arange(len(rows)) % len(mine)], dim=1) + 0.1 * rows, dim=1)

    lengths = torch.where(torch.arange(prototypes) < large, factor, 1.0)[:, None]
    return replace(
        problem,
        student_features=rows_near(problem.student_features),
        teacher_features=rows_near(problem.teacher_features),
        student_prototypes=replace(problem.student_prototypes, weight=weight * lengths),
        teacher_prototypes=replace(problem.teacher_prototypes, weight=teacher * lengths),
        teacher_bias=None,
    ).to(torch.float32)


@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("near", ["small", "large"])
@pytest.mark.parametrize(
    ("backend", "factor"),
    [(name, factor) for name in SIZES for factor in (1.0, 10.0, 100.0, 1e4) if name != "triton" or factor > 10],
)
def test_norms_may_spread(backend: str, factor: float, near: str) -> None:
    if backend == "native" and module.native() is None:
        pytest.skip("vmf_kernels._native was not built")
    if backend == "triton" and torch.cuda.is_available():
        pytest.skip("the kernels run on the GPU here: tests/gpu")
    problem = spread(factor, near, SIZES[backend])
    assert_within_budget(library_outcome(problem, backend), problem)


@pytest.mark.parametrize("backend", ["reference", "streaming"])
def test_biases_summed_relative_to_their_median_fail(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: in fp32, from a bias that no row uses."""

    def in_fp32(self: composed._ColumnBuffers, bias_K: Tensor, group: object) -> Tensor:
        mass_K = self.mass_2K[1] / self.mass_2K[1].sum()
        return (bias_K - bias_K.median()) @ mass_K + bias_K.median()

    monkeypatch.setattr(composed._ColumnBuffers, "mean_bias", in_fp32)
    problem = spread(100.0, "small", SIZES[backend])
    with pytest.raises(AssertionError, match=r"loss: .* error .*, budget"):
        assert_within_budget(library_outcome(problem, backend), problem)
