"""Segmentation scores against scikit-learn, with classes that are absent; labels of patches; both classifiers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix, jaccard_score
from sklearn.neighbors import KNeighborsClassifier
from torch.nn import functional

from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.evaluation.bootstrap import interval
from vmf_pretrain.evaluation.dense import patches
from vmf_pretrain.evaluation.dense.classify import linear_patches, nearest_patches
from vmf_pretrain.evaluation.dense.confusion import areas_of, confusion, scores_of
from vmf_pretrain.evaluation.dense.patches import patch_labels, pixel_labels
from vmf_pretrain.evaluation.tasks import dense

pytestmark = pytest.mark.quick

CLASSES, VOID = 5, 255


def test_scores_equal_those_of_scikit_learn() -> None:
    """Class 3 is in no reference but predicted, so it has 0; class 4 is in neither, so it does not count."""
    generator = np.random.default_rng(0)
    reference, predicted = generator.integers(0, 3, (2, 30, 40)).astype(np.uint8)
    predicted[:4, :4] = 3
    reference[20:, 5:] = VOID
    counts = confusion(reference, predicted, CLASSES, VOID)
    kept = reference != VOID
    expected = confusion_matrix(reference[kept], predicted[kept], labels=range(CLASSES))
    np.testing.assert_array_equal(counts, expected)
    scores = scores_of(areas_of(counts))
    areas = jaccard_score(reference[kept], predicted[kept], labels=range(4), average=None, zero_division=0)
    np.testing.assert_allclose(scores.union, [*areas, np.nan], atol=1e-12)
    assert scores.union[3] == 0
    assert scores.mean == pytest.approx(float(np.mean(areas)), abs=1e-12)
    assert scores.accuracy == pytest.approx(float((reference == predicted)[kept].mean()), abs=1e-12)


def test_without_pixels_there_is_no_score() -> None:
    void = np.full((2, 2), VOID, np.uint8)
    scores = scores_of(areas_of(confusion(void, np.zeros((2, 2), np.uint8), CLASSES, VOID)))
    assert np.isnan(scores.mean)
    assert np.isnan(scores.accuracy)


def test_a_class_beyond_the_last_is_refused() -> None:
    with pytest.raises(ValueError, match="the number 255; expected less than 5"):
        confusion(np.full((2, 2), VOID, np.uint8), np.zeros((2, 2), np.uint8), CLASSES, None)


def test_patches_have_their_most_frequent_class() -> None:
    labels = np.array([[1, 1, 2, 9, 0], [2, 9, 9, 1, 0], [9, 9, 9, 0, 0], [9, 9, 9, 3, 0]], np.uint8)
    found = patch_labels(labels, (2, 2), CLASSES, 9)
    assert found.tolist() == [[1, 0], [-1, 0]], "columns 0 to 2 and 3 to 4; the smaller of 1 and 2 and, below, none"


def test_scores_of_patches_become_labels_of_pixels() -> None:
    scores = torch.zeros(2, 2, CLASSES)
    scores[:, 0, 2], scores[:, 1, 4] = 1.0, 1.0
    assert pixel_labels(scores, (4, 6)).tolist() == [[2, 2, 2, 4, 4, 4]] * 4


@pytest.mark.parametrize("at_once", [1, 3 * 10 * 14, 2**24])
def test_classes_enlarged_some_at_a_time_are_those_of_all_together(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patches, "VALUES_AT_ONCE", at_once)
    scores = torch.rand(4, 5, 200, generator=torch.Generator().manual_seed(0)).mul(50).round()  # with ties
    large = functional.interpolate(scores.permute(2, 0, 1)[None], size=(10, 14), mode="bilinear", align_corners=False)
    np.testing.assert_array_equal(pixel_labels(scores, (10, 14)), large[0].argmax(dim=0).numpy())


def test_interval_is_over_confusion_matrices_of_drawn_images() -> None:
    generator = np.random.default_rng(1)
    counts = generator.integers(0, 50, (7, CLASSES, CLASSES))
    figure, _ = dense._figures("k 1", np.stack([areas_of(one) for one in counts]))
    low, high = interval(lambda drawn: 100 * scores_of(areas_of(counts[drawn].sum(axis=0))).mean, 7)
    assert (figure.low, figure.high) == pytest.approx((low, high), abs=1e-12)
    assert low < figure.value < high


def clusters(seed: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(3, 8, generator=torch.Generator().manual_seed(9))
    labels = torch.tensor([0, 1, 3])[torch.arange(rows) % 3]
    return centres[torch.arange(rows) % 3] + torch.randn(rows, 8, generator=generator), labels


def test_nearest_patches_vote_as_scikit_learns_classifier() -> None:
    (train, labels), (test, _) = clusters(0, 60), clusters(1, 25)
    oracle = KNeighborsClassifier(9, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.07))
    expected = oracle.fit(train.numpy(), labels.numpy()).predict_proba(test.numpy())
    found = nearest_patches(train, labels, CLASSES, neighbours=9, temperature=0.07)(test)
    np.testing.assert_allclose(found[:, [0, 1, 3]].numpy(), expected, atol=1e-5)
    assert not found[:, [2, 4]].any()
    alone = nearest_patches(train[:2], labels[:2], CLASSES, neighbours=9, temperature=0.07)(test)
    torch.testing.assert_close(alone.sum(dim=1), torch.ones(25))


def test_linear_patches_tell_classes_apart_and_never_name_an_unseen_one() -> None:
    (train, labels), (test, expected) = clusters(0, 300), clusters(1, 90)
    found = linear_patches(train, labels, CLASSES, inverse_penalty=1.0, iterations=200)(test)
    assert (found.argmax(dim=1) == expected).float().mean() > 0.85
    assert not found[:, [2, 4]].any()
    with pytest.raises(PretrainError, match="at least 2 classes"):
        linear_patches(train, labels * 0, CLASSES, inverse_penalty=1.0, iterations=200)
