"""Multinomial logistic regression by L-BFGS, for one strength of the penalty or many.

Legend: N rows, M test rows, F features, C classes.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ITERATIONS = 1000
TOLERANCE = 1e-12  # of the largest entry of the gradient of the mean loss
CHANGE = 64 * 2.0**-52  # of the mean loss, as a share of it: some roundings of float64, as scikit-learn has it
LINE_SEARCH = 50  # evaluations of the loss in one iteration
LOWEST, HIGHEST = -6.0, 5.0  # powers of ten: C of DINOv2, and 1 / C of Ericsson et al.


@dataclass(frozen=True, eq=False)
class Logistic:
    """A fitted regression.

    Attributes:
        cost: C, weight of the summed losses against half the squared weights.
        weights: [C, F] float64.
        intercepts: [C] float64; zero if there are none.
        settled: whether L-BFGS ended before its last iteration.
    """

    cost: float
    weights: Tensor
    intercepts: Tensor
    settled: bool

    def scores(self, rows: Tensor) -> Tensor:
        """[M, C] float64 logits of rows [M, F]."""
        return torch.addmm(self.intercepts, rows.to(self.weights), self.weights.T)


def costs(count: int) -> list[float]:
    """``count`` values of C from 1e-6 to 1e5, evenly spaced in the logarithm."""
    return [10.0**power for power in torch.linspace(LOWEST, HIGHEST, count, dtype=torch.float64).tolist()]


def inverse_costs(count: int) -> list[float]:
    """``count`` values of C of which 1 / C are ``costs``, ascending: from 1e-5 to 1e6."""
    return [1 / value for value in reversed(costs(count))]


def regressions(
    rows: Tensor, labels: Tensor, classes: int, given: Iterable[float], *, intercept: bool = True
) -> Iterator[Logistic]:
    """The regression of each C of ``given``; each starts where the one before ended, which changes no optimum.

    Minimises ``C sum_i log-loss_i + |weights|^2 / 2``, divided by ``C N``; intercepts are not penalised. It is the objective
    of scikit-learn's LogisticRegression. Float64, deterministic, on the device of ``rows``.

    Args:
        rows: [N, F], on the device that computes.
        labels: [N] int64 in [0, classes).
        classes: at least 2.
        given: values of C, positive; ascending ones settle the fastest.
        intercept: whether there are intercepts.

    Raises:
        ValueError: there are fewer than 2 classes.
    """
    if classes < 2:
        raise ValueError(f"there is {classes} class; a regression needs at least 2")
    exact = rows.double()
    weights, intercepts = exact.new_zeros(classes, rows.shape[1]), exact.new_zeros(classes)
    for cost in given:
        fitted = _fitted(exact, labels, cost, (weights, intercepts), intercept=intercept)
        weights, intercepts = fitted.weights, fitted.intercepts
        yield fitted


def _fitted(rows: Tensor, labels: Tensor, cost: float, start: tuple[Tensor, Tensor], *, intercept: bool) -> Logistic:
    from scipy.optimize import minimize  # a run starts without it, as without scikit-learn

    classes, dim = start[0].shape
    penalty = 1 / (cost * len(rows))

    def loss(flat: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        """The mean loss, and its gradient by weights and intercepts in one row."""
        weights, intercepts = _parts(torch.from_numpy(flat).to(rows), classes, dim)
        logs = torch.addmm(intercepts, rows, weights.T).log_softmax(dim=1)
        value = float(penalty * weights.square().sum() / 2 - logs.gather(1, labels[:, None]).mean())
        residuals = logs.exp_()
        residuals.scatter_add_(1, labels[:, None], residuals.new_full((len(rows), 1), -1.0))
        residuals /= len(rows)
        slopes = residuals.sum(dim=0) if intercept else torch.zeros_like(intercepts)
        return value, _joined(residuals.T @ rows + penalty * weights, slopes)

    limits = {"maxiter": ITERATIONS, "maxfun": 2 * ITERATIONS, "gtol": TOLERANCE, "ftol": CHANGE, "maxls": LINE_SEARCH}
    found = minimize(loss, _joined(*start), method="L-BFGS-B", jac=True, options=limits)
    weights, intercepts = _parts(torch.from_numpy(found.x).to(rows), classes, dim)
    return Logistic(cost, weights, intercepts, found.nit < ITERATIONS)


def _joined(weights: Tensor, intercepts: Tensor) -> NDArray[np.float64]:
    flat: NDArray[np.float64] = torch.cat([weights.flatten(), intercepts]).cpu().numpy()
    return flat


def _parts(flat: Tensor, classes: int, dim: int) -> tuple[Tensor, Tensor]:
    return flat[: classes * dim].view(classes, dim), flat[classes * dim :]
