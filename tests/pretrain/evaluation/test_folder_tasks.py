"""Retrieval, copies, video and segmentation from a folder to their result: layouts, settings, damage, what goes on."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from tests.pretrain.evaluation.tasks_at_work import CPU, photos_run
from tests.pretrain.evaluation.video.test_scores import of_two, write_predictions, write_video
from tests.pretrain.tiny import save_photos
from vmf_pretrain.config.file import python_layer
from vmf_pretrain.config.tasks.evaluation import EvaluationConfig
from vmf_pretrain.config.typed import made
from vmf_pretrain.data.label_image import label_png, read_labels
from vmf_pretrain.evaluation.evaluated import load_evaluated
from vmf_pretrain.evaluation.given import Given
from vmf_pretrain.evaluation.result import Result
from vmf_pretrain.evaluation.retrieval.ground_truth import GroundTruth, Query
from vmf_pretrain.evaluation.suite import Hooks, Suite
from vmf_pretrain.evaluation.tasks.table import TASKS

pytestmark = pytest.mark.quick

SMALL = {
    "retrieval.size": 64,
    "retrieval.patch": 8,
    "copies.size": 32,
    "dense.size": 32,
    "features.threads": 1,
    "dense.neighbours": 5,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("trained")
    save_photos(root / "photos", 12)
    return photos_run(root / "photos", root / "run")


def done(run: Path, data: Path, out: Path, task: str, **settings: object) -> tuple[Result | None, list[str]]:
    """The result of a task, or what it said."""
    values = {**SMALL, "data.folder": str(data), **{name.replace("__", "."): value for name, value in settings.items()}}
    config: EvaluationConfig = made(EvaluationConfig, python_layer(values, EvaluationConfig))
    evaluated = load_evaluated(str(run), device=CPU)
    said: list[str] = []
    hooks = Hooks(said.append, lambda count: None, lambda count: None, lambda *found: None)
    suite = Suite(evaluated, Given(config.data, evaluated.config, evaluated.fed.size), config, out, hooks)
    return suite.run([TASKS[task]]).get(task), said


def values(result: Result | None) -> dict[str, float]:
    assert result is not None
    return {figure.name: figure.value for figure in result.figures}


def test_an_image_finds_its_own_copy_at_every_scale(run: Path, tmp_path: Path) -> None:
    """The ground truth names images without ending; queries are images of the database, which find themselves."""
    save_photos(tmp_path / "data/jpg", 6)
    names = [f"photo_{number:02}" for number in range(6)]
    queries = [Query(name, None, (place,), (), ()) for place, name in enumerate(names)]
    queries.append(Query(names[0], None, (), (), (1,)))
    (tmp_path / "data/gnd_x.json").write_text(GroundTruth(tuple(names), tuple(queries)).json())
    scales = {"retrieval__scales": (1.0, 0.5), "retrieval__whitening": str(tmp_path / "data/jpg")}
    for more in ({}, scales, {"retrieval__pooling": "gem"}):
        found = values(done(run, tmp_path / "data", tmp_path / "out", "retrieval", **more)[0])
        assert found["mAP, easy"] == found["mP@1, easy"] == 100
        assert "mAP, hard" not in found, "no query has a hard positive"


def test_without_a_ground_truth_classes_answer(run: Path, tmp_path: Path) -> None:
    """Images of a class are equal here, and those of the other class differ; a damaged one is never found."""
    save_photos(tmp_path / "two", 2)
    for number in range(2):
        for copy in range(3):
            target = tmp_path / f"data/{number}/{copy}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(tmp_path / f"two/photo_{number:02}.png", target)
    assert values(done(run, tmp_path / "data", tmp_path / "out", "retrieval")[0])["mAP, easy"] == 100
    (tmp_path / "data/0/2.png").write_bytes(b"no image")
    result, said = done(run, tmp_path / "data", tmp_path / "out", "retrieval")
    assert values(result)["mAP, easy"] < 100
    assert any("could not be read" in line for line in said)


def test_a_ground_truth_of_other_images_is_said(run: Path, tmp_path: Path) -> None:
    save_photos(tmp_path / "data", 2)
    (tmp_path / "data/gnd.json").write_text(GroundTruth(("photo_00", "elsewhere"), ()).json())
    assert "the first is elsewhere" in done(run, tmp_path / "data", tmp_path / "out", "retrieval")[1][0]
    save_photos(tmp_path / "data/again", 1)
    (tmp_path / "data/gnd.json").write_text(GroundTruth(("photo_01", "photo_00"), ()).json())
    said = done(run, tmp_path / "data", tmp_path / "out", "retrieval")[1][0]
    assert "several files have their name; the first is photo_00" in said


def test_copies_are_made_or_given_and_found(run: Path, tmp_path: Path) -> None:
    save_photos(tmp_path / "plain", 5)
    found = values(done(run, tmp_path / "plain", tmp_path / "out", "copies", copies__made=("jpegqual/95",))[0])
    assert found == {"mAP, jpegqual/95, made here": 100}
    for number in range(3):  # Copydays: 2000 to 2002 are originals, 200x01 and 200x02 their strong copies
        for name in (
            f"original/200{number}00",
            f"strong/200{number}01",
            f"strong/200{number}02",
            f"crops/10/200{number}00",
        ):
            target = tmp_path / f"days/{name}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(tmp_path / f"plain/photo_{number:02}.png", target)
    more = {"copies__distractors": str(tmp_path / "plain"), "copies__whitening": str(tmp_path / "plain")}
    result, _ = done(run, tmp_path / "days", tmp_path / "out", "copies", copies__made=("crops/80",), **more)
    found = values(result)
    assert list(found) == ["mAP, crops/10", "mAP, strong", "mAP, crops/80, made here"]
    assert found["mAP, strong"] == 100, "equal distractors stand behind, as the database begins with the originals"
    assert result is not None
    assert result.facts == {"originals": 3, "database": 8}


def test_copies_of_images_of_one_name_in_several_folders_are_told_apart(run: Path, tmp_path: Path) -> None:
    for place, path in enumerate(save_photos(tmp_path / "plain", 4)):
        (tmp_path / f"data/{place}").mkdir(parents=True)
        shutil.copy(path, tmp_path / f"data/{place}/same.png")
    found = values(done(run, tmp_path / "data", tmp_path / "out", "copies", copies__made=("jpegqual/95",))[0])
    assert found == {"mAP, jpegqual/95, made here": 100}


def test_a_video_is_followed_and_masks_from_elsewhere_are_scored(run: Path, tmp_path: Path) -> None:
    masks = [of_two(seed) for seed in range(4)]
    write_video(tmp_path / "data", "v", masks)
    result, _ = done(run, tmp_path / "data", tmp_path / "out", "video")
    assert set(values(result)) == {"J&F", *(f"{m}, {s}" for m in "JF" for s in ("mean", "recall", "decay"))}
    (folder,) = (tmp_path / "out").glob("video-*")
    first, *others = sorted((folder / "predictions/v").glob("*.png"))
    np.testing.assert_array_equal(read_labels(first.read_bytes()), masks[0])
    assert len(others) == 3
    elsewhere = write_predictions(tmp_path / "elsewhere/v", masks).parent
    result, _ = done(run, tmp_path / "data", tmp_path / "out", "video", video__predictions=str(elsewhere))
    assert values(result)["J&F"] == 100
    # masks that are there are taken: a killed evaluation goes on after the last whole video
    (folder / "result.json").unlink()
    write_predictions(tmp_path / "same/v", masks)
    shutil.rmtree(folder / "predictions/v")
    shutil.copytree(tmp_path / "same/v", folder / "predictions/v")
    assert values(done(run, tmp_path / "data", tmp_path / "out", "video")[0])["J&F"] == 100
    rows = list(csv.DictReader((folder / "rows.csv").read_text().splitlines()))
    assert [(row["video"], row["object"], row["J mean"]) for row in rows] == [("v", "1", "1.0"), ("v", "2", "1.0")]


def test_a_video_without_a_frame_is_refused_with_its_name(run: Path, tmp_path: Path) -> None:
    write_video(tmp_path / "data", "v", [of_two(seed) for seed in range(3)])
    (tmp_path / "data/JPEGImages/480p/v/00001.jpg").write_bytes(b"no image")
    _, (said,) = done(run, tmp_path / "data", tmp_path / "out", "video")
    assert "00001.jpg cannot be read" in said
    assert not list((tmp_path / "out").glob("video-*/predictions/*"))


def halves(folder: Path, count: int, seed: int) -> None:
    """Images whose left part is dark (class 0) and whose right part is bright (class 2), between them a void column."""
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    for number in range(count):
        edge = 8 * int(torch.randint(2, 7, (), generator=generator))
        mask = np.zeros((48, 64), np.uint8)
        mask[:, edge:], mask[:, edge] = 2, 255
        noise = torch.rand(1, 3, 12, 16, generator=generator)
        shade = np.where(mask > 0, 200, 20)[..., None]
        grain = functional.interpolate(noise, (48, 64))[0].permute(1, 2, 0).numpy() * 50
        Image.fromarray((shade + grain).astype(np.uint8)).save(folder / f"images/{number}.png")
        (folder / f"masks/{number}.png").write_bytes(label_png(mask))


def test_patches_of_dark_and_bright_are_told_apart(run: Path, tmp_path: Path) -> None:
    halves(tmp_path / "data/train", 12, 0)
    halves(tmp_path / "data/val", 4, 1)
    result, _ = done(run, tmp_path / "data", tmp_path / "out", "dense")
    found = values(result)
    assert found["mIoU, k 5"] > 60
    assert found["mIoU, linear"] > 60
    few, _ = done(run, tmp_path / "data", tmp_path / "few", "dense", dense__max_patches=70)
    assert few is not None
    assert few.facts["training_patches"] == 70
    (folder,) = (tmp_path / "out").glob("dense-*")
    facts = json.loads((folder / "result.json").read_text())["facts"]
    counts = np.array(facts["confusion"]["linear"])
    assert facts["classes"] == 3
    assert counts.sum() == 4 * 48 * 63, "void pixels do not count"
    assert not counts[1].any()
    (tmp_path / "data/val/masks/2.png").unlink()
    assert "2.png cannot be read" in done(run, tmp_path / "data", tmp_path / "out", "dense")[1][0]
