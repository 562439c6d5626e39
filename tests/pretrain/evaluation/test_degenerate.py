"""Images, masks and ground truths of which hardly anything can be said: each gives a figure or a sentence, by the command."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.pretrain.evaluation.tasks_at_work import photos_run
from tests.pretrain.evaluation.video.test_scores import of_two, write_predictions, write_video
from tests.pretrain.tiny import one_sentence, save_photos
from vmf_pretrain.cli import main
from vmf_pretrain.data.label_image import label_png
from vmf_pretrain.evaluation import pictures
from vmf_pretrain.evaluation.retrieval.ground_truth import GroundTruth, Query

pytestmark = pytest.mark.quick

CLASSIFIED = "knn,linear,few_shot,transfer,finetune"
QUICK: dict[str, dict[str, object]] = {
    "linear": {"iterations": 5, "rates": [0.1], "blocks": [1], "costs": 2},
    "transfer": {"costs": 2},
    "few_shot": {"draws": 1, "per_class": [1]},
    "finetune": {"epochs": 1, "batch_size": 4, "part": 4, "workers": 0},
    "retrieval": {"size": 32, "patch": 8},
    "copies": {"size": 32, "made": ["jpegqual/50"]},
    "dense": {"size": 32},
    "attention": {"shown": 1},
    "pca": {"shown": 1},
    "neighbours": {"queries": 1, "pairs": 1},
    "features": {"threads": 1},
}
OPTIONS = [
    word
    for section, settings in QUICK.items()
    for name, value in settings.items()
    for word in (f"--{section}.{name}", json.dumps(value))
]
MODES = ("RGBA", "I;16", "P", "1", "LA", "L")


def classes(folder: Path, **counts: int) -> None:
    """Photographs by folder, whose levels "__" parts."""
    for name, count in counts.items():
        save_photos(folder / name.replace("__", "/"), count)


def odd(folder: Path) -> None:
    """An image of each mode in each of two classes."""
    shades = np.random.default_rng(0).integers(0, 255, (2, 40, 48, 3)).astype(np.uint8)
    for name, some in zip(("cats", "dogs"), shades, strict=True):
        (folder / name).mkdir(parents=True)
        for place, mode in enumerate(MODES):
            wide = Image.fromarray(some[..., 0].astype(np.uint16) * 256)
            image = wide if mode == "I;16" else Image.fromarray(some).convert(mode)
            image.save(folder / name / f"{place}.png")


def equal(folder: Path) -> None:
    for name in ("train/cats", "train/dogs", "val/cats", "val/dogs"):
        (folder / name).mkdir(parents=True)
        for place in range(3):
            Image.new("RGB", (40, 40), "gray").save(folder / name / f"{place}.png")


def queries(folder: Path, *asked: Query) -> None:
    save_photos(folder, 2)
    (folder / "gnd.json").write_text(GroundTruth(("photo_00", "photo_01"), asked).json())


def video(folder: Path, *masks: np.ndarray, predicted: int | None = None) -> None:
    """Predictions are the masks themselves, or one number."""
    write_video(folder, "v", list(masks))
    write_predictions(folder / "p/v", [mask if predicted is None else np.full_like(mask, predicted) for mask in masks])


def unlisted(folder: Path) -> None:
    video(folder, of_two(0), of_two(0), of_two(0))
    (folder / "ImageSets/2017").mkdir(parents=True)
    (folder / "ImageSets/2017/val.txt").write_bytes(b"\xff\xfe")


def segments(folder: Path, train: np.ndarray, val: np.ndarray) -> None:
    for split, mask in (("train", train), ("val", val)):
        save_photos(folder / split / "images", 2, side=32)
        (folder / split / "masks").mkdir()
        for place in range(2):
            (folder / split / f"masks/photo_{place:02}.png").write_bytes(label_png(mask))


def beside_an_empty_folder(folder: Path) -> None:
    classes(folder, cats=2, dogs=2)
    (folder / "none").mkdir()


def coloured(folder: Path) -> None:
    segments(folder, HALVES, HALVES)
    Image.new("RGBA", (32, 32)).save(folder / "val/masks/photo_01.png")


def masked_out(folder: Path) -> None:
    classes(folder, cats=1)
    (folder / "masks/cats").mkdir(parents=True)
    (folder / "masks/cats/photo_00.png").write_bytes(label_png(PLAIN))


PLAIN = np.zeros((32, 32), np.uint8)
HALVES = np.tile(np.repeat(np.array([0, 1], np.uint8), 16), (32, 1))
BOTH, FIRST = of_two(0), np.where(of_two(0) == 1, np.uint8(1), np.uint8(0))
GIVEN = "--video.predictions D/p"
HALF = {"top-1, k 10": 50.0}
# what is in the folder D, the tasks, more options, and the figures or the part of a sentence that each task gives
CASES: dict[str, tuple[Callable[[Path], object], str, str, str | dict[str, float]]] = {
    "an empty folder": (lambda d: None, f"{CLASSIFIED},retrieval,copies,neighbours,pca", "", "D holds no image"),
    "no image to whiten on": (
        beside_an_empty_folder,
        "retrieval,copies",
        "--retrieval.whitening D/none --copies.whitening D/none",
        ".whitening D/none holds no image",
    ),
    "one class": (lambda d: classes(d, train__cats=3, val__cats=2), CLASSIFIED, "", "D has no classes"),
    "one class in one split": (lambda d: classes(d, train__cats=3, train__dogs=3, val__cats=2), CLASSIFIED, "", {}),
    "one image a class": (
        lambda d: classes(d, train__cats=1, train__dogs=1, val__cats=1, val__dogs=1),
        "linear",
        "",
        "every class has one training image",
    ),
    "fewer images than k": (
        lambda d: classes(d, train__cats=1, train__dogs=1, val__cats=1, val__dogs=1),
        "knn",
        "",
        HALF,
    ),
    "a class with one image": (lambda d: classes(d, cats=3, dogs=1), "retrieval", "", {}),
    "one image": (lambda d: classes(d, cats=1), f"{CLASSIFIED},neighbours", "", "1 image; expected at least 2"),
    "images that are all equal": (equal, f"{CLASSIFIED},retrieval,copies,neighbours,pca", "", {}),
    "modes of images": (odd, "knn,retrieval,copies,neighbours,attention", "", {}),
    "no query with a positive": (
        lambda d: queries(d, Query("photo_00", None, (), (), (1,))),
        "retrieval",
        "",
        "no query of D has a readable image",
    ),
    "no query": (lambda d: queries(d), "retrieval", "", "has 2 images and 0 queries"),
    "a copy without an original": (
        lambda d: classes(d, original=1, strong=2),
        "copies",
        "--copies.made []",
        {"mAP, strong": 100.0},
    ),
    "an object that vanishes": (lambda d: video(d, BOTH, FIRST, FIRST, FIRST), "video", GIVEN, {"J&F": 100.0}),
    "an object that is not found": (
        lambda d: video(d, BOTH, BOTH, BOTH, predicted=0),
        "video",
        GIVEN,
        {"J, mean": 0.0, "F, mean": 0.0},
    ),
    "numbers without an object": (
        lambda d: video(d, FIRST * 5, FIRST * 5, FIRST * 5, predicted=0),
        "video",
        GIVEN,
        {"J, mean": 0.0},
    ),
    "no object": (lambda d: video(d, PLAIN, PLAIN, PLAIN), "video", GIVEN, "no video of D has an object"),
    "a list that is no text": (unlisted, "video", GIVEN, "val.txt cannot be read"),
    "one class of pixels": (lambda d: segments(d, PLAIN, HALVES), "dense", "", "at least 2 classes"),
    "a class that was never seen": (lambda d: segments(d, HALVES, PLAIN + 2), "dense", "", {"mIoU, linear": 0.0}),
    "no pixel that counts": (lambda d: segments(d, HALVES, PLAIN + 255), "dense", "", "val are ignored"),
    "a mask with colours": (
        coloured,
        "dense",
        "",
        "photo_01.png is no mask (a mask of the mode RGBA",
    ),
    "empty masks": (
        masked_out,
        "attention",
        "--attention.masks D/masks",
        "1 has an empty mask",
    ),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    save_photos(folder / "photos", 4)
    return photos_run(folder / "photos", folder / "run")


@pytest.mark.parametrize("case", CASES)
def test_case_gives_a_figure_or_a_sentence(
    case: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures, "save_figure", lambda *figure: None)  # which takes longer than all else
    make, tasks, options, expected = CASES[case]
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    make(data)
    more = options.replace("D/", f"{data}/").split()
    code = main(["eval", str(run), "--task", tasks, "--data", str(data), "--out", str(out), *OPTIONS, *more])
    lines = "".join(capsys.readouterr()).splitlines()
    assert code == (2 if isinstance(expected, str) else 0), lines
    for task in tasks.split(","):
        if isinstance(expected, str):
            (said,) = [line for line in lines if line.startswith(f"{task}: ")]
            assert expected in said.replace(str(data), "D")
            assert one_sentence(said)
        else:
            (path,) = out.glob(f"{task}-*/result.json")
            found = {figure["name"]: figure["value"] for figure in json.loads(path.read_text())["figures"]}
            assert all(math.isfinite(value) for value in found.values())
            assert {name: found[name] for name in expected} == pytest.approx(expected), found
