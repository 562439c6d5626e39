"""Tasks on real images at hand, each against scikit-learn: the bundled animals, and photographs that packages bring."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_sample_image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import auc, confusion_matrix, jaccard_score, precision_recall_curve
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid
from torch.nn import functional

from tests.pretrain.evaluation.tasks_at_work import photos_run, run_of, suite_on
from tests.pretrain.tiny import animals_config
from vmf_pretrain.data.animals import ANIMAL_CLASSES, animals
from vmf_pretrain.data.images import Images
from vmf_pretrain.data.label_image import label_png
from vmf_pretrain.evaluation.extract import images_facts
from vmf_pretrain.evaluation.result import Result
from vmf_pretrain.evaluation.splits import drawn_per_class, held_out_per_class
from vmf_pretrain.evaluation.suite import Suite
from vmf_pretrain.evaluation.tasks.table import TASKS
from vmf_pretrain.storage.tensor_file import read_tensors

pytestmark = pytest.mark.quick

TILE = 110  # pixels of a piece of a photograph
HELD_OUT = 0.3


def done(run: Path, data: Path | None, out: Path, task: str, settings: dict[str, Any]) -> tuple[Suite, Result, Path]:
    """A suite that has done a task, its result, and its folder."""
    suite, said, _ = suite_on(run, data, out, settings)
    result = suite.run([TASKS[task]])
    assert not said
    return suite, result[task], next(out.glob(f"{task}-*"))


def stored(out: Path, images: Images) -> list[dict[str, torch.Tensor]]:
    """The features of some images that fill one file, as each view shows them."""
    wanted = images_facts(images)
    folders = [path.parent for path in sorted(out.glob("features/*/spec.json")) if wanted == of(path)["images"]]
    return [read_tensors(folder / "000000.safetensors")[0] for folder in folders]


def of(spec: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(spec.read_text())["of"]
    return found


def rows_in(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "rows.csv").read_text().splitlines()))


@pytest.fixture(scope="module")
def of_animals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_of(animals_config(), tmp_path_factory.mktemp("animals") / "run")


@pytest.fixture(scope="module")
def of_photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    tiles(folder / "some", 4)
    return photos_run(folder / "some", folder / "run")


@pytest.mark.thorough
def test_animals_are_told_apart_as_by_scikit_learn(of_animals: Path, tmp_path: Path) -> None:
    few = {"data.max_images": 250, "knn": {"neighbours": [5, 20]}}
    few |= {"linear": {"probes": ["logistic"], "costs": 4, "held_out": HELD_OUT}}
    suite, _, nearest = done(of_animals, None, tmp_path, "knn", few)
    _, probed, linear = done(of_animals, None, tmp_path, "linear", few)
    splits = suite.given.labelled
    train, test = (
        stored(tmp_path, images)[0]["class"][:, -1].double().numpy() for images in (splits.train, splits.test)
    )
    assert splits.train.labels is not None
    assert splits.test.labels is not None
    labels, expected = splits.train.labels, splits.test.labels.numpy()
    for count in (5, 20):
        near = KNeighborsClassifier(count, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.07))
        said = [ANIMAL_CLASSES[n] for n in near.fit(train, labels).predict(test)]
        assert said == [row[f"predicted, k {count}"] for row in rows_in(nearest)], f"k {count}"
    kept, out = (places.numpy() for places in held_out_per_class(labels, HELD_OUT, 0))
    facts = probed.facts["logistic"]
    for cost, right in facts["held_out_accuracy"]["C"][:3]:  # the largest C settles in neither
        oracle = regression(cost).fit(train[kept], labels[kept])
        assert 100 * oracle.score(train[out], labels[out]) == pytest.approx(right), f"C {cost}"
    assert facts["chosen"]["C"] < 1e3
    oracle = regression(facts["chosen"]["C"]).fit(train, labels)
    assert [ANIMAL_CLASSES[n] for n in oracle.predict(test)] == [row["predicted, logistic"] for row in rows_in(linear)]
    assert 100 * oracle.score(test, expected) == pytest.approx(probed.figures[0].value)
    assert len(set(oracle.predict(test))) > 4, "the case tells few classes apart"


def regression(cost: float) -> LogisticRegression:
    return LogisticRegression(C=cost, solver="newton-cholesky", tol=1e-10)


def test_few_animals_are_told_apart_as_by_scikit_learn(of_animals: Path, tmp_path: Path) -> None:
    """Regressions on one and on five of each animal, and episodes of two of each, whose numbers are drawn here again."""
    few = {"per_class": [1, 5], "shares": [], "draws": 2, "penalty": 0.01, "ways": 4, "shots": 2, "queries": 6}
    settings = {"data.max_images": 200, "few_shot": {**few, "episodes": 20}}
    suite, result, folder = done(of_animals, None, tmp_path, "few_shot", settings)
    splits = suite.given.labelled
    train, test = (stored(tmp_path, images)[0] for images in (splits.train, splits.test))
    assert splits.train.labels is not None
    assert splits.test.labels is not None
    labels, expected = splits.train.labels, splits.test.labels.numpy()
    read = {}
    for name, tensors in (("train", train), ("test", test)):
        centred = tensors["unnormed"].double() - tensors["unnormed"].double().mean(dim=1, keepdim=True)
        read[name] = functional.normalize(centred, dim=1).numpy()
    for count in (1, 5):
        right = []
        for draw in range(2):
            places = drawn_per_class(labels, lambda size, count=count: count, draw).numpy()  # type: ignore[misc]
            oracle = LogisticRegression(C=100, fit_intercept=False, solver="newton-cholesky", tol=1e-12)
            right.append(oracle.fit(read["train"][places], labels[places]).predict(read["test"]) == expected)
        shares = [float(row[f"correct, {count} a class"]) for row in rows_in(folder)]
        assert np.mean(right, axis=0).tolist() == shares, f"{count} a class"
        assert 0 < np.mean(right) < 1
    numbers, scores = torch.Generator().manual_seed(0), []
    rows, of_class = test["class"][:, -1].double().numpy(), [np.flatnonzero(expected == label) for label in range(10)]
    enough = [some for some in of_class if len(some) >= 8]
    for _ in range(20):
        drawn = []
        for way in torch.randperm(len(enough), generator=numbers)[:4].tolist():
            drawn.append(enough[way][torch.randperm(len(enough[way]), generator=numbers)[:8].numpy()])
        support, query = (np.concatenate([some[part] for some in drawn]) for part in (slice(2), slice(2, None)))
        scores.append(NearestCentroid().fit(rows[support], expected[support]).score(rows[query], expected[query]))
    figure = next(figure for figure in result.figures if figure.name == "4 ways, 2 shots")
    assert figure.value == pytest.approx(100 * np.mean(scores), abs=1e-9)
    assert len(set(scores)) > 3, "the case tells nothing apart"


def scenes(folder: Path, first: int, count: int) -> None:
    """Bundled silhouettes of three animals, bright on gray, with masks: 0 around them, 1, 2 or 3 inside."""
    drawn = animals()[0]
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    for number in range(count):
        label = number % 3
        place = int((drawn.labels == label).nonzero()[first + number, 0])
        inside = np.kron(drawn.silhouettes[place].numpy() > 1, np.ones((2, 2), bool))
        Image.fromarray(np.where(inside, 230, 90).astype(np.uint8)).save(folder / f"images/{number}.png")
        (folder / f"masks/{number}.png").write_bytes(label_png(np.where(inside, 1 + label, 0).astype(np.uint8)))


def test_pixels_of_animals_are_classified_as_by_scikit_learn(of_photos: Path, tmp_path: Path) -> None:
    """The same patches, classified by scikit-learn, enlarged, and counted by scikit-learn."""
    data, neighbours, side = tmp_path / "data", 7, 64
    scenes(data / "train", 0, 12)
    scenes(data / "val", 40, 6)
    few = {"dense": {"size": side, "neighbours": neighbours}}
    suite, result, _ = done(of_photos, data, tmp_path / "out", "dense", few)
    sides = {split: suite.given.below(data / split / "images") for split in ("train", "val")}
    patches = {
        split: stored(tmp_path / "out", images)[0]["patches"].double().numpy() for split, images in sides.items()
    }
    masks = {split: masks_in(data / split / "masks") for split in sides}
    grid = side // 8
    labels = np.concatenate([frequent(mask, grid) for mask in masks["train"]])
    near = KNeighborsClassifier(
        neighbours, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.07)
    )
    votes = near.fit(patches["train"], labels).predict_proba(patches["val"]).reshape(6, grid, grid, -1)
    large = functional.interpolate(torch.from_numpy(votes).permute(0, 3, 1, 2), masks["val"].shape[1:], mode="bilinear")
    predicted = near.classes_[large.argmax(dim=1).numpy()].ravel()
    expected = confusion_matrix(masks["val"].ravel(), predicted, labels=range(4))
    found = np.array(result.facts["confusion"][f"k {neighbours}"])
    # scikit-learn votes in fp64: a pixel between two patches may fall to the other side
    assert np.abs(found - expected).sum() <= 2e-4 * expected.sum(), f"{np.abs(found - expected).sum()} pixels"
    overlaps = jaccard_score(masks["val"].ravel(), predicted, labels=range(4), average="macro")
    assert result.figures[0].value == pytest.approx(100 * overlaps, abs=0.02)
    assert 20 < result.figures[0].value < 99


def masks_in(folder: Path) -> NDArray[np.uint8]:
    """[N, H, W], by name."""
    found = []
    for path in sorted(folder.iterdir()):
        with Image.open(path) as image:
            found.append(np.array(image))
    return np.stack(found)


def frequent(mask: NDArray[np.uint8], grid: int) -> NDArray[np.int64]:
    """[grid^2] the most frequent number of each patch, the smaller of two equals."""
    side = len(mask) // grid
    patches = mask.reshape(grid, side, grid, side).swapaxes(1, 2).reshape(grid**2, -1)
    return np.array([np.bincount(patch).argmax() for patch in patches])


def tiles(folder: Path, each: int) -> None:
    """Pieces of photographs that scikit-learn and matplotlib bring."""
    portrait = Path(matplotlib.get_data_path()) / "sample_data/grace_hopper.jpg"
    with Image.open(portrait) as opened:
        photographs = {"hopper": np.asarray(opened.convert("RGB"))}
    photographs |= {name: load_sample_image(f"{name}.jpg") for name in ("china", "flower")}
    folder.mkdir(parents=True)
    for name, pixels in photographs.items():
        corners = [(top, left) for top in range(0, len(pixels) - TILE, TILE) for left in range(0, 500 - TILE, TILE)]
        for number, (top, left) in enumerate(corners[:each]):
            Image.fromarray(pixels[top : top + TILE, left : left + TILE]).save(folder / f"{name}_{number:02}.png")


def test_copies_of_photographs_are_found_as_scikit_learn_counts_them(of_photos: Path, tmp_path: Path) -> None:
    """Area under scikit-learn's curve of the first 20; features joined and pooled by hand."""
    tiles(tmp_path / "data", 9)
    made = ("jpegqual/5", "crops/70")
    few = {"copies": {"made": list(made), "size": 32}}
    suite, result, _ = done(of_photos, tmp_path / "data", tmp_path / "out", "copies", few)
    photos = suite.given.below(tmp_path / "data")
    sets = {
        of(path)["view"] + of(path).get("name", ""): path.parent
        for path in (tmp_path / "out").glob("features/*/spec.json")
    }
    rows = {name: pooled(read_tensors(folder / "000000.safetensors")[0]) for name, folder in sets.items()}
    for figure, block in zip(result.figures, made, strict=True):
        precisions = []
        for place, query in enumerate(rows[f"Altered{block}"]):
            similarity = rows["Squashed"] @ query
            order = np.argsort(-similarity, kind="stable")[:20]
            hits = order == place
            if hits.any():
                precision, recall, _ = precision_recall_curve(hits, -np.arange(20))
                precisions.append(auc(recall, precision))
            else:
                precisions.append(0.0)
        assert len(precisions) == len(photos) == 27
        assert figure.value == pytest.approx(100 * np.mean(precisions), abs=1e-6), block
        assert 15 < figure.value < 100, f"{block} tells nothing apart"


def pooled(tensors: dict[str, torch.Tensor]) -> NDArray[np.float64]:
    """[N, 2 F] of length 1: the class token beside the fourth-power mean of the patches that are positive."""
    tokens = tensors["class"][:, -1].double().numpy()
    patches = tensors["patches"].double().numpy().reshape(len(tokens), -1, tokens.shape[1])
    joined = np.concatenate([tokens, (patches.clip(1e-6) ** 4).mean(axis=1) ** 0.25], axis=1)
    found: NDArray[np.float64] = joined / np.linalg.norm(joined, axis=1, keepdims=True)
    return found
