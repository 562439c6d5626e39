"""The images of a run: the bundled digits, or a folder.

Legend: N images, S side of the canvas, C channels.
"""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from sklearn.datasets import load_digits
from torch import Tensor
from torchvision.transforms.v2 import functional

from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.config.run import Config
from vmf_pretrain.config.views import DIGIT_CANVAS
from vmf_pretrain.data.digit_views import DIGIT_SIDE, ink_middles
from vmf_pretrain.data.randomness import PLACEMENT, generator_for

SIXTEEN_BIT = 257.0  # 65,535 / 255
FULL_INK = 16.0  # largest value of scikit-learn's digits
TRAIN_DIGITS = 1297  # the other 500 are held out
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
BOMBS = (Image.DecompressionBombError, Image.DecompressionBombWarning)  # more pixels than any photograph has
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
SPLIT_SEED = 0  # of splits and placements; not the run's seed, so that all runs are compared on the same data


@dataclass(frozen=True)
class DigitImages:
    """Handwritten digits, each at a random place of a canvas."""

    canvases: Tensor  # [N, S, S] ink in [0, 1]
    middles: Tensor  # [N, 2] middle of the ink, pixels from the canvas's middle
    labels: Tensor  # [N] int64

    def __len__(self) -> int:
        return len(self.canvases)

    def evaluation_pixels(self, indices: list[int]) -> Tensor:
        """[B, 1, S, S] in [0, 1]: the canvases."""
        return self.canvases[indices].unsqueeze(1)

    def subset(self, indices: Tensor) -> "DigitImages":
        """Some of the images."""
        return DigitImages(self.canvases[indices], self.middles[indices], self.labels[indices])


@dataclass(frozen=True)
class FolderImages:
    """Image files, decoded when they are needed."""

    paths: list[Path]
    labels: Tensor | None  # [N] int64 classes by sub-folder, None where there are none
    size: int  # side of an evaluation image, pixels

    def __len__(self) -> int:
        return len(self.paths)

    def decode(self, index: int) -> Tensor:
        """[3, height, width] float32 in [0, 1].

        Raises:
            PretrainError: the file is not a readable image; names it.
        """
        path = self.paths[index]
        try:
            with warnings.catch_warnings(), Image.open(path, formats=FORMATS) as image:
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                rgb = _eight_bit(ImageOps.exif_transpose(image)).convert("RGB")
        except (OSError, UnidentifiedImageError, *BOMBS, SyntaxError, ValueError) as error:
            raise PretrainError(f"image {path} cannot be read ({error}); mend or remove it.") from None
        pixels: Tensor = functional.to_dtype(functional.pil_to_tensor(rgb), torch.float32, scale=True)
        return pixels

    def evaluation_pixels(self, indices: list[int]) -> Tensor:
        """[B, 3, size, size] in [0, 1]: resized by the shorter side to 8/7 of ``size``, centre-cropped."""
        resized = (functional.resize(self.decode(index), [self.size * 8 // 7], antialias=True) for index in indices)
        return torch.stack([functional.center_crop(image, [self.size, self.size]) for image in resized])

    def subset(self, indices: Tensor) -> "FolderImages":
        """Some of the images."""
        labels = None if self.labels is None else self.labels[indices]
        return FolderImages([self.paths[index] for index in indices.tolist()], labels, self.size)


Images = DigitImages | FolderImages
SomeImages = TypeVar("SomeImages", DigitImages, FolderImages)


def _eight_bit(image: Image.Image) -> Image.Image:
    """A 16-bit grayscale image scaled to 8 bits, because ``convert`` would clip it to white; other images unchanged."""
    if not image.mode.startswith("I"):
        return image
    return Image.fromarray((np.asarray(image).astype(np.float64) / SIXTEEN_BIT).clip(0, 255).round().astype(np.uint8))


def digits() -> tuple[DigitImages, DigitImages]:
    """Training and held-out digits; the split and the place of each digit never change."""
    bundled = load_digits()
    ink = torch.from_numpy((bundled.images / FULL_INK).astype(np.float32))
    free = DIGIT_CANVAS - DIGIT_SIDE + 1
    corners = torch.randint(free, (len(ink), 2), generator=generator_for(SPLIT_SEED, PLACEMENT)).tolist()
    canvases = torch.zeros(len(ink), DIGIT_CANVAS, DIGIT_CANVAS)
    for canvas, digit, (top, left) in zip(canvases, ink, corners, strict=True):
        canvas[top : top + DIGIT_SIDE, left : left + DIGIT_SIDE] = digit
    everything = DigitImages(canvases, ink_middles(canvases), torch.from_numpy(bundled.target).long())
    return _split(everything, len(ink) - TRAIN_DIGITS)


def folder_images(folder: Path, size: int, held_out: float) -> tuple[FolderImages, FolderImages | None]:
    """Training images of a folder, searched recursively; also held-out images, if sub-folders name classes.

    Raises:
        PretrainError: the folder does not exist or holds no image.
    """
    if not folder.is_dir():
        raise PretrainError(f"data.folder {folder} is not a folder; expected one with images.")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not paths:
        raise PretrainError(f"data.folder {folder} holds no image; expected files ending in {', '.join(SUFFIXES)}.")
    classes = sorted({path.relative_to(folder).parts[0] for path in paths if path.parent != folder})
    labelled = len(classes) > 1 and all(path.parent != folder for path in paths)
    if not labelled:
        return FolderImages(paths, None, size), None
    labels = torch.tensor([classes.index(path.relative_to(folder).parts[0]) for path in paths])
    train, kept = _split(FolderImages(paths, labels, size), max(1, round(held_out * len(paths))))
    return train, kept


def _split(images: SomeImages, held_out: int) -> tuple[SomeImages, SomeImages]:
    order = torch.randperm(len(images), generator=generator_for(SPLIT_SEED, PLACEMENT, 1))
    return images.subset(order[held_out:].sort().values), images.subset(order[:held_out].sort().values)


def load_images(config: Config) -> tuple[Images, Images | None]:
    """Training and held-out images of a configuration."""
    if config.data.kind == "digits":
        return digits()
    return folder_images(Path(str(config.data.folder)), config.views.global_size, config.data.held_out)


def names_of(images: Images) -> list[str] | None:
    """What the data set calls each image; None if they have numbers only."""
    return None if isinstance(images, DigitImages) else [str(path) for path in images.paths]
