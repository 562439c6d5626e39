"""Linear probes: against scikit-learn and torch's own optimiser; what is chosen is chosen elsewhere."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from tests.pretrain.evaluation.tasks_at_work import photos_run, suite_on
from tests.pretrain.tiny import some_digits, two_classes
from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.evaluation.heads import SCALED_TO, Schedule, trained
from vmf_pretrain.evaluation.logistic import costs, inverse_costs, regressions
from vmf_pretrain.evaluation.scores import Known, predicted
from vmf_pretrain.evaluation.splits import held_out_per_class
from vmf_pretrain.evaluation.stored import features_in, write_chunk
from vmf_pretrain.evaluation.tasks.linear import Linear, _inputs
from vmf_pretrain.evaluation.views import RandomSquare

pytestmark = pytest.mark.quick


def features_of(rows: int, classes: int, seed: int, dim: int = 12) -> tuple[Tensor, Tensor]:
    """[rows, dim] float64 features around a direction of each class, and labels; every class occurs."""
    numbers = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(7))
    labels = torch.arange(rows) % classes
    return (centres[labels] + 1.5 * torch.randn(rows, dim, generator=numbers)).double(), labels


@pytest.mark.parametrize(("classes", "intercept"), [(2, True), (5, True), (5, False)])
def test_regression_equals_scikit_learn_s(classes: int, intercept: bool) -> None:
    rows, labels = features_of(120, classes, seed=1)
    found = list(regressions(rows, labels, classes, [0.01, 1.0, 30.0], intercept=intercept))
    for one in found:
        # of two classes scikit-learn has one row of weights, the difference of ours: twice our penalty
        cost = one.cost * (2 if classes == 2 else 1)
        oracle = LogisticRegression(C=cost, fit_intercept=intercept, solver="newton-cholesky", tol=1e-12)
        expected = torch.from_numpy(oracle.fit(rows, labels).predict_proba(rows))
        away = float((one.scores(rows).softmax(dim=1) - expected).abs().max())
        assert one.settled
        assert away < 3e-6, f"C {one.cost}: probabilities differ by {away:.1e}"


def test_costs_are_the_published_ones() -> None:
    assert costs(45)[::44] == [1e-6, 1e5]
    assert inverse_costs(45)[::44] == pytest.approx([1e-5, 1e6]), "Ericsson et al. space 1 / C evenly from 1e-6 to 1e5"
    assert math.isclose(costs(45)[1] / costs(45)[0], 10 ** (11 / 44))


@pytest.mark.parametrize("views", [1, 2])
def test_heads_equal_torch_s_optimiser(views: int) -> None:
    labels = features_of(50, 4, seed=2)[1]
    shown = [{"a": (rows := features_of(50, 4, seed=2 + view)[0]), "b": rows[:, :7]} for view in range(views)]
    schedule = Schedule([0.1, 3.0], iterations=23, batch_size=16)
    heads = trained(shown, labels, 4, schedule)
    numbers = torch.Generator().manual_seed(0)
    starts = {kind: 0.01 * torch.randn(4, rows.shape[1], generator=numbers) for kind, rows in shown[0].items()}
    batches, order = [], torch.empty(0, dtype=torch.int64)
    for _ in range(schedule.iterations):
        if len(order) < 16:
            order = torch.cat([order, torch.randperm(50, generator=numbers)])
        batches.append((order[:16], int(torch.randint(views, (1,), generator=numbers))))
        order = order[16:]
    for kind, start in starts.items():
        for place, rate in enumerate(schedule.rates):
            alone = torch.nn.Linear(start.shape[1], 4, dtype=torch.float64)
            alone.weight.data, alone.bias.data = start.double(), torch.zeros(4, dtype=torch.float64)
            optimiser = torch.optim.SGD(alone.parameters(), lr=rate * 16 / SCALED_TO, momentum=0.9)
            falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, schedule.iterations)
            for chosen, view in batches:
                optimiser.zero_grad()
                torch.nn.functional.cross_entropy(alone(shown[view][kind][chosen]), labels[chosen]).backward()
                optimiser.step()
                falling.step()
            assert torch.allclose(heads[kind].weights[place], alone.weight, atol=1e-10), f"{kind}, rate {rate}"
            assert torch.allclose(heads[kind].biases[place], alone.bias, atol=1e-10)


def test_rows_of_a_part_are_trained_on_in_their_place() -> None:
    rows, labels = features_of(60, 3, seed=4)
    kept, schedule = torch.arange(60)[torch.arange(60) % 3 != 1], Schedule([0.5], iterations=9, batch_size=16)
    copied = trained([{"a": rows[kept]}], labels[kept], 3, schedule)["a"]
    assert torch.equal(trained([{"a": rows}], labels, 3, schedule, places=kept)["a"].weights, copied.weights)


def test_all_kinds_of_features_are_parts_of_one_matrix(tmp_path: Path) -> None:
    """Those of a store that holds more blocks than are asked for, in two files."""
    blocks, mean = torch.randn(300, 3, 5), torch.randn(300, 5)
    images = some_digits(300)
    for number, places in enumerate((slice(0, 256), slice(256, 300))):
        kept = {"class": list(blocks[places]), "mean_patch": list(mean[places])}
        write_chunk(tmp_path, number, torch.arange(300)[places], kept, {})
    kinds = [(1, False), (2, False), (1, True), (2, True)]
    found = _inputs(features_in(tmp_path, images), kinds, torch.device("cpu"))
    for n, with_mean in kinds:
        parts = [*blocks[:, -n:].unbind(1), *([mean] if with_mean else [])]
        assert torch.equal(found[n, with_mean], torch.cat(parts, dim=1)), f"{n} blocks, mean patch {with_mean}"
    assert len({rows.untyped_storage().data_ptr() for rows in found.values()}) == 1
    assert next(iter(found.values())).untyped_storage().nbytes() == 300 * 3 * 5 * 4


def test_prediction_counts_unknown_classes_as_wrong_and_ties_go_to_the_smaller_label() -> None:
    known = Known.of(torch.tensor([3, 3, 8, 5]))
    table = torch.tensor([[1.0, 1.0, 0.0], [0.0, 2.0, 3.0], [0.0, 2.0, 3.0], [9.0, 0.0, 0.0]])
    found = predicted(lambda rows: rows, table, torch.tensor([5, 8, 4, 9]), known)
    assert found.label.tolist() == [3, 8, 8, 3]
    assert found.rank[:2].tolist() == [1, 0]
    assert found.correct(1).tolist() == [0, 1, 0, 0]
    assert found.correct(5).tolist() == [1, 1, 0, 0]
    with pytest.raises(PretrainError, match="1 class"):
        Known.of(torch.tensor([4, 4]))


def test_scores_of_a_head_that_has_diverged_are_wrong() -> None:
    table = torch.tensor([[torch.nan, torch.nan], [torch.nan, 1.0]])
    found = predicted(lambda rows: rows, table, torch.tensor([4, 5]), Known.of(torch.tensor([4, 5])))
    assert found.correct().tolist() == [0, 0]


def test_share_of_each_class_is_held_out_and_a_lone_image_is_kept() -> None:
    labels = torch.tensor([0] * 30 + [1] * 4 + [2])
    kept, out = held_out_per_class(labels, 0.1, seed=0)
    assert torch.bincount(labels[out], minlength=3).tolist() == [3, 1, 0]
    assert sorted([*kept.tolist(), *out.tolist()]) == list(range(35))


def test_random_square_is_the_same_for_the_same_image_alone() -> None:
    image = torch.randint(256, (3, 40, 61), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    square = RandomSquare(16, 0)(image)
    assert square.shape == (3, 16, 16)
    last = image.permute(1, 2, 0).contiguous().permute(2, 0, 1)  # as photographs are decoded
    assert torch.equal(square, RandomSquare(16, 0)(last))
    assert not torch.equal(square, RandomSquare(16, 1)(image))
    assert RandomSquare(8, 0)(image[:, :2]).shape == (3, 8, 8), "no part of this shape fits: the central square"


def test_task_chooses_on_training_images_and_says_so(tmp_path: Path) -> None:
    data = two_classes(tmp_path / "photos" / "train", 10).parent
    two_classes(data / "val", 4)
    few = {"iterations": 20, "rates": [0.1, 1.0], "blocks": [1, 2], "costs": 3, "views": 2}
    suite, _, _ = suite_on(photos_run(data, tmp_path / "run"), data, tmp_path / "out", {"linear": few})
    result = suite.run([Linear()])["linear"]
    assert not suite.failures
    assert [figure.name for figure in result.figures] == [
        f"top-{top}, {name}" for name in ("heads", "logistic") for top in (1, 5)
    ]
    curves = result.facts["heads"]["held_out_accuracy"]
    assert len(curves) == 4
    assert all(len(curve) == 2 for curve in curves.values())
    chosen = result.facts["heads"]["chosen"]
    assert chosen["rate"] in (0.1, 1.0)
    assert "2 training images" in result.notes[0]
    folder = next((tmp_path / "out").glob("linear-*"))
    rows = list(csv.DictReader((folder / "rows.csv").read_text().splitlines()))
    right = sum(row["predicted, heads"] == row["class"] for row in rows)
    assert 100 * right / len(rows) == pytest.approx(result.figures[0].value)
    assert (folder / "heads.png").is_file()
    assert json.loads((folder / "result.json").read_text())["settings"]["views"] == 2
