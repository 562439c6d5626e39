"""Small files that claim to be large ones: refused before any memory is taken for what they claim."""

from __future__ import annotations

import functools
import io
import json
import os
import re
import resource
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from PIL.GifImagePlugin import GifImageFile

from tests.pretrain.data.photo_files import bomb, encoded, noise, with_chunk
from vmf_pretrain.data.bad_images import UnreadableImageError
from vmf_pretrain.data.decode import decode
from vmf_pretrain.data.label_image import read_labels
from vmf_pretrain.data.shards import NOT_FILES, ShardSource

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="memory is limited in a forked child")
ROOM = 200 * 2**20  # bytes that a child may take beyond what it has: less than any bomb claims
SIDE = 60_000  # pixels, of 16 bits in a header
CHUNK = 2**28  # bytes of text or of a colour profile, in a few hundred kilobytes


def patched(whole: bytes, start: bytes, skip: int, size: bytes) -> bytes:
    """The bytes after a mark replaced."""
    at = whole.index(start) + skip
    return whole[:at] + size + whole[at + len(size) :]


def jpeg() -> bytes:
    return patched(encoded(noise(), "JPEG"), b"\xff\xc0", 5, struct.pack(">HH", SIDE, SIDE))


def webp() -> bytes:
    whole = encoded(noise(16), "WEBP", lossless=True)
    at = whole.index(b"VP8L") + 9
    bits = struct.unpack_from("<I", whole, at)[0] & ~(2**28 - 1) | (
        2**28 - 1
    )  # 16,384 pixels a side, the most there are
    return whole[:at] + struct.pack("<I", bits) + whole[at + 4 :]


def tiff() -> bytes:
    whole = bytearray(encoded(noise(16), "TIFF"))
    place = struct.unpack_from("<I", whole, 4)[0]
    for entry in range(struct.unpack_from("<H", whole, place)[0]):
        at = place + 2 + 12 * entry
        if struct.unpack_from("<H", whole, at)[0] in (256, 257):  # width and height
            struct.pack_into("<I", whole, at + 8, SIDE)
    return bytes(whole)


def gif() -> bytes:
    return patched(encoded(noise(16).quantize(8), "GIF"), b"GIF8", 6, struct.pack("<HH", SIDE, SIDE))


def bmp() -> bytes:
    return patched(encoded(noise(16), "BMP"), b"BM", 18, struct.pack("<ii", SIDE, SIDE))


def packed_chunk(kind: bytes) -> bytes:
    """A PNG of 64 pixels a side with a long text or profile, well packed."""
    return with_chunk(encoded(noise(), "PNG"), kind, b"name\0\0" + packed())


@functools.cache
def packed() -> bytes:
    packer, block = zlib.compressobj(1), bytes(2**20)
    return b"".join(packer.compress(block) for _ in range(CHUNK >> 20)) + packer.flush()


CLAIMS: dict[str, tuple[Callable[[], bytes], str]] = {  # and why they are refused; "" if only the picture is read
    "png": (bomb, "20000 x 20000 pixels|more than|bomb"),
    "jpeg": (jpeg, "60000 x 60000 pixels|more than|bomb"),
    "webp": (webp, "16384 x 16384 pixels|more than|bomb|could not create decoder"),
    "tiff": (tiff, "60000 x 60000 pixels|more than|bomb"),
    "gif": (gif, "60000 x 60000 pixels|more than|bomb"),
    "bmp": (bmp, "60000 x 60000 pixels|more than|bomb"),
    "png text": (lambda: packed_chunk(b"zTXt"), "|too large"),
    "png profile": (lambda: packed_chunk(b"iCCP"), "|too large"),
}


