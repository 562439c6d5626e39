"""One door decodes: every way of storing a picture gives its colours, and damage of any kind gives one named error."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from torch import Tensor

from tests.pretrain.data.photo_files import BAD, SIDE, colours, encoded, gradient, gray, noise, with_chunk
from vmf_pretrain.data.bad_images import UnreadableImageError
from vmf_pretrain.data.decode import BACKGROUND, decode, pixels_of

pytestmark = pytest.mark.quick

EXIF_ORIENTATION = 0x0112
MAX_SAMPLE_VALUE = 281


def planes(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(image.convert("RGB")).copy()).permute(2, 0, 1)


def apart(one: Tensor, other: Tensor) -> int:
    assert one.shape == other.shape, f"{tuple(one.shape)} and {tuple(other.shape)}"
    return int((one.int() - other.int()).abs().max())


COLOURED: dict[str, tuple[Callable[[], bytes], int]] = {  # and the largest error of a byte
    "png": (lambda: encoded(colours(), "PNG"), 0),
    "opaque alpha": (lambda: encoded(colours().convert("RGBA"), "PNG"), 0),
    "palette": (lambda: encoded(colours().quantize(256), "PNG"), 51),
    "cmyk jpeg": (lambda: encoded(colours().convert("CMYK"), "JPEG"), 26),
    "ycbcr tiff": (lambda: encoded(colours().convert("YCbCr"), "TIFF"), 3),
    "lossless webp": (lambda: encoded(colours(), "WEBP", lossless=True), 0),
}


@pytest.mark.parametrize("kind", COLOURED)
def test_colours_survive_every_way_of_storing_them(kind: str) -> None:
    make, allowed = COLOURED[kind]
    found = decode(make())
    assert found.dtype == torch.uint8
    error = apart(found, planes(colours()))
    assert error <= allowed, f"{kind} is off by {error}"


RAMP = gradient().astype(np.float64) / 255
TWELVE = (RAMP * 4095).round().astype(np.uint16)
GRAYS: dict[str, Callable[[], bytes]] = {
    "8 bits": lambda: encoded(gray(gradient()), "PNG"),
    "with alpha": lambda: encoded(gray(gradient()).convert("LA"), "PNG"),
    "16 bits": lambda: encoded(gray(gradient().astype(np.uint16) * 257), "PNG"),
    "16-bit tiff": lambda: encoded(gray(gradient().astype(np.uint16) * 257), "TIFF"),
    "12 bits in 16, unsaid": lambda: encoded(gray(TWELVE), "PNG"),
    "14 bits in 16, sBIT": lambda: with_chunk(encoded(gray(TWELVE * 4), "PNG"), b"sBIT", bytes([14])),
    "14 bits in 16, MaxSampleValue": lambda: encoded(gray(TWELVE * 4), "TIFF", tiffinfo={MAX_SAMPLE_VALUE: 16380}),
    "int32": lambda: encoded(gray((RAMP * 2_000_000 - 1_000_000).astype(np.int32)), "TIFF"),
    "float in [0, 1]": lambda: encoded(gray(RAMP.astype(np.float32)), "TIFF"),
    "float of thousands": lambda: encoded(gray((RAMP * 5000 - 70).astype(np.float32)), "TIFF"),
    "float of next to nothing": lambda: encoded(gray((RAMP * 1e-4).astype(np.float32)), "TIFF"),
}


@pytest.mark.parametrize("kind", GRAYS)
def test_shades_survive_every_way_of_storing_them(kind: str) -> None:
    error = apart(decode(GRAYS[kind]()), planes(gray(gradient())))
    assert error <= 2, f"{kind} is off by {error}"


@pytest.mark.parametrize("values", [np.full((4, 4), 0.5, np.float32), np.full((4, 4), 10**6, np.int32)])
def test_one_shade_of_unknown_range_is_neither_black_nor_white(values: Any) -> None:
    assert set(decode(encoded(gray(values), "TIFF")).unique().tolist()) == {127}


def test_a_range_that_a_tiff_states_wrongly_is_not_believed() -> None:
    found = decode(encoded(gray(gradient().astype(np.uint16) * 257), "TIFF", tiffinfo={MAX_SAMPLE_VALUE: 300}))
    assert apart(found, planes(gray(gradient()))) <= 2


def test_what_is_transparent_is_the_background_whatever_colour_it_hides() -> None:
    image = colours().convert("RGBA")
    image.putalpha(gray(np.where(gradient() > 127, 255, 0).astype(np.uint8)))
    palette = Image.fromarray(np.tile(np.array([[0, 1]], np.uint8), (2, 1)), "P")
    palette.putpalette([9, 9, 9, 200, 100, 50])
    found = decode(encoded(image, "PNG"))
    assert found[:, :, : SIDE // 2].permute(1, 2, 0).unique(dim=0).tolist() != [], "nothing is transparent"
    assert (found[:, :, : SIDE // 2] == torch.tensor(BACKGROUND)[:, None, None]).all()
    assert apart(found[:, :, SIDE // 2 :], planes(colours())[:, :, SIDE // 2 :]) == 0
    keyed = decode(encoded(palette, "PNG", transparency=0))
    assert keyed[:, 0].T.tolist() == [list(BACKGROUND), [200, 100, 50]]


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_that_the_camera_noted_is_applied(orientation: int, kind: str) -> None:
    turns: dict[int, Callable[[Tensor], Tensor]] = {
        1: lambda x: x,
        2: lambda x: x.flip(2),
        3: lambda x: x.rot90(2, (1, 2)),
        4: lambda x: x.flip(1),
        5: lambda x: x.transpose(1, 2),
        6: lambda x: x.rot90(-1, (1, 2)),
        7: lambda x: x.rot90(2, (1, 2)).transpose(1, 2),
        8: lambda x: x.rot90(1, (1, 2)),
    }
    wide, exif = colours().crop((0, 0, 16, 8)), Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    assert apart(decode(encoded(wide, kind, exif=exif)), turns[orientation](decode(encoded(wide, kind)))) == 0


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "TIFF"])
def test_first_frame_of_several_is_taken(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    options: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {}
    found = decode(encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options))
    assert apart(found, planes(frames[0])) <= 2


@pytest.mark.parametrize("kind", BAD)
def test_damage_of_any_kind_is_one_error_of_one_line(kind: str) -> None:
    with pytest.raises(UnreadableImageError) as caught:
        decode(BAD[kind]())
    assert str(caught.value), "no reason"
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("error", [TypeError("x"), RecursionError(), MemoryError(), KeyError("k"), AssertionError()])
def test_whatever_a_decoder_raises_is_that_error(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: ImageFile.ImageFile) -> None:
        raise error

    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    with pytest.raises(UnreadableImageError, match=type(error).__name__):
        decode(encoded(colours(), "BMP"))


def test_an_interruption_is_no_damage(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(self: ImageFile.ImageFile) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ImageFile.ImageFile, "load", interrupt)
    with pytest.raises(KeyboardInterrupt):
        decode(encoded(colours(), "BMP"))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP"])
def test_a_cut_image_is_refused_even_if_another_library_takes_such(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(UnreadableImageError):
        decode(BAD[f"cut {kind}"]())
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True, "the other library's setting has changed"


def test_bytes_of_every_kind_changed_at_random_give_an_image_or_that_error() -> None:
    numbers = random.Random(0)
    kinds = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
    outcomes: set[torch.dtype | None] = set()
    for kind in kinds:
        whole = encoded(noise(12), kind)
        for _ in range(60):
            damaged = bytearray(whole)
            for _ in range(3):
                damaged[numbers.randrange(len(damaged))] = numbers.randrange(256)
            try:
                outcomes.add(decode(bytes(damaged)).dtype)
            except UnreadableImageError:
                outcomes.add(None)
    assert outcomes == {torch.uint8, None}, f"nothing happened: {outcomes}"


@pytest.mark.parametrize(
    ("pixels", "by"), [(None, 1), (160 * 120, 1), (160 * 120 // 4, 2), (160 * 120 // 4 + 1, 1), (1, 8)]
)
def test_a_jpeg_is_decoded_smaller_while_it_keeps_so_many_pixels(pixels: int | None, by: int) -> None:
    image = noise(8).resize((160, 120), Image.Resampling.BICUBIC)
    found = decode(encoded(image, "JPEG", quality=95), pixels)
    assert found.shape == (3, 120 // by, 160 // by)
    smaller = planes(image.resize((160 // by, 120 // by), Image.Resampling.BOX))
    mean = (found.float() - smaller.float()).abs().mean().item()
    assert mean < 6, f"{mean:.1f} of 255 apart on average"


ARRAYS: dict[str, Any] = {
    "tensor of bytes": lambda a: torch.from_numpy(a.copy()).permute(2, 0, 1),
    "floating tensor": lambda a: torch.from_numpy(a / 255).permute(2, 0, 1),
    "array": lambda a: a,
}


@pytest.mark.parametrize("kind", ARRAYS)
def test_arrays_of_a_dataset_are_its_pixels(kind: str) -> None:
    assert apart(pixels_of(ARRAYS[kind](np.asarray(colours()))), planes(colours())) == 0


@pytest.mark.parametrize(
    "bad", [torch.full((3, 4, 4), torch.nan), torch.full((3, 4, 4), 1.5), torch.zeros(5, 4, 4), torch.zeros(3, 0, 4)]
)
def test_arrays_that_are_no_picture_are_refused(bad: Tensor) -> None:
    with pytest.raises(UnreadableImageError):
        pixels_of(bad)
