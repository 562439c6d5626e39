"""The bundled silhouettes of ten animals, each at a place and in a size of its own; README.md of this folder has their source.

Legend: N images, B of them, s side of a silhouette, S side of the canvas.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from vmf_pretrain.config.views import CANVASES, AnimalViewConfig, DigitViewConfig, ViewsConfig
from vmf_pretrain.data.bundled import Drawings
from vmf_pretrain.data.images import SPLIT_SEED, fingerprint
from vmf_pretrain.data.placed_views import Placed, affine_views, draw
from vmf_pretrain.data.randomness import PLACEMENT

FILE = Path(__file__).parent / "animals.npz"
ANIMAL_CLASSES = ("bear", "bird", "cat", "cow", "dog", "elephant", "giraffe", "horse", "sheep", "zebra")
ANIMAL_CANVAS = CANVASES["animals"]
ANIMAL_SIDE = 28  # pixels of a silhouette
SHIFTS = np.array([6, 4, 2, 0], np.uint8)  # a byte of the file holds four pixels, the left one in the highest bits
WHITE = 3  # largest of the four levels of gray
# sizes and places of evaluated images; they do not follow a run's own settings, so that all runs are compared on the same
EVALUATED = AnimalViewConfig(global_zoom=(0.6, 1.0), rotation=0.0, gain=0.0, noise=0.0)


@dataclass(frozen=True, eq=False)
class AnimalImages(Drawings):
    """Silhouettes, put on a canvas when they are needed."""

    silhouettes: Tensor  # [N, s, s] uint8, levels of gray up to WHITE
    numbers: Tensor  # [N] int64, the place in the file, by which size and place of an evaluated image are drawn
    labels: Tensor  # [N] int64

    def __len__(self) -> int:
        return len(self.silhouettes)

    def name(self, index: int) -> str:
        """The animal and its place in the file."""
        return f"{ANIMAL_CLASSES[int(self.labels[index])]} {int(self.numbers[index])}"

    def decode(self, index: int, pixels: int | None = None) -> Tensor:
        """[1, S, S] float32 in [0, 1]; it is never reduced."""
        return self.placed([index]).canvases

    def evaluation_pixels(self, indices: Sequence[int]) -> Tensor:
        """[B, 1, S, S] in [0, 1]: each in its size and at its place, which never change."""
        numbers = self.numbers[list(indices)].tolist()
        uniform, _, _ = draw(SPLIT_SEED, 0, numbers, 0, 1, use=PLACEMENT)
        return affine_views(self.placed(indices), uniform, EVALUATED, ANIMAL_CANVAS).unsqueeze(1)

    def viewed(self, index: int, view: Callable[[Tensor], Tensor]) -> Tensor:
        """[1, S, S] as ``evaluation_pixels``, whatever the view."""
        return self.evaluation_pixels([index])[0]

    def placed(self, indices: Sequence[int]) -> Placed:
        """The silhouettes in the middle of their canvases, in their own size."""
        margin = (ANIMAL_CANVAS - ANIMAL_SIDE) // 2
        canvases = pad(self.silhouettes[list(indices)].float() / WHITE, (margin,) * 4)
        return Placed(canvases, torch.zeros(len(canvases), 2), ANIMAL_SIDE)

    def view_config(self, views: ViewsConfig) -> DigitViewConfig:
        """That of animals."""
        return views.animals

    def subset(self, indices: Tensor) -> "AnimalImages":
        """Some of the images."""
        return AnimalImages(self.silhouettes[indices], self.numbers[indices], self.labels[indices])

    def facts(self) -> dict[str, Any]:
        """The fingerprint; the name of a silhouette is a hash of its pixels."""
        rows = self.silhouettes.flatten(1).numpy()
        return fingerprint((hashlib.sha256(row.tobytes()).hexdigest(), row.nbytes) for row in rows)


def animals() -> tuple[AnimalImages, AnimalImages]:
    """Training and held-out silhouettes, as the file divides them."""
    with np.load(FILE, allow_pickle=False) as file:
        packed, labels, held_out = (file[name] for name in ("pixels", "labels", "held_out"))
    everything = AnimalImages(
        torch.from_numpy(_unpacked(packed)), torch.arange(len(packed)), torch.from_numpy(labels).long()
    )
    kept = torch.from_numpy(held_out)
    return everything.subset((~kept).nonzero().squeeze(1)), everything.subset(kept.nonzero().squeeze(1))


def _unpacked(packed: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """[N, s, s] levels of gray."""
    levels: NDArray[np.uint8] = (packed[..., None] >> SHIFTS & WHITE).astype(np.uint8)
    return levels.reshape(-1, ANIMAL_SIDE, ANIMAL_SIDE)
