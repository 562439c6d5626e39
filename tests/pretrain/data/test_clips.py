"""Clips of videos: the right frames, one crop for all of them, and no file that names others is followed."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import av
import pytest
import torch

from tests.pretrain.methods.masked_runs import FRAMES, VIDEO_SIDE, masked_config, save_video, save_videos
from tests.pretrain.tiny import batch_of, changed, one_sentence
from vmf_pretrain.config.clips import ClipsConfig
from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.config.views import PhotoViewConfig
from vmf_pretrain.data.bad_images import UnreadableImageError
from vmf_pretrain.data.batches import ViewBatches
from vmf_pretrain.data.clips import clip_of, clip_view
from vmf_pretrain.data.load import load_images
from vmf_pretrain.data.plan import Plan

pytestmark = pytest.mark.quick

BRIGHT = 250


def columns(frames: torch.Tensor) -> list[int]:
    """Where the square begins in each frame, which is the number of the frame in the video."""
    return [int((frame[0, 8:16] > BRIGHT).all(dim=0).nonzero()[0]) for frame in frames]


@pytest.mark.parametrize(
    ("cut", "share", "expected"),
    [
        (ClipsConfig(4, 1, 2), 0.0, [0, 1, 2, 3]),
        (ClipsConfig(4, 1, 2), 0.999, [4, 5, 6, 7]),
        (ClipsConfig(2, 4, 1), 0.5, [2, 6]),
        (ClipsConfig(4, 4, 2), 0.5, [0, 4, 7, 7]),  # the last frame is repeated
    ],
)
def test_clip_has_the_frames_at_its_place(cut: ClipsConfig, share: float, expected: list[int], tmp_path: Path) -> None:
    frames = clip_of(save_video(tmp_path / "a.mkv", 0), share, cut)
    assert frames.shape == (cut.frames, 3, VIDEO_SIDE, VIDEO_SIDE)
    assert frames.dtype == torch.uint8
    assert columns(frames) == expected


def test_all_frames_of_a_view_have_one_crop_and_one_flip() -> None:
    still = torch.randint(256, (1, 3, 40, 60), dtype=torch.uint8).expand(5, -1, -1, -1)
    seen = []
    for seed in range(8):
        view = clip_view(still, 16, PhotoViewConfig(), torch.Generator().manual_seed(seed))
        assert view.shape == (5, 3, 16, 16)
        assert 0 <= view.min() <= view.max() <= 1
        assert torch.equal(view, view[:1].expand_as(view)), f"seed {seed}: frames differ"
        seen.append(view[0])
    assert not any(torch.equal(one, seen[0]) for one in seen[1:])


def test_batch_of_clips_is_a_function_of_its_step_and_evaluated_clips_do_not_change(tmp_path: Path) -> None:
    config = masked_config("vjepa", save_videos(tmp_path))
    train, kept, found = load_images(config)
    assert (len(train), found.images, list(found.classes)) == (6, 8, ["left", "right"])
    assert kept is not None
    assert train.labels is not None
    first, again, later = (batch_of(ViewBatches(train, config, Plan(1)), step) for step in (0, 0, 2))
    assert first.views[0].shape == (3, 4, 3, 16, 16)
    assert torch.equal(first.views[0], again.views[0])
    assert not torch.equal(first.views[0], later.views[0])
    pixels = train.evaluation_pixels([0, 1])
    assert pixels.shape == (2, 4, 3, 16, 16)
    assert torch.equal(pixels, train.evaluation_pixels([0, 1]))


def playlist(folder: Path) -> bytes:
    """Names another file to read."""
    other = save_video(folder / "secret.mkv", 0)
    return f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{other}\n#EXT-X-ENDLIST\n".encode()


def cut_short(folder: Path) -> bytes:
    return save_video(folder / "whole.mkv", 0).read_bytes()[:200]


@pytest.mark.parametrize(
    "content",
    [lambda folder: b"", lambda folder: b"text" * 500, playlist, cut_short],
    ids=["empty", "text", "list", "cut"],
)
def test_file_that_is_no_video_is_one_sentence(content: Any, tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(content(tmp_path))
    with pytest.raises(UnreadableImageError) as caught:
        clip_of(path, 0.0, ClipsConfig(2, 1, 1))
    assert "\n" not in str(caught.value), str(caught.value)


def test_playlist_would_be_followed_without_the_list_of_formats(tmp_path: Path) -> None:
    """Negative control."""
    path = tmp_path / "clip.m3u8"
    path.write_bytes(playlist(tmp_path))
    with av.open(str(path), options={"allowed_extensions": "ALL", "extension_picky": "0"}) as container:
        assert container.format.name == "hls"


def test_unreadable_video_is_replaced_by_name(tmp_path: Path) -> None:
    save_videos(tmp_path)
    (tmp_path / "left" / "0.mkv").write_bytes(b"no video")
    config = masked_config("vjepa", tmp_path, data={"batch_size": 6})
    batch = batch_of(ViewBatches(load_images(config)[0], config, Plan(1)), 0)
    assert {image.name for image in batch.bad} <= {"left/0.mkv"}
    assert len(set(batch.indices)) >= 5
    assert batch.views[0].isfinite().all()


def test_missing_decoder_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without(name: str, *arguments: Any, **options: Any) -> Any:
        if name == "av":
            raise ModuleNotFoundError("No module named 'av'")
        return original(name, *arguments, **options)

    config = masked_config("vjepa", save_videos(tmp_path, each=1))
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(PretrainError, match="install it with: pip install av") as caught:
        load_images(config)
    assert one_sentence(str(caught.value) + "."), str(caught.value)


def test_methods_and_data_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    config = masked_config("vjepa", tmp_path)
    for sections in ({"method": "ijepa"}, {"data": {"kind": "folder"}}):
        with pytest.raises(PretrainError, match='vjepa and "videos" go together'):
            changed(config, **sections)
    assert config.token_grid == (2, 4, 4)
    assert FRAMES == 8
