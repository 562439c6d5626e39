"""Which recipe fits a machine and its images, what is changed in it, and why, in two lines."""

from dataclasses import dataclass
from typing import Any

from vmf_pretrain.config.method import VMF
from vmf_pretrain.recipes.machine import Machine, Photos
from vmf_pretrain.recipes.table import photo_recipe

GIB = 1 << 30
# images that a core of a CPU takes in a minute with the small recipes: 480 (dino-vmf), 490, 600, 1,900 and 3,200 of one core's
# time on an AMD EPYC 7003 (files of 640 x 480 pixels), less what a machine with other work leaves
IMAGES_A_MINUTE = {"dino": 300, "ibot": 300, "dinov2": 375, "ijepa": 1200, "mae": 2000}
MINUTES = 45  # that a run on a CPU may take
EPOCHS = (2, 200)  # fewest and most on a CPU
# DINO's issue 96: 14.0 GB for 64 images of 10 views at 224 and 96 pixels, ViT-S/16, 65,536 prototypes, fp16
IMAGES_A_GIB = 64 / 13.0
# not measured: of one view without local ones, a network computes a third of the tokens at most
ONE_VIEW = {"mae": 3, "ijepa": 3}
LARGEST_BATCH = 256
SMALLEST_BATCH = 8
# median shorter side in pixels: sides of global and local views, side of a patch; 64 patches where the images are small
SIZES = ((40, 32, 16, 4), (96, 64, 32, 8), (160, 96, 48, 8))
SIZE_OF_PHOTOS = {"cpu": (64, 32, 8), "cuda": (224, 96, 16)}
SMALL = 40  # pixels of a shorter side up to which a GPU takes the recipes for CIFAR
# as in small_ijepa: published blocks never reach the last row and column of the grid, and fewer patches leave less to see
SHORT_GRID = 14  # patches a side, the grid of 224 pixels
ON_SHORT_GRIDS = {"ijepa": {"blocks.edges": "fixed", "blocks.min_keep": 4}}
# images, and epochs with which about as many are seen as published runs on few images do
EPOCHS_ON_GPU = ((10_000, 800), (50_000, 400), (200_000, 200))
PUBLISHED_EPOCHS = {"mae": 800, "ijepa": 300}  # mae_vitb16, ijepa_vith14
USUAL_EPOCHS = 100  # of the others
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
        method: what is trained.
        view_size: side of a global view, pixels.
    """

    batch_size: int | None = None
    epochs: int | None = None
    method: str | None = None
    view_size: int | None = None

    @property
    def family(self) -> str:
        """The method without concentrations; "dino" where none is given or it is a person's own."""
        family = (self.method or "").removesuffix(VMF)
        return family if family in IMAGES_A_MINUTE else "dino"


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
    """The recipe for a machine, its images and a method.

    A CPU gets ``small_photos``, as many epochs as fit into 45 minutes; a GPU ``imagefolder_vits16``, with the published number
    of epochs for many images and more for few. Methods other than DINO get their own recipe for such a machine. Views are as
    small as the images; the batch is as large as memory allows.
    """
    asked = asked or Asked()
    recipe = photo_recipe(machine.device, asked.family, small=photos.side is not None and photos.side <= SMALL)
    batch, parts = _batch(machine, photos, asked)
    epochs = asked.epochs or _epochs(machine, photos, asked.family)
    large, small, patch = _sizes(machine, photos)
    large = asked.view_size or large
    fields: dict[str, Any] = {
        "data.kind": photos.kind,
        "data.batch_size": batch,
        "data.workers": _workers(machine),
        "views.global_size": large,
        "views.local_size": small,
        "backbone.patch_size": patch,
        "optim.warmup_epochs": max(1, min(10, epochs // 10)),
        "train.epochs": epochs,
        "train.accumulate": parts,
        "train.checkpoint_every": max(1, epochs // 20),
        "evaluate.every": max(1, epochs // 10),
    }
    if asked.family not in ONE_VIEW:  # those have no prototypes, either
        fields["loss.warmup_teacher_temp_epochs"] = min(30 if machine.device == "cuda" else 5, epochs // 3)
        fields["optim.freeze_last_layer_epochs"] = min(1, epochs - 1)
    if large < SHORT_GRID * patch:
        fields |= ON_SHORT_GRIDS.get(asked.family, {})
    if recipe == "imagefolder_vits16" and epochs * photos.count < SLOW_TEACHER_STEPS * batch:
        fields["optim.teacher_momentum"] = QUICK_TEACHER
    return Choice(recipe, fields, _reason(recipe, machine, photos, fields, asked.family))


def _batch(machine: Machine, photos: Photos, asked: Asked) -> tuple[int, int]:
    """Images of a batch over all ranks, and the parts it is computed in so that a part fits into memory."""
    a_gib = IMAGES_A_GIB * ONE_VIEW.get(asked.family, 1)
    fitting = max(1, int((machine.memory / GIB - 1) * a_gib)) if machine.device == "cuda" else 64
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


def _epochs(machine: Machine, photos: Photos, family: str) -> int:
    if machine.device == "cuda":
        published = PUBLISHED_EPOCHS.get(family, USUAL_EPOCHS)
        return max(published, next((epochs for most, epochs in EPOCHS_ON_GPU if photos.count < most), 0))
    fewest, most = EPOCHS
    return max(fewest, min(most, round(IMAGES_A_MINUTE[family] * machine.cores * MINUTES / photos.count)))


def _sizes(machine: Machine, photos: Photos) -> tuple[int, int, int]:
    """Sides of global views, local views and patches, pixels."""
    largest = SIZE_OF_PHOTOS[machine.device]
    if photos.side is not None:
        for most, *sizes in SIZES:
            if photos.side <= most and sizes[0] <= largest[0]:
                return sizes[0], sizes[1], sizes[2]
    return largest


def _workers(machine: Machine) -> int:
    """One core stays with each rank; on a CPU the network needs them all, and decoding small views needs one."""
    if machine.device == "cpu":
        return min(2, machine.cores // 2)
    return max(1, min(MOST_WORKERS, machine.cores // machine.ranks - 1))


def _power_of_two(most: int) -> int:
    """The largest power of two up to ``most``, which is at least 1."""
    return 1 << (most.bit_length() - 1)


def _reason(recipe: str, machine: Machine, photos: Photos, fields: dict[str, Any], family: str) -> tuple[str, str]:
    """Which and why; what to type for another."""
    where = "no GPU here" if machine.device == "cpu" else f"a GPU with {machine.memory / GIB:.0f} GiB"
    size = "" if photos.side is None else f" of {photos.side} pixels (median shorter side)"
    epochs, batch, side = fields["train.epochs"], fields["data.batch_size"], fields["views.global_size"]
    if machine.device == "cpu":
        minutes = max(1, round(epochs * photos.count / (IMAGES_A_MINUTE[family] * machine.cores)))
        length = f"about {f'{minutes} min' if minutes < 120 else f'{minutes // 60} h'}, cores: {machine.cores}"
    else:
        published = PUBLISHED_EPOCHS.get(family, USUAL_EPOCHS)
        length = "the published number" if epochs == published else "few images need many"
    return (
        f"Recipe {recipe}: {where}, and {photos.count:,} images{size}.",
        f"{epochs} epochs ({length}), batch {batch}, views of {side} pixels; "
        "vmf-pretrain recipes lists others, --print-config shows all settings.",
    )
