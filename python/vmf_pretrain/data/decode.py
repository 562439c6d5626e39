"""The only door for the bytes of strangers: from an encoded image, or a PIL image, to 8-bit RGB.

Legend: H x W pixels.
"""

import io
import struct
import warnings

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError
from torch import Tensor

from vmf_pretrain.data.bad_images import UnreadableImageError
from vmf_pretrain.data.wide import eight_bit, is_wide

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
MAX_PIXELS = 89_478_485  # Pillow's own limit, 256 MiB as RGB; a constant of ours, since any library may lift theirs
REDUCTIONS = (8, 4, 2)  # by which a JPEG can be decoded smaller
# Pictures with transparency are drawn for pages, and pages are white. To drop alpha would show colours that nobody sees.
BACKGROUND = (255, 255, 255)
ORIENTATION = 0x0112  # tag of EXIF
UPRIGHT = 1
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def decode(encoded: bytes | Image.Image, pixels: int | None = None) -> Tensor:
    """[3, H, W] uint8 of the first frame, upright, channels last in memory.

    Args:
        encoded: the bytes of a file, or an image that is open.
        pixels: if given, a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size while it keeps at least so many pixels.

    Raises:
        UnreadableImageError: no image of FORMATS, damaged, cut, not finite or with more than MAX_PIXELS.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # decoders warn about every odd file; what matters is an error here
            if isinstance(encoded, Image.Image):
                return _pixels(encoded, b"", None)
            with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
                return _pixels(image, encoded, pixels)
    except UnreadableImageError:
        raise
    except UnidentifiedImageError:  # its own text holds an address, which differs from one process to the next
        raise UnreadableImageError(f"no image that Pillow knows as {', '.join(FORMATS)}") from None
    except Exception as error:  # a decoder may raise anything on the bytes of a stranger: TypeError, struct.error, ...
        reason = " ".join(str(error).split()) or "no reason given"
        raise UnreadableImageError(f"{type(error).__name__}: {reason}") from None


def _pixels(image: Image.Image, encoded: bytes, pixels: int | None) -> Tensor:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise UnreadableImageError(f"{width} x {height} pixels are more than {MAX_PIXELS}")
    if pixels is not None and image.format in ("JPEG", "MPO"):
        _reduce(image, pixels)
    _load_whole(image)
    if image.getexif().get(ORIENTATION, UPRIGHT) != UPRIGHT:  # exif_transpose copies the image even then
        image = ImageOps.exif_transpose(image)
    rgb = image if image.mode == "RGB" and not image.has_transparency_data else _rgb(image, _significant_bits(encoded))
    # the array cannot be written to, which torch warns about; nobody does
    return torch.from_numpy(np.asarray(rgb)).permute(2, 0, 1)


def _reduce(image: Image.Image, pixels: int) -> None:
    """Have a JPEG decoded at the smallest size with at least so many pixels."""
    width, height = image.size
    for by in REDUCTIONS:
        if width * height >= pixels * by**2:
            image.draft(None, (width // by, height // by))
            return


def _load_whole(image: Image.Image) -> None:
    """Decode all of it: another library in this process may have asked Pillow to fill what is missing with grey."""
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        image.load()
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def _rgb(image: Image.Image, significant_bits: int | None) -> Image.Image:
    if is_wide(image):
        return Image.fromarray(eight_bit(image, significant_bits)).convert("RGB")
    if image.has_transparency_data:
        canvas = Image.new("RGBA", image.size, (*BACKGROUND, 255))
        canvas.alpha_composite(image.convert("RGBA"))
        return canvas.convert("RGB")
    return image.convert("RGB")


def _significant_bits(encoded: bytes) -> int | None:
    """What the sBIT chunk of a gray PNG says, which Pillow does not read."""
    if not encoded.startswith(PNG_SIGNATURE):
        return None
    place = len(PNG_SIGNATURE)
    while place + 8 <= len(encoded):
        length, kind = struct.unpack_from(">I4s", encoded, place)
        if kind == b"sBIT" and length == 1 and place + 8 < len(encoded):
            return encoded[place + 8]
        if kind == b"IDAT":
            return None
        place += length + 12
    return None


def pixels_of(array: NDArray[np.generic] | Tensor) -> Tensor:
    """[3, H, W] uint8 of an array that a user's Dataset gives: a tensor [C, H, W] or an array [H, W] or [H, W, C].

    Floating values lie in [0, 1].

    Raises:
        UnreadableImageError: the shape, the type or a value is none of these.
    """
    tensor = array if isinstance(array, Tensor) else torch.from_numpy(np.ascontiguousarray(array))
    if tensor.ndim == 2:
        tensor = tensor.unsqueeze(0)
    elif not isinstance(array, Tensor) and tensor.ndim == 3:
        tensor = tensor.permute(2, 0, 1)
    if tensor.ndim != 3 or tensor.shape[0] not in (1, 3) or 0 in tensor.shape:
        raise UnreadableImageError(
            f"its shape is {tuple(array.shape)}; expected [C, H, W] as a tensor, [H, W, C] as an array"
        )
    if tensor.is_floating_point():
        if not bool(((tensor >= 0) & (tensor <= 1)).all()):  # False for NaN too
            raise UnreadableImageError("its floating values do not all lie in [0, 1]")
        tensor = tensor.mul(255).round().to(torch.uint8)
    if tensor.dtype != torch.uint8:
        raise UnreadableImageError(f"its type is {tensor.dtype}; expected uint8, or floating in [0, 1]")
    return tensor.expand(3, -1, -1)
