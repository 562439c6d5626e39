"""Videos as folders of frames, with masks of their objects: the layout of DAVIS 2017.

``JPEGImages/480p/VIDEO/00000.jpg`` and ``Annotations/480p/VIDEO/00000.png``, with the names of videos in
``ImageSets/2017/val.txt``; the folder of the resolution and the list may be missing. Predictions are ``VIDEO/00000.png``.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.data.decode import SUFFIXES
from vmf_pretrain.data.label_image import read_label_file
from vmf_pretrain.evaluation.video.statistics import ObjectScores, Tally

VOID = 255
Labels = NDArray[np.uint8]


@dataclass(frozen=True)
class Video:
    """One video.

    Attributes:
        name: of its folder.
        frames: files in the order of their names.
        masks: one file of each frame.
    """

    name: str
    frames: tuple[Path, ...]
    masks: tuple[Path, ...]

    def first_mask(self) -> Labels:
        """[H, W] numbers of the objects that are followed."""
        return Masks(self.masks[0]).read(self.masks[0])


class Masks:
    """Masks of one video. Void pixels are background.

    A video whose first mask has no numbers but 0 and 255 is one of DAVIS 2016, or of any tool that paints a mask white: there
    255 is object 1, in all its frames.

    Args:
        first: mask of the first frame.
    """

    def __init__(self, first: Path) -> None:
        self.white = int(set(np.unique(read_label_file(first)).tolist()) == {0, VOID})

    def read(self, path: Path) -> Labels:
        """[H, W] numbers of objects.

        Raises:
            PretrainError: the file cannot be read, or is no mask.
        """
        labels = read_label_file(path)
        return np.where(labels == VOID, np.uint8(self.white), labels)

    def read_predicted(self, path: Path) -> Labels:
        """[H, W] numbers of objects of a prediction, which has no void pixels."""
        return self.read(path) if self.white else read_label_file(path)


def read_videos(root: Path, split: str = "val") -> list[Video]:
    """The videos of a split, or all where no list of the split is there.

    Raises:
        PretrainError: a folder is missing, or a video lacks frames or masks.
    """
    frames, masks = _inner(root / "JPEGImages"), _inner(root / "Annotations")
    listed = root / "ImageSets" / "2017" / f"{split}.txt"
    names = _listed(listed) if listed.is_file() else [path.name for path in sorted(frames.iterdir()) if path.is_dir()]
    if not names:
        raise PretrainError(f"{frames} holds no folder of a video.")
    return [_video(name, frames / name, masks / name) for name in names]


def score_predictions(video: Video, folder: Path) -> list[ObjectScores]:
    """Scores of each object of the first mask, over all frames but the first and the last; none of a video without such.

    A number below the largest one that the first mask lacks is no object. The published evaluation, whose masks lack none,
    would score it 1 wherever it is in neither mask.

    Raises:
        PretrainError: a prediction is missing, or has another size, or a larger number than the first mask.
    """
    masks = Masks(video.masks[0])
    objects = [number for number in np.unique(masks.read(video.masks[0])).tolist() if number]
    tally = Tally(video.name, objects)
    inner = video.masks[1:-1]
    predicted = _predictions(folder, inner)
    for reference, path in zip(inner, predicted, strict=True):
        labels = masks.read_predicted(path)
        if int(labels.max(initial=0)) > max(objects, default=0):
            most = max(objects, default=0)
            raise PretrainError(f"{path} has object {labels.max()}; expected at most {most}, as in {video.masks[0]}.")
        try:
            tally.add(masks.read(reference), labels)
        except ValueError as error:
            raise PretrainError(f"{path}: {error}.") from None
    return tally.scores()


def _listed(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PretrainError(f"the list {path} cannot be read ({error}).") from None
    return [name for line in lines if (name := line.strip())]


def _predictions(folder: Path, masks: tuple[Path, ...]) -> Iterator[Path]:
    for mask in masks:
        path = folder / f"{mask.stem}.png"
        if not path.is_file():
            raise PretrainError(f"{path} is missing; expected a mask for each frame but the first and the last.")
        yield path


def _video(name: str, frames: Path, masks: Path) -> Video:
    for folder in (frames, masks):
        if not folder.is_dir():
            raise PretrainError(f"{folder} is no folder; expected the frames and masks of the video {name}.")
    pictures = sorted(path for path in frames.iterdir() if path.suffix.lower() in SUFFIXES)
    labels = tuple(masks / f"{path.stem}.png" for path in pictures)
    missing = [path for path in labels if not path.is_file()]
    if missing or not pictures:
        raise PretrainError(f"video {name} has {len(pictures)} frames and lacks the masks of {len(missing)} of them.")
    return Video(name, tuple(pictures), labels)


def _inner(folder: Path) -> Path:
    """The folder of a resolution, 480p if there are several, or the folder itself."""
    if not folder.is_dir():
        raise PretrainError(f"{folder} is no folder; expected JPEGImages and Annotations, as in DAVIS 2017.")
    resolutions = sorted(
        path for path in folder.iterdir() if path.is_dir() and path.name.endswith("p") and path.name[:-1].isdigit()
    )
    named = [path for path in resolutions if path.name == "480p"]
    return [*named, *resolutions, folder][0]
