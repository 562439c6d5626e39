"""Few labelled images: against scikit-learn, by hand, and where there are too few."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import NearestCentroid
from torch.nn.functional import normalize

from tests.pretrain.evaluation.tasks_at_work import photos_run, suite_on
from tests.pretrain.tiny import some_digits, two_classes
from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.config.tasks.few_shot import FewShotTask
from vmf_pretrain.evaluation.episodes import Shape, eligible, episode_accuracies
from vmf_pretrain.evaluation.stored import features_in, write_chunk
from vmf_pretrain.evaluation.tasks.few_shot import FewShot, _draws

pytestmark = pytest.mark.quick


def test_episode_equals_scikit_learn_s_nearest_centroid() -> None:
    numbers = torch.Generator().manual_seed(3)
    labels = torch.tensor([4] * 20 + [6] * 20 + [9] * 3)  # of 9 there are too few, so every episode is of 4 and 6
    rows = torch.randn(43, 5, generator=numbers) + 0.4 * (labels == 6)[:, None]
    shape = Shape(ways=2, shots=3, queries=17)
    found = episode_accuracies(rows, labels, shape, 4)
    draws, expected = torch.Generator().manual_seed(0), []
    for _ in range(4):
        chosen = {}
        for way in torch.randperm(2, generator=draws).tolist():
            chosen[(4, 6)[way]] = torch.randperm(20, generator=draws) + 20 * way
        support = torch.cat([places[:3] for places in chosen.values()])
        query = torch.cat([places[3:] for places in chosen.values()])
        oracle = NearestCentroid().fit(rows[support], labels[support])
        expected.append(oracle.score(rows[query], labels[query]))
    assert found.tolist() == pytest.approx(expected)
    assert 0.5 < float(found.mean()) < 1, "the case tells nothing apart"


def test_episode_needs_enough_rows_of_enough_classes() -> None:
    labels = torch.tensor([0] * 3 + [1] * 2)
    assert eligible(labels, Shape(2, 1, 2)).tolist() == [0]
    with pytest.raises(ValueError, match="1 classes have enough rows"):
        episode_accuracies(torch.zeros(5, 2), labels, Shape(2, 1, 2), 1)


@pytest.mark.parametrize("classifier", ["msn", "ibot"])
def test_task_reports_each_count_with_its_spread(classifier: str, tmp_path: Path) -> None:
    data = two_classes(tmp_path / "photos" / "train", 6).parent
    two_classes(data / "val", 4)
    wanted = {"classifier": classifier, "per_class": [1, 9], "shares": [0.5], "ways": 2, "shots": 2, "queries": 2}
    suite, _, _ = suite_on(photos_run(data, tmp_path / "run"), data, tmp_path / "out", {"few_shot": wanted})
    result = suite.run([FewShot()])["few_shot"]
    named = {figure.name: figure for figure in result.figures}
    assert list(named) == ["top-1, 1 a class", "top-1, 9 a class", "top-1, 50 % of each class", "2 ways, 2 shots"]
    assert named["top-1, 9 a class"].spread == 0, "a draw of more images than there are is all of them"
    assert all(0 <= figure.value <= 100 for figure in result.figures)


@pytest.mark.parametrize("classifier", ["msn", "ibot"])
def test_regression_on_few_equals_scikit_learn_s(classifier: str, tmp_path: Path) -> None:
    """Each image's feature less its own mean, at unit length, without intercepts; lambda is 1 / C."""
    numbers, images = torch.Generator().manual_seed(5), some_digits(80)
    assert images.labels is not None
    rows = {"train": torch.randn(80, 6, generator=numbers) + 2, "test": torch.randn(80, 6, generator=numbers) + 2}
    found = {}
    for split, values in rows.items():
        (tmp_path / split).mkdir()
        kept = {"class": list(values[:, None]), "unnormed": list(values)}
        write_chunk(tmp_path / split, 0, torch.arange(80), kept, {})
        found[split] = features_in(tmp_path / split, images)
    settings = FewShotTask(classifier=classifier, penalty=0.2)  # type: ignore[arg-type]
    chosen = torch.arange(0, 80, 2)
    (draw,) = _draws(found["train"], found["test"], {"half": [chosen]}, settings, torch.device("cpu"))["half"]
    read = {split: normalize(less_mean(values) if classifier == "msn" else values) for split, values in rows.items()}

    def oracle(cost: float, read: dict[str, torch.Tensor]) -> list[int]:
        fitted = LogisticRegression(C=cost, fit_intercept=False, solver="newton-cholesky", tol=1e-12)
        labels: list[int] = fitted.fit(read["train"][chosen], images.labels[chosen]).predict(read["test"]).tolist()
        return labels

    assert draw.label.tolist() == oracle(1 / 0.2, read)
    assert draw.label.tolist() != oracle(0.2, read), "the case does not tell lambda from C"


def less_mean(rows: torch.Tensor) -> torch.Tensor:
    return rows - rows.mean(dim=1, keepdim=True)


def test_lists_of_one_name_are_draws_of_the_images_that_they_name(tmp_path: Path) -> None:
    """All training images in one list, by path or by file name, are those of a draw of all; a damaged one is left out."""
    data = two_classes(tmp_path / "photos" / "train", 6).parent
    two_classes(data / "val", 4)
    (data / "train/cats/only_here.png").write_bytes(b"no image")
    named = sorted(str(path.relative_to(data / "train")) for path in (data / "train").rglob("photo_*.png"))
    for number, names in enumerate([[*named, "only_here.png"], named[::2]]):
        (tmp_path / f"subsets{number}").mkdir()
        (tmp_path / f"subsets{number}" / "1percent.txt").write_text("\n".join(names) + "\n\n")
    lists = [str(path) for path in sorted(tmp_path.glob("subsets*/1percent.txt"))]
    few = {"per_class": [9], "shares": [], "episodes": 0}
    run = photos_run(data, tmp_path / "run")
    figures = {}
    for chosen in (lists[:1], lists):
        suite, _, _ = suite_on(run, data, tmp_path / "out", {"few_shot": {**few, "lists": chosen}})
        result = suite.run([FewShot()])["few_shot"]
        figures[len(chosen)] = {figure.name: figure for figure in result.figures}
        assert f"list 1percent.txt: {', '.join(['12', '6'][: len(chosen)])} images." in result.notes
    assert figures[1]["top-1, list 1percent.txt"].value == figures[1]["top-1, 9 a class"].value
    assert figures[2]["top-1, list 1percent.txt"].spread is not None
    for wrong, said in (("photo_00.png", "which 2 training images are called"), ("emu.png", "the first is emu.png")):
        Path(lists[0]).write_text(f"{wrong}\n")
        suite, spoken, _ = suite_on(run, data, tmp_path / "out", {"few_shot": {**few, "lists": lists}})
        assert not suite.run([FewShot()])
        assert said in spoken[0]


def test_too_few_images_for_an_episode_are_said(tmp_path: Path) -> None:
    data = two_classes(tmp_path / "photos")
    suite, _, _ = suite_on(photos_run(data, tmp_path / "run"), data, tmp_path / "out", {"few_shot": {"per_class": [1]}})
    result = suite.run([FewShot()])["few_shot"]
    assert "No episodes" in result.notes[1]
    assert not [figure for figure in result.figures if "ways" in figure.name]
    with pytest.raises(PretrainError, match="below 1"):
        FewShotTask(shares=(1.5,))
