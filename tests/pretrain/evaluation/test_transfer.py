"""Transfer: metrics against scikit-learn and by hand; C is chosen on validation images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, precision_recall_curve

from tests.pretrain.evaluation.tasks_at_work import photos_run, suite_on
from tests.pretrain.tiny import save_photos
from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.evaluation.class_metrics import ap11, mean_ap11, mean_per_class
from vmf_pretrain.evaluation.logistic import inverse_costs
from vmf_pretrain.evaluation.multi_label import margins
from vmf_pretrain.evaluation.tasks.transfer import Transfer
from vmf_pretrain.storage.tensor_file import read_tensors

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


VOC_CLASSES, VOC_SPLITS = ("boat", "cat", "dog"), {"train": 14, "val": 8, "test": 12}


def voc_folder(folder: Path) -> dict[str, np.ndarray]:
    """A folder as VOC2007, and its labels [N, C] by split: an image may have several classes, and be difficult in one."""
    numbers = np.random.default_rng(5)
    paths = save_photos(folder / "JPEGImages", sum(VOC_SPLITS.values()))
    (folder / "ImageSets/Main").mkdir(parents=True)
    order, labels = numbers.permutation(len(paths)), {}
    for split, count in VOC_SPLITS.items():
        places, order = order[:count], order[count:]
        labels[split] = numbers.choice([-1, 0, 1], (count, 3), p=[0.5, 0.2, 0.3])
        for place, name in enumerate(VOC_CLASSES):
            lines = [f"{paths[n].stem} {label:2d}" for n, label in zip(places, labels[split][:, place], strict=True)]
            (folder / f"ImageSets/Main/{name}_{split}.txt").write_text("\n".join(lines) + "\n")
        (folder / f"ImageSets/Main/{split}.txt").write_text("no list of a class\n")
    return labels


def test_images_of_several_classes_are_scored_as_voc_2007(tmp_path: Path) -> None:
    """Against scikit-learn's regressions and curve on the stored features; difficult images are in neither."""
    labels = voc_folder(tmp_path / "VOC2007")
    wanted = {"transfer": {"metric": "ap11", "costs": 4}}
    run = photos_run(tmp_path / "VOC2007", tmp_path / "run")
    suite, said, _ = suite_on(run, tmp_path / "VOC2007", tmp_path / "out", wanted)
    result = suite.run([Transfer()])["transfer"]
    assert not said
    stored = [
        read_tensors(path)[0]["class"][:, -1] for path in (tmp_path / "out/features").glob("*/000000.safetensors")
    ]
    rows = {name: next(some for some in stored if len(some) == count) for name, count in VOC_SPLITS.items()}

    def precision_of(train: torch.Tensor, known: np.ndarray, name: str, cost: float, difficult: int) -> float:
        found = []
        for place in range(3):
            kept, counted = known[:, place] != difficult, labels[name][:, place] != difficult
            # scikit-learn has one row of weights for two classes, and half our penalty
            oracle = LogisticRegression(C=2 * cost, solver="newton-cholesky", tol=1e-12)
            oracle.fit(train[kept].double(), known[kept, place] == 1)
            scores, positive = oracle.decision_function(rows[name].double())[counted], labels[name][counted, place] == 1
            precision, recall, _ = precision_recall_curve(positive, scores)
            found.append(np.mean([precision[:-1][recall[:-1] >= r - 1e-12].max() for r in np.linspace(0, 1, 11)]))
        return 100 * float(np.mean(found))

    for cost, value in result.facts["validation"]:
        assert value == pytest.approx(precision_of(rows["train"], labels["train"], "val", cost, 0), abs=1e-6), cost
    both, known = torch.cat([rows["train"], rows["val"]]), np.concatenate([labels["train"], labels["val"]])
    cost, value = result.facts["C"], result.figures[0].value
    assert value == pytest.approx(precision_of(both, known, "test", cost, 0), abs=1e-6)
    assert abs(value - precision_of(both, known, "test", cost, 9)) > 0.1, "difficult images would count as negatives"
    assert set(result.facts["ap11"]) == set(VOC_CLASSES)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("cat_val.txt", "photo_00 2\n", "line 1, is 'photo_00 2'"),
        ("cat_val.txt", "photo_00 1\n", "lists other images than"),
        ("emu_test.txt", None, "of other classes than those of train"),
        ("JPEGImages", None, "the first is photo_"),
        ("accuracy", None, "set transfer.metric to ap11"),
    ],
)
def test_lists_that_cannot_be_used_are_said(name: str, text: str | None, said: str, tmp_path: Path) -> None:
    folder, lists = tmp_path / "voc", tmp_path / "voc/ImageSets/Main"
    voc_folder(folder)
    run = photos_run(folder, tmp_path / "run")
    if text is not None:
        (lists / name).write_text(text)
    elif name == "emu_test.txt":
        (lists / name).write_text((lists / "cat_test.txt").read_text())
    elif name == "JPEGImages":
        for path in sorted((folder / name).iterdir())[1:]:
            path.unlink()
    metric = "accuracy" if name == "accuracy" else "ap11"
    suite, spoken, _ = suite_on(run, folder, tmp_path / "out", {"transfer": {"metric": metric, "costs": 2}})
    assert not suite.run([Transfer()])
    assert said in spoken[0]


def test_a_class_without_training_images_is_named() -> None:
    labels = np.array([[1, -1], [-1, -1], [1, 0]], np.int8)
    with pytest.raises(PretrainError, match="none of class dog"):
        margins(torch.randn(3, 2), labels, ["cat", "dog"], [1.0], torch.zeros(1, 2))