def _limited(work: Callable[[], Any]) -> Any:
    """What ``work`` returns, or raises, with ROOM bytes more; the limit is lifted again for whoever says it."""
    pages, limits = int(Path("/proc/self/statm").read_text().split()[0]), resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM, limits[1]))
    try:
        return work()
    except BaseException as error:
        return f"raised {error!r}"
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def in_little_memory(work: Callable[[], Any]) -> Any:
    """What ``work`` returns in a child that may take ROOM bytes more than this process has."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(write, json.dumps(_limited(work)).encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as file:
        said = file.read()
    os.waitpid(child, 0)
    return json.loads(said)


def reason(read: Callable[[], Any]) -> str:
    """Why an image is refused, or nothing."""
    try:
        read()
    except UnreadableImageError as error:
        return str(error)
    except MemoryError:
        return "MemoryError"
    return ""


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_an_image_that_claims_to_be_huge_is_refused_without_the_memory_it_claims() -> None:
    files = {kind: make() for kind, (make, _) in CLAIMS.items()}
    assert all(len(content) < 2 * 2**20 for content in files.values()), {k: len(v) for k, v in files.items()}
    found = in_little_memory(
        lambda: {kind: reason(functools.partial(decode, content)) for kind, content in files.items()}
    )
    for kind, (_, said) in CLAIMS.items():
        assert "MemoryError" not in found[kind], f"{kind} took memory: {found[kind]}"
        assert re.search(said, found[kind]), f"{kind}: {found[kind]}"
    masks = in_little_memory(lambda: reason(lambda: read_labels(files["png"])))
    assert masks, "read as a mask"
    assert "MemoryError" not in masks


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_such_an_image_would_take_the_memory_without_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    # each claims more than this process can have freed before, for that would serve it without a new page
    files = {kind: CLAIMS[kind][0]() for kind in ("jpeg", "gif")}

    def load(content: bytes) -> None:
        Image.open(io.BytesIO(content)).load()

    found = in_little_memory(
        lambda: {kind: reason(functools.partial(load, content)) for kind, content in files.items()}
    )
    assert found == dict.fromkeys(files, "MemoryError")


def test_only_the_first_of_many_frames_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    frames = [Image.new("L", (8, 8), number % 256) for number in range(300)]
    film = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    sought: list[int] = []
    seek = GifImageFile.seek

    def noted(image: GifImageFile, frame: int) -> None:
        sought.append(frame)
        seek(image, frame)

    monkeypatch.setattr(GifImageFile, "seek", noted)
    assert decode(film).shape == (3, 8, 8)
    assert max(sought, default=0) == 0, sought
    Image.open(io.BytesIO(film)).seek(3)
    assert sought[-1] == 3, "frames are sought in another way: this shows nothing"


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_giant_among_the_members_of_a_shard_is_a_bad_image_and_a_sparse_one_is_none(tmp_path: Path) -> None:
    pixels = encoded(noise(4), "PNG")
    with tarfile.open(tmp_path / "one.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        for name, size, pax in (
            ("good.png", len(pixels), {}),
            ("sparse.png", 512, {"GNU.sparse.map": "0,512", "GNU.sparse.size": str(2**40)}),
        ):
            member = tarfile.TarInfo(name)
            member.size, member.pax_headers = size, pax
            archive.addfile(member, io.BytesIO(pixels.ljust(size, b"\0")))
        giant = tarfile.TarInfo("giant.png")
        giant.size = 3 * 2**30
        start = archive.offset
    with (tmp_path / "one.tar").open("r+b") as file:  # a few kilobytes of disk, for it has holes
        file.seek(start)
        file.write(giant.tobuf())
        file.truncate(start + 512 + giant.size + 1024)
    source = ShardSource(tmp_path)
    assert list(source.names) == ["one.tar/good.png", "one.tar/giant.png"]
    assert source.skipped == {NOT_FILES: 1}
    found = in_little_memory(lambda: [reason(functools.partial(source.read, place)) for place in (0, 1)])
    assert found == ["", f"{3 * 2**30} bytes are more than {2**30}"]
    control = in_little_memory(lambda: reason(lambda: (tmp_path / "one.tar").read_bytes()))
    assert control == "MemoryError"
