"""J and F against scikit-learn and scipy, on random shapes and at the edges; statistics of few and of many frames; files."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import binary_dilation, gaussian_filter
from sklearn.metrics import f1_score, jaccard_score

from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.data.bad_images import UnreadableImageError
from vmf_pretrain.data.label_image import label_png, palette, read_labels
from vmf_pretrain.evaluation.video.davis import read_videos, score_predictions
from vmf_pretrain.evaluation.video.measures import contour_accuracy, region_similarity
from vmf_pretrain.evaluation.video.statistics import ObjectScores, overall, statistics_of

pytestmark = pytest.mark.quick

SHAPE = (60, 90)
Mask = NDArray[np.bool_]


def blobs(seed: int, shape: tuple[int, int] = SHAPE) -> Mask:
    """Smooth random shapes, some of which touch the edges."""
    return np.asarray(gaussian_filter(np.random.default_rng(seed).normal(size=shape), 6) > 0.02)


def direct_contour(mask: Mask) -> Mask:
    """The definition, pixel by pixel."""
    height, width = mask.shape
    found = np.zeros_like(mask)
    for y, x in np.ndindex(mask.shape):
        near = [(y, x + 1), (y + 1, x), (y + 1, x + 1)]
        found[y, x] = any(mask[y, x] != mask[v, u] for v, u in near if v < height and u < width)
    return found


def direct_accuracy(reference: Mask, predicted: Mask) -> float:
    """F by scipy's dilation with a disk."""
    radius = math.ceil(0.008 * math.hypot(*reference.shape))
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    disk = x**2 + y**2 <= radius**2
    one, other = direct_contour(reference), direct_contour(predicted)
    recall = (one & binary_dilation(other, disk)).sum() / one.sum()
    precision = (other & binary_dilation(one, disk)).sum() / other.sum()
    return float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0


