"""Pictures for the tasks of ``vmf-pretrain eval`` that need a folder: the bundled animals, coloured, with masks, and moving.

python -m bench.task_pictures runs/pictures

Below the folder: ``classes/`` with train and test and a sub-folder for each animal, ``masks/`` with images and masks,
``video/`` as DAVIS 2017, and ``recipe.yaml``, with which a small network learns from the training images.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vmf_pretrain.data.animals import ANIMAL_CLASSES, AnimalImages, animals
from vmf_pretrain.data.label_image import label_png

TRAIN, TEST = 100, 20  # images of each animal
SIDE = 56  # pixels of a silhouette, twice its own
SCENES = {"train": 40, "val": 20}  # images with masks
SCENE_ANIMALS = 3
VIDEOS, FRAMES = 3, 6
FRAME, STEP = (96, 128), 8  # pixels, rows and columns; and how far an animal moves from frame to frame
SEED = 0
RECIPE = """extends: animals
data: {kind: folder, batch_size: 200}
views: {global_size: 48, local_size: 24, local_count: 2}
backbone: {patch_size: 8}
"""

Mask = NDArray[np.bool_]
Pixels = NDArray[np.uint8]


def coloured(inside: Mask, numbers: np.random.Generator) -> Pixels:
    """[H, W, 3] a bright colour inside, a dark one around, and noise."""
    colours = numbers.integers(150, 250, 3), numbers.integers(10, 100, 3)
    pixels = np.where(inside[..., None], *colours) + numbers.integers(-15, 16, (*inside.shape, 3))
    return pixels.clip(0, 255).astype(np.uint8)


def silhouette(images: AnimalImages, label: int, number: int) -> Mask:
    """[SIDE, SIDE] of an animal's ``number``-th image."""
    place = int((images.labels == label).nonzero()[number, 0])
    return np.kron(images.silhouettes[place].numpy() > 1, np.ones((2, 2), bool))


def write_classes(folder: Path, numbers: np.random.Generator) -> None:
    """Training and test images of every animal; the test images are those that the demo holds out."""
    for name, images, each in zip(("train", "test"), animals(), (TRAIN, TEST), strict=True):
        for label, animal in enumerate(ANIMAL_CLASSES):
            target = folder / name / animal
            target.mkdir(parents=True)
            for number in range(each):
                picture = coloured(silhouette(images, label, number), numbers)
                Image.fromarray(picture).save(target / f"{animal}_{number:03}.png")


def write_masks(folder: Path, numbers: np.random.Generator) -> None:
    """Images of three animals, and masks: 0 around them, 1 to 3 inside."""
    for split, count in SCENES.items():
        images = animals()[split == "val"]
        for part in ("images", "masks"):
            (folder / split / part).mkdir(parents=True)
        for number in range(count):
            label = number % SCENE_ANIMALS
            inside = silhouette(images, label, number)
            Image.fromarray(coloured(inside, numbers)).save(folder / split / f"images/{number:02}.png")
            mask = np.where(inside, 1 + label, 0).astype(np.uint8)
            (folder / split / f"masks/{number:02}.png").write_bytes(label_png(mask))


def write_videos(folder: Path, numbers: np.random.Generator) -> None:
    """An animal that moves to the right over noise."""
    images = animals()[1]
    for video in range(VIDEOS):
        frames, masks = (folder / part / "480p" / ANIMAL_CLASSES[video] for part in ("JPEGImages", "Annotations"))
        frames.mkdir(parents=True)
        masks.mkdir(parents=True)
        shape, seed = silhouette(images, video, 0), int(numbers.integers(2**31))
        for frame in range(FRAMES):
            inside = np.zeros(FRAME, bool)
            inside[20 : 20 + SIDE, 4 + STEP * frame : 4 + STEP * frame + SIDE] = shape
            Image.fromarray(coloured(inside, np.random.default_rng(seed))).save(frames / f"{frame:05}.jpg")
            (masks / f"{frame:05}.png").write_bytes(label_png(inside.astype(np.uint8)))


def make(folder: Path) -> None:
    """Write all of it to a folder that does not exist yet."""
    folder.mkdir(parents=True)
    numbers = np.random.default_rng(SEED)
    write_classes(folder / "classes", numbers)
    write_masks(folder / "masks", numbers)
    write_videos(folder / "video", numbers)
    (folder / "recipe.yaml").write_text(RECIPE)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m bench.task_pictures FOLDER")
    make(Path(sys.argv[1]))
