"""Neighbours and their votes, against scikit-learn and against the full matrix."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import binom
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor
from torch.nn.functional import normalize

from vmf_pretrain.evaluation import knn, nearest
from vmf_pretrain.evaluation.bootstrap import interval, mean_interval
from vmf_pretrain.evaluation.knn import voted
from vmf_pretrain.evaluation.splits import drawn_per_class

pytestmark = pytest.mark.quick

TEMPERATURE = 0.07


def features_of(rows: int, classes: int, seed: int, dim: int = 24) -> tuple[Tensor, Tensor]:
    """[rows, dim] features of any norm around a direction of each class, and labels."""
    numbers = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(7))
    labels = torch.randint(classes, (rows,), generator=numbers)
    noise = 2.0 * torch.randn(rows, dim, generator=numbers)
    return (centres[labels] + noise) * (0.1 + torch.rand(rows, 1, generator=numbers)), labels


@pytest.mark.parametrize("count", [1, 10, 200, 700])
@pytest.mark.parametrize(("rows", "columns", "chunk"), [(512, 8192, 256), (5, 90, 37), (64, 400, 1000)])
def test_neighbours_are_those_of_the_full_matrix(
    count: int, rows: int, columns: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nearest, "ROWS_AT_ONCE", rows)
    monkeypatch.setattr(nearest, "COLUMNS_AT_ONCE", columns)
    sought, among = features_of(60, 5, seed=1)[0], features_of(611, 5, seed=2)[0]
    values, places = nearest.nearest(sought, among.split(chunk), count)
    full = normalize(sought) @ normalize(among).T
    expected = full.topk(min(count, 611))
    assert torch.allclose(values, expected.values, atol=1e-6)
    assert torch.allclose(full.gather(1, places), values, atol=1e-6), "a place is not that of its cosine"
    assert all(len(set(row)) == len(row) for row in places.tolist()), "a neighbour occurs twice"


def weights(distances: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.exp((1 - distances) / TEMPERATURE)


@pytest.mark.parametrize(
    ("train_rows", "classes", "count"), [(500, 10, 10), (500, 10, 20), (500, 10, 100), (30, 3, 200), (40, 1, 10)]
)
def test_predictions_equal_scikit_learn_s(train_rows: int, classes: int, count: int) -> None:
    (train, labels), (test, own) = features_of(train_rows, classes, seed=3), features_of(200, classes, seed=4)
    cosines, places = nearest.nearest(test.double(), [train], count)
    found = voted(cosines, labels[places], own, counts=[count], temperature=TEMPERATURE)[count]
    k = min(count, train_rows)
    oracle = KNeighborsClassifier(k, weights=weights, algorithm="brute", metric="cosine").fit(train.double(), labels)
    assert np.array_equal(oracle.predict(test.double()), found.predicted.numpy())
    shares = torch.from_numpy(oracle.predict_proba(test.double()))
    mine = shares.gather(1, own[:, None])
    top = ((shares > mine).sum(dim=1) < 5) & (mine[:, 0] > 0)
    assert torch.equal(found.correct(5).bool(), top), "top-5 differs"
    assert classes == 1 or 0 < float(found.correct().mean()) < 1, "the case tells nothing apart"


def test_several_k_at_once_are_each_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knn, "VOTES_AT_ONCE", 70)
    (train, labels), (test, own) = features_of(300, 6, seed=5), features_of(83, 6, seed=6)
    cosines, places = nearest.nearest(test, [train], 50)
    together = voted(cosines, labels[places], own, counts=[50, 5, 20], temperature=TEMPERATURE)
    for count in (5, 20, 50):
        alone = voted(cosines[:, :count], labels[places[:, :count]], own, counts=[count], temperature=TEMPERATURE)
        assert torch.equal(together[count].predicted, alone[count].predicted)
        assert torch.equal(together[count].rank, alone[count].rank)


def test_ties_go_to_the_smaller_class_and_a_class_without_votes_is_never_right() -> None:
    cosines, neighbours = torch.tensor([[0.5, 0.5]] * 4), torch.tensor([[3, 1]] * 4)
    found = voted(cosines, neighbours, torch.tensor([1, 3, 0, 7]), counts=[2], temperature=TEMPERATURE)[2]
    assert found.predicted.tolist() == [1, 1, 1, 1]
    assert found.correct(1).tolist() == [1, 0, 0, 0]
    assert found.correct(5).tolist() == [1, 1, 0, 0]


def test_nothing_to_compare_with_is_an_error() -> None:
    with pytest.raises(ValueError, match="no row"):
        nearest.nearest(torch.zeros(1, 2), [], 1)


def test_few_images_of_each_class_are_drawn_without_replacement() -> None:
    labels = torch.tensor([0] * 5 + [1] * 2 + [4] * 30)
    chosen = drawn_per_class(labels, lambda size: 3, seed=0)
    assert torch.bincount(labels[chosen], minlength=5).tolist() == [3, 2, 0, 0, 3]
    assert len(set(chosen.tolist())) == len(chosen)
    assert not torch.equal(chosen, drawn_per_class(labels, lambda size: 3, seed=1))


def test_interval_of_right_and_wrong_is_that_of_the_binomial() -> None:
    right = np.r_[np.ones(160), np.zeros(40)]
    expected = binom.ppf([0.025, 0.975], 200, 0.8) / 200
    assert np.allclose(mean_interval(right), expected, atol=0.011)
    assert np.allclose(interval(lambda places: float(right[places].mean()), 200), expected, atol=0.011)
    assert mean_interval([3.0]) == (3.0, 3.0)
