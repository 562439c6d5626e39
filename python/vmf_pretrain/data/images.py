"""What a run needs of its images, wherever they come from, and which of them are held out."""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, Self, TypeVar

import torch
from torch import Tensor

from vmf_pretrain.data.randomness import PLACEMENT, generator_for

SPLIT_SEED = 0  # of splits and placements; not the run's seed, so that all runs are compared on the same data


class Images(Protocol):
    """Images by number.

    Legend: N images, B of them, C channels.
    """

    @property
    def labels(self) -> Tensor | None:
        """[N] int64 classes, or None."""
        ...

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What a person finds the image by."""
        ...

    def decode(self, index: int, pixels: int | None = None) -> Tensor:
        """[C, height, width] of one image; ``pixels`` is the least number that an image may be reduced to.

        Raises:
            UnreadableImageError: the image is damaged.
        """
        ...

    def evaluation_pixels(self, indices: Sequence[int]) -> Tensor:
        """[B, C, size, size] in [0, 1]."""
        ...

    def viewed(self, index: int, view: Callable[[Tensor], Tensor]) -> Tensor:
        """[C, h, w] uint8, or floating in [0, 1], of one image.

        Args:
            index: of the image.
            view: from uint8 [3, H, W] of a photograph to what is evaluated of it; digits and clips have one view and ignore it.

        Raises:
            UnreadableImageError: the image is damaged.
        """
        ...

    def subset(self, indices: Tensor) -> Self:
        """Some of the images, in that order."""
        ...

    def facts(self) -> dict[str, Any]:
        """The fingerprint: ``images`` and ``names_and_sizes``, a SHA-256."""
        ...


@dataclass(frozen=True)
class Found:
    """What was found where the images of a run were looked for.

    Attributes:
        where: the place, for people.
        images: all of them, held-out ones included.
        classes: names of the classes, none without labels.
        held_out: images held out.
        skipped: how many things were skipped, by what they are.
        notes: sentences on what a person should know.
        facts: the fingerprint of the images and of the split.
    """

    where: str
    images: int
    classes: Sequence[str]
    held_out: int
    skipped: Mapping[str, int] = field(default_factory=dict)
    notes: Sequence[str] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """One line: images, classes, held out, skipped; then the notes, a line each."""
        classes = f"{len(self.classes)} classes" if self.classes else "no classes"
        skipped = ", ".join(f"{count} {kind}" for kind, count in self.skipped.items() if count)
        line = f"{self.images:,} images in {self.where}, {classes}, {self.held_out:,} held out"
        return "\n".join([f"{line}; skipped: {skipped or 'nothing'}.", *self.notes])


SomeImages = TypeVar("SomeImages", bound=Images)


def split(images: SomeImages, held_out: int) -> tuple[SomeImages, SomeImages]:
    """Training images, and ``held_out`` others; the same for every run on as many images."""
    order = torch.randperm(len(images), generator=generator_for(SPLIT_SEED, PLACEMENT, 1))
    return images.subset(order[held_out:].sort().values), images.subset(order[:held_out].sort().values)


def fingerprint(names_and_sizes: Iterable[tuple[str, int]]) -> dict[str, Any]:
    """Number and SHA-256 of images by name and size in bytes, whatever their order."""
    lines = sorted(f"{name}\t{size}\n" for name, size in names_and_sizes)
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode("utf-8", "surrogateescape"))
    return {"images": len(lines), "names_and_sizes": digest.hexdigest()}
