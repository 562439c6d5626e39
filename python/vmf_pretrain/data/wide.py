"""Gray images of more than 8 bits, scaled to 8 by what their format says or by their own range, never black or white."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vmf_pretrain.data.bad_images import UnreadableImageError

# TIFF tags
BITS_PER_SAMPLE = 258
PHOTOMETRIC = 262
SMALLEST = (280, 340)  # MinSampleValue, SMinSampleValue
LARGEST = (281, 341)
WHITE_IS_ZERO = 0
STORED = 16  # bits
DEPTHS = (8, 10, 12)  # bits of cameras and scanners that are stored in 16, and would be nearly black as they stand
SEEN = 1 / 16  # of [0, 1]: floating values that span less of it are taken to be on another scale
FULL = 255.0


def is_wide(image: Image.Image) -> bool:
    """Whether the pixels are single numbers of more than 8 bits."""
    return image.mode == "F" or image.mode.startswith("I")


def eight_bit(image: Image.Image, significant_bits: int | None) -> NDArray[np.uint8]:
    """[H, W] gray.

    Args:
        image: of mode F, I or I;16 in any order of bytes.
        significant_bits: what a PNG says of its samples, or None.

    Raises:
        UnreadableImageError: a value is not finite.
    """
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise UnreadableImageError("it holds values that are not finite")
    tags = getattr(image, "tag_v2", {})
    low, high = _stated(tags, values) or _range(image.mode, values, significant_bits, tags)
    if high <= low:  # one shade everywhere: gray
        return np.full(values.shape, FULL // 2, np.uint8)
    scaled = ((values - low) / (high - low)).clip(0, 1)
    if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:
        scaled = 1 - scaled
    return (scaled * FULL).round().astype(np.uint8)


def _stated(tags: dict[int, object], values: NDArray[np.float64]) -> tuple[float, float] | None:
    """The range that a TIFF states, if it holds the values and is wider than nothing."""
    low, high = (_first(tags, names) for names in (SMALLEST, LARGEST))
    if high is None:
        return None
    low = 0.0 if low is None else low
    return (low, high) if low <= values.min() and values.max() <= high and low < high else None


def _first(tags: dict[int, object], names: tuple[int, ...]) -> float | None:
    for name in names:
        value = tags.get(name)
        value = value[0] if isinstance(value, tuple) and value else value
        if isinstance(value, int | float):
            return float(value)
    return None


def _range(
    mode: str, values: NDArray[np.float64], significant_bits: int | None, tags: dict[int, object]
) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    if mode == "F":
        return (0.0, 1.0) if low >= 0 and high <= 1 and high - low >= SEEN else (low, high)
    if low < 0 or high >= 2**STORED:
        return low, high
    bits = _first(tags, (BITS_PER_SAMPLE,)) if significant_bits is None else significant_bits
    if bits is not None and bits < STORED and high < 2**bits:
        return 0.0, 2.0**bits - 1
    if mode == "I" and bits != STORED:  # 32 bits: nothing says which of them are used
        return low, high
    # 12 bits in 16 are common and often not stated
    return 0.0, 2.0 ** next((depth for depth in DEPTHS if high < 2**depth), STORED) - 1
