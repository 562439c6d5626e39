"""What there is to choose a recipe by: this machine, and the images of a folder by their names and headers only."""

import io
import os
import random
import statistics
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from vmf_pretrain.config.errors import PretrainError

if TYPE_CHECKING:
    from vmf_pretrain.data.source import Source

SAMPLED = 200  # files whose headers are read: a median that is right to a few percent, in a second
SAMPLE_SEED = 0
UNKNOWN_MEMORY = 8 << 30  # where the system does not say: a small laptop's


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
        kind: how they are stored, as ``data.kind``.
    """

    count: int
    side: int | None
    kind: Literal["folder", "shards"] = "folder"


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
    """The images of a folder, in files or in tar shards; decodes none, and reads the headers of at most 200.

    Raises:
        PretrainError: it is no folder, cannot be read, or holds no image.
    """
    if not folder.is_dir():  # before torch is imported
        raise PretrainError(f"data.folder {folder} is not a folder; expected one with images.")
    from vmf_pretrain.data.decode import SUFFIXES
    from vmf_pretrain.data.folder import FolderSource, files_below
    from vmf_pretrain.data.shards import ARCHIVES, ShardSource

    in_shards = not files_below(folder, SUFFIXES)[0] and bool(files_below(folder, ARCHIVES)[0])
    source: Source = ShardSource(folder) if in_shards else FolderSource(folder)
    count = len(source.names)
    sample = random.Random(SAMPLE_SEED).sample(range(count), min(SAMPLED, count))
    sides = [side for side in (_shorter_side(source, index) for index in sample) if side is not None]
    return Photos(count, round(statistics.median(sides)) if sides else None, "shards" if in_shards else "folder")


def _shorter_side(source: "Source", index: int) -> int | None:
    """Pixels; None if the header cannot be read: the run itself says which files are damaged."""
    from PIL import Image

    from vmf_pretrain.data.decode import FORMATS

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # nothing is decoded
            encoded = source.read(index)
            with Image.open(io.BytesIO(encoded if isinstance(encoded, bytes) else b""), formats=FORMATS) as image:
                return min(image.size)
    except Exception:  # a header may make a decoder raise anything, as in data/decode.py
        return None


def _memory() -> int:
    """Bytes of the machine, or of its container where that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else UNKNOWN_MEMORY
    try:
        return min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # no such limit, or "max"
        return total
