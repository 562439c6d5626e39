"""A look at the images: what they are, which are broken, how they lie in folders, and which are there twice.

As many are read as a time limit allows, in an order drawn at random; nothing is written.
"""

import hashlib
import io
import random
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from vmf_pretrain.data.bad_images import UnreadableImageError
from vmf_pretrain.data.batch import BadImage
from vmf_pretrain.data.decode import FORMATS, decode
from vmf_pretrain.data.source import Source

SEED = 0  # of the order in which images are looked at
ENOUGH = 256 * 256  # pixels: a JPEG is decoded at a part of its size, which still reads it to its end

Clock = Callable[[], float]


@dataclass
class Look:
    """What was seen of the images that were decoded.

    Attributes:
        count: of all images.
        looked: at how many.
        formats: how many of each, as Pillow names them.
        modes: how many of each, as Pillow names them.
        sides: shorter sides, pixels.
        bad: those that could not be read, with reasons.
        reading: seconds of reading files.
        decoding: seconds of decoding them.
    """

    count: int
    looked: int = 0
    formats: Counter[str] = field(default_factory=Counter)
    modes: Counter[str] = field(default_factory=Counter)
    sides: list[int] = field(default_factory=list)
    bad: list[BadImage] = field(default_factory=list)
    reading: float = 0.0
    decoding: float = 0.0

    @property
    def facts(self) -> dict[str, Any]:
        """What JSON can hold of it."""
        names = [asdict(image) for image in self.bad]
        counts = {"formats": dict(self.formats), "modes": dict(self.modes), "median_side": self.median_side}
        return {"count": self.count, "looked": self.looked, **counts, "bad": names}

    @property
    def median_side(self) -> int | None:
        """Of the shorter sides, pixels; None if no image could be read."""
        return round(statistics.median(self.sides)) if self.sides else None


@dataclass(frozen=True)
class Equal:
    """Images with the same bytes.

    Attributes:
        groups: places of images that are the same, each group in ascending order.
        compared: files whose bytes were read.
        candidates: files of a size that another one has too.
    """

    groups: Sequence[tuple[int, ...]]
    compared: int
    candidates: int


def look_at(source: Source, seconds: float, clock: Clock = time.perf_counter) -> Look:
    """Read and decode images in random order, until all are or the time is over; at least one."""
    look, end = Look(len(source.names)), clock() + seconds
    for place in random.Random(SEED).sample(range(look.count), look.count):
        if look.looked and clock() > end:
            break
        begun, read = clock(), None
        try:
            encoded = source.read(place)
            read = clock()
            if isinstance(encoded, bytes):
                _note_header(look, encoded)
                decode(encoded, ENOUGH)
        except OSError as error:
            look.bad.append(BadImage(source.names[place], error.strerror or str(error)))
        except UnreadableImageError as error:
            look.bad.append(BadImage(source.names[place], str(error)))
        done = clock()
        look.looked += 1
        look.reading += (done if read is None else read) - begun
        look.decoding += 0.0 if read is None else done - read
    look.bad.sort(key=lambda image: image.name)
    return look


def equal_files(source: Source, seconds: float, clock: Clock = time.perf_counter) -> Equal:
    """Images with the same bytes, among those of equal size; the smallest first, until the time is over."""
    sizes, end = np.asarray(source.sizes), clock() + seconds
    _, inverse, counts = np.unique(sizes, return_inverse=True, return_counts=True)
    candidates = np.flatnonzero((counts[inverse] > 1) & (sizes > 0))
    found: dict[tuple[int, bytes], list[int]] = {}
    compared = 0
    for place in candidates[np.argsort(sizes[candidates], kind="stable")].tolist():
        if clock() > end:
            break
        compared += 1
        try:
            encoded = source.read(place)
        except (OSError, UnreadableImageError):  # ``look_at`` names it
            continue
        if isinstance(encoded, bytes):
            found.setdefault((len(encoded), hashlib.sha256(encoded).digest()), []).append(place)
    groups = sorted(tuple(sorted(places)) for places in found.values() if len(places) > 1)
    return Equal(groups, compared, len(candidates))


def _note_header(look: Look, encoded: bytes) -> None:
    """Format, mode and size by the header; a header that cannot be read is for the decoder to refuse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd files are warned about, and are decoded next
            with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
                form, mode, side = str(image.format), image.mode, min(image.size)
    except Exception:  # a header may make a decoder raise anything, as in data/decode.py
        return
    look.formats[form] += 1
    look.modes[mode] += 1
    look.sides.append(side)
