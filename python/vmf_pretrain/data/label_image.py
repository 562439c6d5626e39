"""Images whose pixels are numbers of objects or classes: palette or gray PNGs of 8 bits, read with their numbers.

Legend: H x W pixels.
"""

import io
import warnings
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.data.bad_images import UnreadableImageError
from vmf_pretrain.data.decode import MAX_PIXELS
from vmf_pretrain.data.plain_files import read_plain

MODES = ("P", "L", "1")
COLOURS = 256
BITS_OF_A_COLOUR = 3  # red, green and blue take one bit of a number in turn


def read_labels(encoded: bytes) -> NDArray[np.uint8]:
    """[H, W] uint8 numbers of a PNG: places in its palette, shades of gray, or 0 and 1.

    Raises:
        UnreadableImageError: no PNG, damaged, too large, or with colours of its own or more than 8 bits.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about files that are read all the same
            with Image.open(io.BytesIO(encoded), formats=("PNG",)) as image:
                return _numbers(image)
    except UnreadableImageError:
        raise
    except Exception as error:  # a decoder may raise anything on the bytes of a stranger
        raise UnreadableImageError(f"{type(error).__name__}: {' '.join(str(error).split())}") from None


def read_label_file(path: Path) -> NDArray[np.uint8]:
    """The same of a file.

    Raises:
        PretrainError: it cannot be read, or is no mask; names it.
    """
    try:
        return read_labels(read_plain(path))
    except OSError as error:
        raise PretrainError(f"the mask {path} cannot be read ({error.strerror}).") from None
    except UnreadableImageError as error:
        raise PretrainError(f"{path} is no mask ({error}).") from None


def _numbers(image: Image.Image) -> NDArray[np.uint8]:
    if image.mode not in MODES:
        raise UnreadableImageError(
            f"a mask of the mode {image.mode}; expected a PNG with a palette or 8-bit gray, whose numbers are the objects"
        )
    if image.width * image.height > MAX_PIXELS:
        raise UnreadableImageError(f"{image.width} x {image.height} pixels are more than {MAX_PIXELS}")
    image.load()
    return np.array(image, dtype=np.uint8)


def label_png(labels: NDArray[np.uint8]) -> bytes:
    """A PNG of [H, W] numbers, with the palette of the VOC and DAVIS benchmarks."""
    image = Image.fromarray(labels)
    image.putpalette(palette().ravel().tolist())
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def palette() -> NDArray[np.uint8]:
    """[256, 3] colours of numbers: bits 0, 3, 6 of a number are the highest bits of red, 1, 4, 7 of green, 2, 5 of blue."""
    numbers = np.arange(COLOURS)[:, None]
    colours = np.zeros((COLOURS, 3), np.int64)
    for place in range(3):
        bits = numbers >> (BITS_OF_A_COLOUR * place + np.arange(3)) & 1
        colours |= bits << (7 - place)
    return colours.astype(np.uint8)
