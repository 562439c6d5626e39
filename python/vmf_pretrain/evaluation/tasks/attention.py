"""Attention of the class token: pictures, and how a head's most attended patches overlap with given masks.

Legend: N images, H heads, h x w patches, s side of the square that the network sees.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode, functional

from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.config.tasks.attention import AttentionTask
from vmf_pretrain.data.bad_images import UnreadableImageError
from vmf_pretrain.data.decode import decode
from vmf_pretrain.data.folder import FolderSource
from vmf_pretrain.data.images import Images
from vmf_pretrain.data.photos import OURS
from vmf_pretrain.data.plain_files import read_plain
from vmf_pretrain.evaluation.attended import enlarged, most_attended, overlap
from vmf_pretrain.evaluation.attention import attention_maps
from vmf_pretrain.evaluation.bootstrap import mean_interval
from vmf_pretrain.evaluation.given import Given
from vmf_pretrain.evaluation.outputs import precision
from vmf_pretrain.evaluation.pictures import plot_pictures
from vmf_pretrain.evaluation.result import Figure, Result
from vmf_pretrain.evaluation.shown import pixels, readable
from vmf_pretrain.evaluation.task import Subject, Task
from vmf_pretrain.evaluation.views import CentreSquare

DRAWN_HEADS = 6  # columns of a picture that can still be read


class Attention(Task[AttentionTask]):
    """Needs a class token and plain attention; images of one size when viewed."""

    name = "attention"

    def images(self, given: Given, settings: AttentionTask) -> dict[str, Images]:
        """All of them."""
        return {"all": given.all}

    def depends(self, given: Given, settings: AttentionTask) -> dict[str, Any]:
        """The masks."""
        found = {} if settings.masks is None else _masks_in(Path(settings.masks))
        return {"masks": {name: _digest(path) for name, path in sorted(found.items())}}

    def run(self, subject: Subject, settings: AttentionTask) -> Result:
        """A picture; with masks, also the overlap of each head's mask with them."""
        images, size = subject.images["all"], subject.evaluated.fed.size
        view = CentreSquare(size, round(size * settings.resize))
        seen = readable(images, settings.shown, view)
        maps = _maps(subject, seen)
        columns = _columns(seen, maps, settings.mass)
        mean = float(maps.flatten(2).sum(dim=2).mean())
        figures = [Figure("attention on patches", 100 * mean)]
        rows: list[dict[str, Any]] = []
        notes = ["The rest of the attention is on the class token and registers."]
        if settings.masks is not None:
            found, rows, said = _overlaps(subject, settings, view)
            figures, notes = found + figures, [*said, *notes]
        return Result(figures, rows, {"attention": lambda path: plot_pictures(columns, path)}, notes)


def _maps(subject: Subject, seen: Tensor) -> Tensor:
    """[N, H, h, w]."""
    with precision(subject.evaluated.device, subject.dtype):
        return attention_maps(subject.evaluated.network, subject.evaluated.fed.of(seen))


def _columns(seen: Tensor, maps: Tensor, mass: float) -> dict[str, Tensor]:
    """Pictures by title; each map is scaled by its own largest value."""
    bright = maps / maps.amax(dim=(2, 3), keepdim=True).clamp(min=torch.finfo(maps.dtype).tiny)
    covered = enlarged(most_attended(maps.mean(dim=1), mass), (seen.shape[2], seen.shape[3]))
    heads = {f"head {head}": bright[:, head, None] for head in range(min(DRAWN_HEADS, maps.shape[1]))}
    return {"image": seen, **heads, f"{100 * mass:.0f} % of the mean": seen * (0.25 + 0.75 * covered[:, None])}


def _overlaps(
    subject: Subject, settings: AttentionTask, view: CentreSquare
) -> tuple[list[Figure], list[dict[str, Any]], list[str]]:
    """Figures, a row for each image that has a mask, and notes."""
    images, masks = subject.images["all"], _masks_in(Path(str(settings.masks)))
    rows: list[dict[str, Any]] = []
    left: dict[str, int] = {"has no mask": 0, "cannot be read": 0, "has an empty mask": 0}
    for place in range(len(images)):
        name = images.name(place)
        path = masks.get(str(Path(name).with_suffix("")))
        if path is None:
            left["has no mask"] += 1
            continue
        try:
            seen, mask = pixels(images, [place], view), _square(decode(_read(path), None), view)
        except UnreadableImageError:
            left["cannot be read"] += 1
            continue
        if not bool(mask.any()):
            left["has an empty mask"] += 1
            continue
        maps = _maps(subject, seen)[0]
        all_of_them = most_attended(torch.cat([maps, maps.mean(dim=0, keepdim=True)]), settings.mass)
        found = overlap(enlarged(all_of_them, (view.size, view.size)), mask).tolist()
        heads = {f"head {head}": value for head, value in enumerate(found[:-1])}
        rows.append({"image": name, **heads, "best head": max(found[:-1]), "mean of heads": found[-1]})
    if not rows:
        raise PretrainError(_nothing(str(settings.masks), left))
    notes = [
        "The best head of each image is chosen by the overlap that is reported, as published: an upper bound.",
        *(f"{count} images are left out: each {why}." for why, count in left.items() if count),
    ]
    return _figures(rows), rows, notes


def _figures(rows: list[dict[str, Any]]) -> list[Figure]:
    heads = [name for name in rows[0] if name.startswith("head ")]
    best = max(heads, key=lambda name: float(np.mean([row[name] for row in rows])))
    figures = []
    for title, column in (("best head of each image", "best head"), (f"one {best}", best), ("mean of heads",) * 2):
        values = 100 * np.array([row[column] for row in rows])
        figures.append(Figure(f"IoU, {title}", float(values.mean()), *mean_interval(values)))
    return figures


def _nothing(folder: str, left: Mapping[str, int]) -> str:
    """Why no image is compared with a mask of the folder."""
    if not left["cannot be read"] + left["has an empty mask"]:
        return f"no image has a mask in {folder}; expected files by the same relative paths."
    counts = ", ".join(f"{count} {why}" for why, count in left.items() if count)
    return f"no image can be compared with its mask in {folder}; of the images, {counts}."


def _read(path: Path) -> bytes:
    """The bytes of a mask.

    Raises:
        UnreadableImageError: it is no plain file, the disk does not give them, or nobody may read them.
        PretrainError: the process has too many files open.
    """
    try:
        return read_plain(path)
    except OSError as error:
        if error.errno in OURS:
            raise PretrainError(f"{error.strerror} at {path}; raise the limit with ulimit -n.") from None
        raise UnreadableImageError(f"{type(error).__name__}: {error.strerror or error}") from None


def _digest(path: Path) -> str | None:
    """SHA-256 of a mask; None for one that cannot be read, so that it is looked at again once it can."""
    try:
        return hashlib.sha256(_read(path)).hexdigest()
    except UnreadableImageError:
        return None


def _masks_in(folder: Path) -> dict[str, Path]:
    """Paths by relative name without its ending."""
    names = FolderSource(folder, setting="attention.masks").names
    return {str(Path(name).with_suffix("")): folder / name for name in names}


def _square(mask: Tensor, view: CentreSquare) -> Tensor:
    """[s, s] bool: a decoded mask [3, height, width] as the view cuts its image."""
    resized = functional.resize(mask, [view.shorter], InterpolationMode.NEAREST_EXACT)
    square: Tensor = functional.center_crop(resized, [view.size, view.size])
    return square.amax(dim=0) > 0
