"""Retrieval scores against the area under scikit-learn's precision-recall curve, with junk, ties and empty queries."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.metrics import auc, average_precision_score, precision_recall_curve
from torch.nn import functional

from vmf_pretrain.evaluation.average_precision import trapezoid_average_precision
from vmf_pretrain.evaluation.pooling import class_and_patches, mean_of_sizes
from vmf_pretrain.evaluation.retrieval import score
from vmf_pretrain.evaluation.retrieval.ground_truth import GroundTruth, Query, ground_truth_of_classes
from vmf_pretrain.evaluation.retrieval.levels import LEVELS
from vmf_pretrain.evaluation.retrieval.score import CUT_OFFS, precision_among, retrieval_scores
from vmf_pretrain.evaluation.whitening import whitening_of
from vmf_pretrain.evaluation.whole_views import Thumbnail

pytestmark = pytest.mark.quick

IMAGES, QUERIES, DIM = 90, 25, 12
KEPT_AND_REMOVED = {"easy": ("e", "jh"), "medium": ("eh", "j"), "hard": ("h", "je")}


def random_truth(generator: np.random.Generator) -> GroundTruth:
    queries = []
    for number in range(QUERIES):
        grades = generator.choice(list("ehj...."), IMAGES)
        places = [tuple(int(place) for place in np.flatnonzero(grades == grade)) for grade in "ehj"]
        queries.append(Query(f"q{number}", None, *places))
    queries[0] = Query("q0", None, (), (3,), (5,))  # nothing is easy
    return GroundTruth(tuple(f"d{number}" for number in range(IMAGES)), tuple(queries))


def oracle(similarity: NDArray[np.float64], query: Query, level: str) -> tuple[float, list[float]]:
    """The ranking as a list of grades, its junk deleted; then scikit-learn's curve, and a count by hand."""
    grade_of = {
        place: letter
        for letter, name in zip("ehj", ("easy", "hard", "junk"), strict=True)
        for place in getattr(query, name)
    }
    kept, removed = KEPT_AND_REMOVED[level]
    ranking = [grade_of.get(int(place), ".") for place in np.argsort(-similarity, kind="stable")]
    hits = [letter in kept for letter in ranking if letter not in removed]
    if not any(hits):
        return float("nan"), [float("nan")] * len(CUT_OFFS)
    precision, recall, _ = precision_recall_curve(hits, -np.arange(len(hits)))
    last = max(place for place, hit in enumerate(hits) if hit) + 1
    return float(auc(recall, precision)), [sum(hits[: min(k, last)]) / min(k, last) for k in CUT_OFFS]