PAIRS = {
    "alike": (blobs(0), np.roll(blobs(0), 1, 1)),
    "apart": (blobs(0), blobs(1)),
    "a larger tolerance": (blobs(2, (20, 300)), blobs(3, (20, 300))),
    "pixels in the corners": (np.eye(2, dtype=bool).repeat(20, 0).repeat(20, 1), np.eye(40, dtype=bool)),
    "far apart": (np.pad(np.ones((2, 2), bool), (0, 50)), np.pad(np.ones((2, 2), bool), (50, 0))),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_measures_equal_their_definitions(pair: str) -> None:
    reference, predicted = PAIRS[pair]
    assert region_similarity(reference, predicted) == pytest.approx(
        jaccard_score(reference.ravel(), predicted.ravel()), abs=1e-12
    )
    assert contour_accuracy(reference, predicted) == pytest.approx(direct_accuracy(reference, predicted), abs=1e-12)


@pytest.mark.parametrize(
    ("reference", "predicted", "region", "line"),
    [(False, False, 1.0, 1.0), (True, False, 0.0, 0.0), (False, True, 0.0, 0.0), (True, True, 1.0, 1.0)],
)
def test_objects_that_are_absent_or_wrongly_present(
    reference: bool, predicted: bool, region: float, line: float
) -> None:
    masks = [blobs(0) & present for present in (reference, predicted)]
    assert (region_similarity(*masks), contour_accuracy(*masks)) == (region, line)


def test_an_object_that_fills_the_frame_has_no_contour() -> None:
    full = np.ones(SHAPE, bool)
    assert contour_accuracy(full, full) == 1.0
    assert contour_accuracy(full, blobs(0)) == 0.0


def test_statistics_are_the_published_ones() -> None:
    """Ten frames: the ends of quarters are frames 1, 3, 6, 8 and 10, and quarters share them."""
    values = np.array([0.9, 0.8, 0.7, 0.6, 0.5, 0.5, 0.4, 0.3, 0.2, 0.1])
    found = statistics_of(values)
    assert found == pytest.approx((0.5, 0.4, np.mean([0.9, 0.8, 0.7]) - np.mean([0.3, 0.2, 0.1])))
    # seven frames: the first quarter ends at frame 2.5, which is the third
    assert statistics_of(np.array([1.0, 1, 0, 0, 0, 0, 0])).decay == pytest.approx(2 / 3)
    assert statistics_of(np.array([0.7])) == (0.7, 1.0, 0.0)
    many = np.linspace(1, 0, 1001)  # beyond 256 frames, where the published numbers of frames overflow
    assert statistics_of(many).decay == pytest.approx(0.75, abs=1e-3)


def test_means_are_over_objects() -> None:
    one, half = np.ones(3), np.full(3, 0.5)
    scores = [ObjectScores("a", 1, one, one), ObjectScores("a", 2, one, half), ObjectScores("b", 1, half, half)]
    found = overall(scores)
    assert found["j_mean"] == pytest.approx(100 * 2.5 / 3)
    assert found["j&f"] == pytest.approx(100 * (2.5 + 2) / 6)
    assert found["j_recall"] == pytest.approx(200 / 3)
    assert found["f_recall"] == pytest.approx(100 / 3)
    assert found["j_decay"] == 0


def write_video(root: Path, name: str, masks: list[NDArray[np.uint8]]) -> None:
    for folder in (root / "JPEGImages/480p" / name, root / "Annotations/480p" / name):
        folder.mkdir(parents=True)
    for number, mask in enumerate(masks):
        Image.new("RGB", mask.shape[::-1]).save(root / f"JPEGImages/480p/{name}/{number:05}.jpg")
        (root / f"Annotations/480p/{name}/{number:05}.png").write_bytes(label_png(mask))


def write_predictions(folder: Path, masks: list[NDArray[np.uint8]]) -> Path:
    folder.mkdir(parents=True)
    for number, mask in enumerate(masks):
        (folder / f"{number:05}.png").write_bytes(label_png(mask))
    return folder


def of_two(seed: int) -> NDArray[np.uint8]:
    return np.where(blobs(seed), 1, np.where(blobs(seed + 50), 2, 0)).astype(np.uint8)


def test_predictions_in_files_are_scored_by_object(tmp_path: Path) -> None:
    """First and last frame do not count, void is background, and an object that was not predicted scores as empty."""
    masks = [of_two(seed) for seed in range(4)]
    masks[1][:5] = 255
    write_video(tmp_path, "v", masks)
    predicted = [np.minimum(of_two(seed + 9), 1) for seed in range(4)]
    (video,) = read_videos(tmp_path)
    scores = score_predictions(video, write_predictions(tmp_path / "p", predicted))
    assert [(score.video, score.object) for score in scores] == [("v", 1), ("v", 2)]
    expected = [f1_score((masks[n] == 1).ravel(), (predicted[n] == 1).ravel()) for n in (1, 2)]
    np.testing.assert_allclose(scores[0].region, [f / (2 - f) for f in expected])
    assert scores[1].region.tolist() == scores[1].contour.tolist() == [0, 0]


def test_white_masks_have_one_object(tmp_path: Path) -> None:
    masks = [blobs(seed).astype(np.uint8) * 255 for seed in range(3)]
    write_video(tmp_path, "v", masks)
    (video,) = read_videos(tmp_path)
    (score,) = score_predictions(video, write_predictions(tmp_path / "p", masks))
    assert score.region.tolist() == [1.0]


@pytest.mark.parametrize("frames", [1, 2])
def test_a_video_without_inner_frames_has_no_scores(frames: int, tmp_path: Path) -> None:
    write_video(tmp_path, "v", [of_two(0)] * frames)
    assert score_predictions(read_videos(tmp_path)[0], tmp_path) == []


@pytest.mark.parametrize(
    ("predicted", "said"),
    [
        ([of_two(0)], "00001.png is missing"),
        ([of_two(0)] * 2 + [np.full(SHAPE, 3, np.uint8)], "has object 3; expected at most 2"),
        ([of_two(0), of_two(1)[:-1], of_two(2)], r"the mask has \(59, 90\) pixels; expected \(60, 90\)"),
    ],
)
def test_predictions_that_do_not_fit(predicted: list[NDArray[np.uint8]], said: str, tmp_path: Path) -> None:
    write_video(tmp_path, "v", [of_two(seed) for seed in range(4)])
    with pytest.raises(PretrainError, match=said):
        score_predictions(read_videos(tmp_path)[0], write_predictions(tmp_path / "p", predicted))


def test_the_list_of_a_split_is_followed(tmp_path: Path) -> None:
    for name in ("a", "b c"):
        write_video(tmp_path, name, [of_two(0)])
    (tmp_path / "ImageSets/2017").mkdir(parents=True)
    (tmp_path / "ImageSets/2017/val.txt").write_text("b c\n")
    assert [video.name for video in read_videos(tmp_path)] == ["b c"]
    assert [video.name for video in read_videos(tmp_path, "train")] == ["a", "b c"]


def test_numbers_and_colours_of_masks_survive() -> None:
    labels = np.arange(256, dtype=np.uint8).reshape(8, 32)
    np.testing.assert_array_equal(read_labels(label_png(labels)), labels)
    assert palette()[[0, 1, 2, 3, 20]].tolist() == [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0], [0, 64, 128]]


def test_a_picture_is_no_mask() -> None:
    with pytest.raises(UnreadableImageError):
        read_labels(b"\xff\xd8\xff")
