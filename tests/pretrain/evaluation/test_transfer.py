"""Transfer: metrics against scikit-learn and by hand; C is chosen on validation images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, precision_recall_curve

from tests.pretrain.evaluation.tasks_at_work import photos_run, suite_on
from tests.pretrain.tiny import save_photos
from vmf_pretrain.evaluation.class_metrics import ap11, mean_ap11, mean_per_class
from vmf_pretrain.evaluation.logistic import inverse_costs
from vmf_pretrain.evaluation.tasks.transfer import Transfer

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("levels", [4, 1000])
def test_11_point_ap_is_read_off_scikit_learn_s_curve(levels: int) -> None:
    numbers = np.random.default_rng(levels)
    for _ in range(20):
        positive = numbers.random(40) < 0.3
        positive[0] = True
        scores = numbers.integers(levels, size=40) / levels + positive * numbers.random()  # with ties
        precision, recall, _ = precision_recall_curve(positive, scores)
        expected = np.mean([precision[:-1][recall[:-1] >= least - 1e-12].max() for least in np.linspace(0, 1, 11)])
        assert ap11(scores, positive) == pytest.approx(expected, abs=1e-12)


def test_11_point_ap_by_hand() -> None:
    # hits at ranks 1 and 4: precision 1 up to recall 0.5 (6 points), then 2/4 (5 points)
    assert ap11(np.array([4.0, 3.0, 2.0, 1.0]), np.array([True, False, False, True])) == pytest.approx(
        (6 + 5 * 0.5) / 11
    )


def test_mean_per_class_equals_scikit_learn_s_and_unknown_classes_are_wrong() -> None:
    numbers = np.random.default_rng(0)
    scores, labels = numbers.random((60, 4)), numbers.choice(4, 60, p=[0.7, 0.1, 0.1, 0.1])
    expected = balanced_accuracy_score(labels, scores.argmax(axis=1))
    assert mean_per_class(scores, labels) == pytest.approx(expected)
    assert mean_per_class(np.eye(2), np.array([0, -1])) == 0.5
    assert mean_ap11(np.eye(2), np.array([0, -1])) == 0.5


@pytest.mark.parametrize("parts", [("train", "val", "test"), ("train", "test")])
def test_task_reports_the_test_images_whatever_c_is_chosen_on(parts: tuple[str, ...], tmp_path: Path) -> None:
    sizes = {"train": 6, "val": 4, "test": 3}
    for part in parts:
        for name in ("cats", "dogs"):
            save_photos(tmp_path / "photos" / part / name, sizes[part])
    save_photos(tmp_path / "photos" / "test" / "emus", 1)
    data = tmp_path / "photos"
    wanted = {"transfer": {"metric": "mean_per_class", "costs": 3}}
    suite, _, _ = suite_on(photos_run(data, tmp_path / "run"), data, tmp_path / "out", wanted)
    result = suite.run([Transfer()])["transfer"]
    assert result.facts["test_images"] == 7
    assert result.facts["classes"] == 2
    assert [cost for cost, _ in result.facts["validation"]] == inverse_costs(3)
    chosen = 8 if "val" in parts else round(0.2 * 12)
    assert f"{chosen} validation images" in result.notes[0]
    assert result.figures[0].value <= 100 * 2 / 3, "emus cannot be right"
