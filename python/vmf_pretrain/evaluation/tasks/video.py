"""Objects followed through videos, as DAVIS 2017 scores them.

Legend: H x W pixels, h x w patches, F features.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.config.tasks.video import VideoTask
from vmf_pretrain.data.bad_images import UnreadableImageError
from vmf_pretrain.data.decode import decode
from vmf_pretrain.data.images import Images
from vmf_pretrain.data.label_image import label_png
from vmf_pretrain.data.plain_files import read_plain
from vmf_pretrain.evaluation.bootstrap import interval
from vmf_pretrain.evaluation.evaluated import Evaluated
from vmf_pretrain.evaluation.files import digest_of
from vmf_pretrain.evaluation.given import Given
from vmf_pretrain.evaluation.outputs import PATCHES, Kinds, outputs, precision
from vmf_pretrain.evaluation.result import Figure, Result
from vmf_pretrain.evaluation.task import Subject, Task
from vmf_pretrain.evaluation.video.davis import Video, read_videos, score_predictions
from vmf_pretrain.evaluation.video.follow import PatchFeatures, follow
from vmf_pretrain.evaluation.video.protocols import PROTOCOLS, Protocol
from vmf_pretrain.evaluation.video.statistics import ObjectScores, overall, statistics_of
from vmf_pretrain.storage.durable import temporary, write_durably

PREDICTIONS = "predictions"


class VideoObjects(Task[VideoTask]):
    """J, F and J&F of objects that are followed by the likeness of patches, or of masks that were made elsewhere.

    Source: Pont-Tuset et al., "The 2017 DAVIS challenge on video object segmentation", arXiv:1704.00675; the propagation of
    facebookresearch/dino and facebookresearch/dinov3.
    """

    name = "video"
    version = 2  # numbers that a first mask lacks are no objects

    def images(self, given: Given, settings: VideoTask) -> dict[str, Images]:
        """None: frames are read in their order, and their features are needed only for a few frames."""
        return {}

    def depends(self, given: Given, settings: VideoTask) -> dict[str, Any]:
        """Frames, masks and predictions."""
        videos = read_videos(given.folder, settings.split)
        found = {video.name: digest_of([*video.frames, *video.masks]) for video in videos}
        if settings.predictions is None:
            return {"videos": found}
        folder = Path(settings.predictions)
        return {"videos": found, PREDICTIONS: digest_of(sorted(folder.glob("*/*.png")))}

    def run(self, subject: Subject, settings: VideoTask) -> Result:
        """Means over all objects of all videos; a video whose predictions are on disk is not followed again."""
        protocol = PROTOCOLS[settings.protocol]
        videos = read_videos(subject.given.folder, settings.split)
        scores: list[ObjectScores] = []
        unscored: list[str] = []
        for video in videos:
            folder = Path(settings.predictions or subject.folder / PREDICTIONS) / video.name
            if settings.predictions is None and not folder.is_dir():
                _predict(video, folder, subject, protocol)
            found = score_predictions(video, folder)
            scores += found
            unscored += [] if found else [video.name]
        if not scores:
            raise PretrainError(f"no video of {subject.given.folder} has an object and a frame between first and last.")
        notes = [_made_by(settings, protocol), "First and last frames do not count; means are over objects."]
        notes += [f"Without an object or an inner frame, so without scores: {', '.join(unscored)}."] if unscored else []
        return Result(
            _figures(scores),
            [_row(score) for score in scores],
            notes=notes,
            facts={"videos": len(videos), "objects": len(scores)},
        )


def _predict(video: Video, folder: Path, subject: Subject, protocol: Protocol) -> None:
    """Write the masks of a video: all or none."""
    patches, patch = patch_features(subject.evaluated, subject.dtype)
    frames = (_frame(path) for path in video.frames)
    folder.parent.mkdir(exist_ok=True)
    try:
        with temporary(folder.with_name(f".tmp-{folder.name}")) as unfinished:
            unfinished.mkdir()
            masks = follow(frames, video.first_mask(), patches, patch, protocol)
            for path, mask in zip(video.frames, masks, strict=True):
                write_durably(unfinished / f"{path.stem}.png", label_png(mask))
            os.replace(unfinished, folder)
    except ValueError as error:
        raise PretrainError(f"video {video.name}: {error}.") from None
    except OSError as error:
        raise PretrainError(f"{folder} cannot be written ({error.strerror or error}).") from None


def patch_features(evaluated: Evaluated, computed: torch.dtype) -> tuple[PatchFeatures, int]:
    """From [3, height, width] pixels in [0, 1] to [h, w, F] features on the network's device, and the side of a patch.

    Features are computed and rounded in one of DTYPES, and fp32 from there on.

    Raises:
        PretrainError: the network is no vision transformer of square patches.
    """
    sides = getattr(getattr(evaluated.network, "patch_embed", None), "patch_size", (0, 1))
    if sides[0] != sides[1]:
        raise PretrainError(f"{evaluated.name} has no square patches; expected a vision transformer.")
    dtype = next(evaluated.network.parameters()).dtype

    @torch.no_grad()
    def patches(pixels: Tensor) -> Tensor:
        inputs = evaluated.fed.of(pixels[None].to(evaluated.device)).to(dtype)
        with precision(evaluated.device, computed):
            found = outputs(evaluated.network, inputs, Kinds(parts=frozenset({PATCHES})))[PATCHES][0]
        return found.to(computed).float()

    return patches, int(sides[0])


def _frame(path: Path) -> Tensor:
    try:
        return decode(read_plain(path))
    except OSError as error:
        raise PretrainError(f"{path} cannot be read ({error.strerror}).") from None
    except UnreadableImageError as error:
        raise PretrainError(f"{path} cannot be read ({error}); a video needs all of its frames.") from None


def _figures(scores: list[ObjectScores]) -> list[Figure]:
    found = overall(scores)
    means = {
        "j_mean": np.array([score.region.mean() for score in scores]),
        "f_mean": np.array([score.contour.mean() for score in scores]),
    }
    means["j&f"] = (means["j_mean"] + means["f_mean"]) / 2
    names = {"j": "J", "f": "F"}
    figures = []
    for key, value in found.items():
        letter, _, statistic = key.partition("_")
        name = f"{names[letter]}, {statistic}" if statistic else "J&F"
        bounds = (
            interval(lambda places, key=key: float(100 * means[key][places].mean()), len(scores))  # type: ignore[misc]
            if key in means
            else (None, None)
        )
        figures.append(Figure(name, value, *bounds))
    return figures


def _row(score: ObjectScores) -> dict[str, Any]:
    columns = {"J": statistics_of(score.region), "F": statistics_of(score.contour)}
    numbers = {f"{m} {n}": v for m, found in columns.items() for n, v in found._asdict().items()}
    return {"video": score.video, "object": score.object, "frames": len(score.region), **numbers}


def _made_by(settings: VideoTask, protocol: Protocol) -> str:
    if settings.predictions is not None:
        return f"Masks of {settings.predictions}, not of the network."
    rule = protocol.propagation
    return (
        f"Labels spread as {protocol.name} publishes it: {rule.neighbours} nearest patches of the first and the last "
        f"{protocol.earlier} frames, temperature {rule.temperature:g}, at most {rule.reach.rows} patches away."
    )