@pytest.mark.parametrize("ties", [False, True])
def test_scores_equal_the_area_under_the_curve_without_junk(ties: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score, "SIMILARITIES_AT_ONCE", 7 * IMAGES)  # several blocks of queries, the last one short
    generator = np.random.default_rng(0)
    truth = random_truth(generator)
    database, queries = (torch.from_numpy(generator.normal(size=(n, DIM))).float() for n in (IMAGES, QUERIES))
    if ties:
        database = database[torch.arange(IMAGES) // 3]
    unit = [functional.normalize(features, dim=1) for features in (queries, database)]
    similarity = (unit[0] @ unit[1].T).numpy()
    if ties:  # equal images have the same number whatever the order of summation
        similarity = similarity[:, np.arange(IMAGES) // 3 * 3]
    for found in retrieval_scores(queries, database, truth):
        expected = [oracle(similarity[row], query, found.level) for row, query in enumerate(truth.queries)]
        np.testing.assert_allclose(found.average_precision, [area for area, _ in expected], atol=1e-12)
        np.testing.assert_allclose(found.precision, [precision for _, precision in expected], atol=1e-12)
        mean = np.nanmean([area for area, _ in expected])
        assert found.means()["map"] == pytest.approx(100 * mean, abs=1e-9), "empty queries do not enter the mean"
    assert np.isnan(retrieval_scores(queries, database, truth, LEVELS[:1])[0].average_precision[0])


def test_rectangles_of_information_retrieval_are_another_number() -> None:
    """The test above would not see the wrong rule if both agreed."""
    hits = np.array([0, 1, 0, 0, 1, 1, 0])
    ours = trapezoid_average_precision(np.flatnonzero(hits), 3)
    assert abs(ours - float(average_precision_score(hits, -np.arange(7)))) > 0.05


@pytest.mark.parametrize(
    ("ranks", "positives", "expected"),
    [([0, 1], 2, 1.0), ([0], 2, 0.5), ([1], 1, 0.25), ([], 3, 0.0), ([], 0, float("nan"))],
)
def test_average_precision_of_short_rankings(ranks: list[int], positives: int, expected: float) -> None:
    assert trapezoid_average_precision(ranks, positives) == pytest.approx(expected, nan_ok=True)


def test_precision_ends_at_the_last_positive() -> None:
    found = [precision_among(np.array([0, 2]), first) for first in CUT_OFFS]
    assert found == [1, 2 / 3, 2 / 3], "of the first three, not of the first five or ten"


def test_more_ranks_than_positives_are_refused() -> None:
    with pytest.raises(ValueError, match="2 ranks of 1 positives"):
        trapezoid_average_precision([0, 3], 1)


def test_images_of_a_class_answer_each_other_and_no_image_itself() -> None:
    """Each image is its own nearest neighbour; without junk the average precision of these would be 0.75 and 0.25."""
    features = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
    (found,) = retrieval_scores(features, features, ground_truth_of_classes(["a", "b", "c"], [0, 0, 1]), LEVELS[:1])
    np.testing.assert_array_equal(found.average_precision, [1.0, 1.0, np.nan])


def test_features_of_sizes_are_averaged_as_they_are() -> None:
    long, short = torch.tensor([[6.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    torch.testing.assert_close(mean_of_sizes([long, short]), functional.normalize(torch.tensor([[3.0, 1.0]])))


def test_thumbnails_keep_their_shape_and_whole_patches() -> None:
    image = torch.randint(0, 256, (3, 120, 90), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    shapes = [tuple(Thumbnail(size, scale)(image).shape[1:]) for size, scale in ((512, 1), (60, 1), (512, 0.5), (8, 1))]
    assert shapes == [(112, 80), (48, 32), (48, 32), (16, 16)]
    half = functional.interpolate(image[None].float() / 255, scale_factor=0.5, mode="bilinear")[0]
    torch.testing.assert_close(Thumbnail(512, 0.5)(image), half[:, :48, :32])


def test_generalised_mean_drops_what_is_negative() -> None:
    patches = torch.tensor([[[1.0, -5.0], [3.0, -1.0]]])
    found = class_and_patches(torch.tensor([[7.0, 8.0]]), patches)
    torch.testing.assert_close(found, torch.tensor([[7.0, 8.0, ((1 + 81) / 2) ** 0.25, 1e-6]]))


def test_whitening_is_the_published_one() -> None:
    """Second moment about zero, eigenvalues at least 1e-5 of the largest; against a singular value decomposition."""
    generator = np.random.default_rng(0)
    other = generator.normal(size=(50, 6)) * [5, 3, 1, 1, 1, 1e-4] + 2
    values = generator.normal(size=(4, 6))
    _, singular, axes = np.linalg.svd(other, full_matrices=False)
    scale = np.sqrt(np.maximum(singular**2, 1e-5 * singular[0] ** 2) / 50)
    expected = (values - other.mean(axis=0)) @ axes.T / scale
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    found = whitening_of(torch.from_numpy(other)).apply(torch.from_numpy(values)).numpy()
    signs = np.sign((found * expected).sum(axis=0))  # of each axis, which no decomposition fixes
    np.testing.assert_allclose(found * signs, expected, atol=1e-6)
    assert whitening_of(torch.from_numpy(other), dims=2).apply(torch.from_numpy(values)).shape == (4, 2)
