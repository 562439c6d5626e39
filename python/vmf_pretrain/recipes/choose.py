"""Which recipe fits a machine and its images, what is changed in it, and why, in two lines."""

from dataclasses import dataclass
from typing import Any

from vmf_pretrain.recipes.machine import Machine, Photos

GIB = 1 << 30
# images that a core of a CPU takes in a minute with small_photos: 480 a minute of one core's time on an AMD EPYC 7003 (files of
# 640 x 480 pixels), less what a machine with other work leaves
IMAGES_A_MINUTE = 300
MINUTES = 45  # that a run on a CPU may take
EPOCHS = (2, 200)  # fewest and most on a CPU
# DINO's issue 96: 14.0 GB for 64 images of 10 views at 224 and 96 pixels, ViT-S/16, 65,536 prototypes, fp16
IMAGES_A_GIB = 64 / 13.0
LARGEST_BATCH = 256
SMALLEST_BATCH = 8
# median shorter side in pixels: sides of global and local views, side of a patch; 64 patches where the images are small
SIZES = ((40, 32, 16, 4), (96, 64, 32, 8), (160, 96, 48, 8))
SIZE_OF_PHOTOS = {"small_photos": (64, 32, 8), "imagefolder_vits16": (224, 96, 16)}
# images, and epochs with which about as many are seen as published runs on few images do
EPOCHS_ON_GPU = ((10_000, 800), (50_000, 400), (200_000, 200))
PUBLISHED_EPOCHS = 100
HELD_OUT = 0.1  # share of labelled images, data.held_out
MOST_WORKERS = 10
# the teacher of imagefolder_vits16 averages over 2,000 steps; a run of fewer than ten times as many gets DINO's default
SLOW_TEACHER_STEPS = 20_000
QUICK_TEACHER = 0.996


@dataclass(frozen=True)
class Asked:
    """What a person has fixed already, and the rest has to go with; None where nothing.

    Attributes:
        batch_size: images per optimizer step.
        epochs: passes over the images.
    """

    batch_size: int | None = None
    epochs: int | None = None


@dataclass(frozen=True)
class Choice:
    """A recipe and what is changed in it.

    Attributes:
        recipe: its name.
        fields: dotted names and their values.
        reason: two lines for the person who gave only a folder.
    """

    recipe: str
    fields: dict[str, Any]
    reason: tuple[str, str]


def choose(machine: Machine, photos: Photos, asked: Asked | None = None) -> Choice:
    """The recipe for a machine and its images.

    A CPU gets ``small_photos``, as many epochs as fit into 45 minutes; a GPU ``imagefolder_vits16``, with the published number
    of epochs for many images and more for few. Views are as small as the images; the batch is as large as memory allows.
    """
    asked = asked or Asked()
    recipe = "imagefolder_vits16" if machine.device == "cuda" else "small_photos"
    batch, parts = _batch(recipe, machine, photos, asked)
    epochs = asked.epochs or _epochs(machine, photos)
    large, small, patch = _sizes(recipe, photos)
    fields: dict[str, Any] = {
        "data.kind": photos.kind,
        "data.batch_size": batch,
        "data.workers": _workers(machine),
        "views.global_size": large,
        "views.local_size": small,
        "backbone.patch_size": patch,
        "loss.warmup_teacher_temp_epochs": min(30 if machine.device == "cuda" else 5, epochs // 3),
        "optim.warmup_epochs": max(1, min(10, epochs // 10)),
        "optim.freeze_last_layer_epochs": min(1, epochs - 1),
        "train.epochs": epochs,
        "train.accumulate": parts,
        "train.checkpoint_every": max(1, epochs // 20),
        "evaluate.every": max(1, epochs // 10),
    }
    if machine.device == "cuda" and epochs * photos.count < SLOW_TEACHER_STEPS * batch:
        fields["optim.teacher_momentum"] = QUICK_TEACHER
    return Choice(recipe, fields, _reason(recipe, machine, photos, fields))


def _batch(recipe: str, machine: Machine, photos: Photos, asked: Asked) -> tuple[int, int]:
    """Images of a batch over all ranks, and the parts it is computed in so that a part fits into memory."""
    fitting = max(1, int((machine.memory / GIB - 1) * IMAGES_A_GIB)) if machine.device == "cuda" else 64
    share = _power_of_two(fitting)
    if asked.batch_size is not None:
        batch = asked.batch_size
    else:
        there = max(2, int(photos.count * (1 - HELD_OUT)))
        wanted = 64 if machine.device == "cpu" else max(64, min(LARGEST_BATCH, share * machine.ranks))
        batch = min(wanted, _power_of_two(there))
        batch = max(machine.ranks, batch - batch % machine.ranks)
    parts = 1
    while batch / (parts * machine.ranks) > share and batch % (2 * parts * machine.ranks) == 0:
        parts *= 2
    return batch, parts


def _epochs(machine: Machine, photos: Photos) -> int:
    if machine.device == "cuda":
        return next((epochs for most, epochs in EPOCHS_ON_GPU if photos.count < most), PUBLISHED_EPOCHS)
    fewest, most = EPOCHS
    return max(fewest, min(most, round(IMAGES_A_MINUTE * machine.cores * MINUTES / photos.count)))


def _sizes(recipe: str, photos: Photos) -> tuple[int, int, int]:
    """Sides of global views, local views and patches, pixels."""
    if photos.side is not None:
        for most, *sizes in SIZES:
            if photos.side <= most and sizes[0] <= SIZE_OF_PHOTOS[recipe][0]:
                return sizes[0], sizes[1], sizes[2]
    return SIZE_OF_PHOTOS[recipe]


def _workers(machine: Machine) -> int:
    """One core stays with each rank; on a CPU the network needs them all, and decoding small views needs one."""
    if machine.device == "cpu":
        return min(2, machine.cores // 2)
    return max(1, min(MOST_WORKERS, machine.cores // machine.ranks - 1))


def _power_of_two(most: int) -> int:
    """The largest power of two up to ``most``, which is at least 1."""
    return 1 << (most.bit_length() - 1)


def _reason(recipe: str, machine: Machine, photos: Photos, fields: dict[str, Any]) -> tuple[str, str]:
    """Which and why; what to type for another."""
    where = "no GPU here" if machine.device == "cpu" else f"a GPU with {machine.memory / GIB:.0f} GiB"
    size = "" if photos.side is None else f" of {photos.side} pixels (median shorter side)"
    epochs, batch, side = fields["train.epochs"], fields["data.batch_size"], fields["views.global_size"]
    if machine.device == "cpu":
        minutes = max(1, round(epochs * photos.count / (IMAGES_A_MINUTE * machine.cores)))
        length = f"about {f'{minutes} min' if minutes < 120 else f'{minutes // 60} h'}, cores: {machine.cores}"
    else:
        length = "the published number" if epochs == PUBLISHED_EPOCHS else "few images need many"
    return (
        f"Recipe {recipe}: {where}, and {photos.count:,} images{size}.",
        f"{epochs} epochs ({length}), batch {batch}, views of {side} pixels; "
        "vmf-pretrain recipes lists others, --print-config shows all settings.",
    )
