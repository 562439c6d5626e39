"""What there is to choose a recipe by: this machine, and the images of a folder by their names and headers only."""

import os
import random
import statistics
import warnings
from dataclasses import dataclass
from pathlib import Path

from vmf_pretrain.config.errors import PretrainError

IMAGES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"})
SAMPLED = 200  # files whose headers are read: a median that is right to a few percent, in a second
SAMPLE_SEED = 0


@dataclass(frozen=True)
class Machine:
    """What a rank computes on.

    Attributes:
        device: "cpu" or "cuda".
        memory: of the GPU, or of the machine, bytes.
        cores: that this process may use.
        ranks: on this machine.
    """

    device: str
    memory: int
    cores: int
    ranks: int = 1


@dataclass(frozen=True)
class Photos:
    """The images of a folder.

    Attributes:
        count: files with the name of an image.
        side: median of the shorter side, pixels; None if no header could be read.
    """

    count: int
    side: int | None


def this_machine(device: str) -> Machine:
    """This machine for ``train.device``: "auto", "cpu" or "cuda". Imports torch unless it is "cpu"."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # torchrun's
    if device != "cpu":
        import torch

        if torch.cuda.is_available():
            return Machine("cuda", torch.cuda.get_device_properties(0).total_memory, cores, ranks)
    return Machine("cpu", _memory(), cores, ranks)


def photos_in(folder: Path) -> Photos:
    """The images of a folder, searched recursively; decodes none, and reads the headers of at most 200.

    Raises:
        PretrainError: it is no folder, cannot be read, or holds no image.
    """
    if not folder.is_dir():
        raise PretrainError(f"data.folder {folder} is not a folder; expected one with images.")
    paths = _images(folder)
    if not paths:
        raise PretrainError(
            f"data.folder {folder} holds no image; expected files ending in {', '.join(sorted(IMAGES))}."
        )
    sample = random.Random(SAMPLE_SEED).sample(paths, min(SAMPLED, len(paths)))
    sides = [side for side in map(_shorter_side, sample) if side is not None]
    return Photos(len(paths), round(statistics.median(sides)) if sides else None)


def _images(folder: Path) -> list[str]:
    """Paths, in alphabetic order, so that the sample is the same each time."""

    def refuse(error: OSError) -> None:
        raise PretrainError(f"data.folder {error.filename} cannot be read: {error.strerror}.") from None

    return sorted(
        os.path.join(place, name)
        for place, _, names in os.walk(folder, onerror=refuse)
        for name in names
        if os.path.splitext(name)[1].lower() in IMAGES
    )


def _shorter_side(path: str) -> int | None:
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # nothing is decoded
            with Image.open(path, formats=("JPEG", "PNG", "WEBP", "BMP", "TIFF")) as image:
                return min(image.size)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None  # the run itself says which files it cannot read


def _memory() -> int:
    """Bytes of the machine, or of its container where that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else UNKNOWN_MEMORY
    try:
        return min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # no such limit, or "max"
        return total


UNKNOWN_MEMORY = 8 << 30  # where the system does not say: a small laptop's
