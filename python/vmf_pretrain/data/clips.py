"""Clips of video files: a few frames at even distances, decoded when they are needed, uint8 RGB.

PyAV decodes them; it is an optional part of the installation. A video is decoded from its start to the last frame of the clip,
so that videos should be short.

Legend: N videos, B of them, T frames, H x W pixels.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Generator, Tensor

from vmf_pretrain.config.clips import ClipsConfig
from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.config.views import PhotoViewConfig
from vmf_pretrain.data.bad_images import UnreadableImageError
from vmf_pretrain.data.decode import MAX_PIXELS
from vmf_pretrain.data.folder import FolderSource
from vmf_pretrain.data.images import fingerprint
from vmf_pretrain.data.photo_views import Draws, cropped
from vmf_pretrain.data.photos import centred
from vmf_pretrain.data.plain_files import open_plain

SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg")
# What a file may be, whatever its name says: a playlist, for example, would name further files or addresses to read.
FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts"
PROTOCOLS = "file"
MIDDLE = 0.5  # where an evaluated clip lies in its video
FULL_BYTE = 255.0


@dataclass(frozen=True, eq=False)
class Clips:
    """One clip of each of some videos.

    Attributes:
        source: where the files are.
        indices: [N] int64 their places in the source.
        labels: [N] int64 classes, None where there are none.
        size: side of an evaluated frame, pixels.
        cut: number and distance of frames.
    """

    source: FolderSource
    indices: Tensor
    labels: Tensor | None
    size: int
    cut: ClipsConfig

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, index: int) -> str:
        """The path of the video below the folder."""
        return self.source.names[int(self.indices[index])]

    def decode(self, index: int, pixels: int | None = None) -> Tensor:
        """[T, 3, H, W] uint8: the clip in the middle of the video; frames are never reduced."""
        return self.clip(index, MIDDLE)

    def clip(self, index: int, share: float) -> Tensor:
        """[T, 3, H, W] uint8 that begins after a share in [0, 1) of where it may; a short video's last frame is repeated.

        Raises:
            UnreadableImageError: the video is damaged, or no video.
            PretrainError: PyAV is not installed.
        """
        return clip_of(self.source.root / self.name(index), share, self.cut)

    def evaluation_pixels(self, indices: Sequence[int]) -> Tensor:
        """[B, T, 3, size, size] in [0, 1]: the middle clip, resized by the shorter side to 8/7 of ``size``, centre-cropped.

        Raises:
            PretrainError: a video cannot be read; names it.
        """
        return torch.stack([self._evaluated(index) for index in indices])

    def viewed(self, index: int, view: Callable[[Tensor], Tensor]) -> Tensor:
        """[T, 3, size, size] in [0, 1]: the middle clip, whatever the view."""
        return centred(self.decode(index), self.size)

    def subset(self, indices: Tensor) -> "Clips":
        """Some of the videos."""
        labels = None if self.labels is None else self.labels[indices]
        return Clips(self.source, self.indices[indices], labels, self.size, self.cut)

    def facts(self) -> dict[str, Any]:
        """The fingerprint, by name and size in bytes."""
        names, sizes = self.source.names, self.source.sizes
        return fingerprint((names[place], int(sizes[place])) for place in self.indices.tolist())

    def _evaluated(self, index: int) -> Tensor:
        try:
            return centred(self.decode(index), self.size)
        except UnreadableImageError as error:
            raise PretrainError(f"video {self.name(index)} cannot be read ({error}); mend or remove it.") from None


def everything_in_clips(source: FolderSource, labels: Tensor | None, size: int, cut: ClipsConfig) -> Clips:
    """All videos of a folder.

    Raises:
        PretrainError: PyAV is not installed.
    """
    _av()
    return Clips(source, torch.arange(len(source.names)), labels, size, cut)


def clip_view(frames: Tensor, side: int, config: PhotoViewConfig, generator: Generator) -> Tensor:
    """[T, 3, side, side] float32 in [0, 1] of a clip [T, 3, H, W] uint8: one crop and one flip for all frames, no colours.

    Source: V-JEPA's published augmentation, which resizes without antialiasing; here with.
    """
    draws = Draws.of(generator)
    small = cropped(frames, config.global_area, side, config, draws)
    turned: Tensor = small.flip(-1) if draws.flip < config.flip else small
    return turned.float() / FULL_BYTE


def clip_of(path: Path, share: float, cut: ClipsConfig) -> Tensor:
    """[T, 3, H, W] uint8 of a file; ``share`` as in ``Clips.clip``.

    Raises:
        UnreadableImageError: the file is damaged, or no video of FORMATS.
        PretrainError: PyAV is not installed.
    """
    av = _av()
    try:
        open_plain(path).close()  # FFmpeg would wait for a pipe
        with _opened(av, path) as container:
            count = sum(packet.size > 0 for packet in container.demux(video=0))
        with _opened(av, path) as container:
            return _decoded(container, share, cut, count)
    except (av.FFmpegError, OSError, ValueError, IndexError) as error:
        raise UnreadableImageError(f"{type(error).__name__}: {' '.join(str(error).split())}") from None


def _decoded(container: Any, share: float, cut: ClipsConfig, count: int) -> Tensor:
    """The frames of a clip, of about ``count`` in the video."""
    start = int(share * max(1, count - (cut.frames - 1) * cut.step))
    wanted = range(start, start + cut.frames * cut.step, cut.step)
    frames: list[Tensor] = []
    last = None
    for place, last in enumerate(_frames(container)):
        if place in wanted:
            frames.append(_pixels(last))
        if len(frames) == cut.frames:
            return torch.stack(frames)
    if last is None:
        raise UnreadableImageError("no frame can be decoded")
    frames += [_pixels(last)] * (cut.frames - len(frames))
    return torch.stack(frames)


def _frames(container: Any) -> Iterator[Any]:
    stream = container.streams.video[0]
    if stream.width * stream.height > MAX_PIXELS:
        raise UnreadableImageError(f"{stream.width} x {stream.height} pixels are more than {MAX_PIXELS}")
    stream.codec_context.thread_count = 1  # workers share the cores already
    yield from container.decode(stream)


def _pixels(frame: Any) -> Tensor:
    """[3, H, W] uint8."""
    return torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)


def _opened(av: ModuleType, path: Path) -> Any:
    return av.open(str(path), options={"format_whitelist": FORMATS, "protocol_whitelist": PROTOCOLS})


def _av() -> ModuleType:
    """PyAV, imported only where videos are read.

    Raises:
        PretrainError: it is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise PretrainError(f'data.kind "videos" needs PyAV ({error}); install it with: pip install av') from None
    return av
