"""Runs of MAE, I-JEPA and V-JEPA small enough for a test, and a folder of videos."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import av
import numpy as np

from tests.pretrain.tiny import changed, digits_config
from vmf_pretrain.config.run import Config

METHODS = ("mae", "ijepa", "vjepa")
VIDEO_SIDE = 32  # pixels
FRAMES = 8


def save_video(path: Path, seed: int, frames: int = FRAMES, side: int = VIDEO_SIDE) -> Path:
    """A bright square that moves over noise, one column a frame; stored without loss."""
    path.parent.mkdir(parents=True, exist_ok=True)
    numbers = np.random.default_rng(seed)
    ground = numbers.integers(0, 120, (side, side, 3))
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("ffv1", rate=8)
        stream.width, stream.height, stream.pix_fmt = side, side, "bgr0"
        for place in range(frames):
            picture = ground.copy()
            picture[8:16, place : place + 8] = 255
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture.astype(np.uint8), format="rgb24")):
                container.mux(packet)
        for packet in stream.encode(None):
            container.mux(packet)
    return path


def save_videos(folder: Path, each: int = 4) -> Path:
    """Two classes of ``each`` videos."""
    for number, name in enumerate(("left", "right")):
        for place in range(each):
            save_video(folder / name / f"{place}.mkv", 10 * number + place)
    return folder


def masked_config(method: str, folder: Path | None = None, **sections: Any) -> Config:
    """Two epochs of two steps; ``folder`` holds videos for V-JEPA."""
    small = digits_config(
        backbone={"patch_size": 4, "width": 16, "depth": 2, "heads": 2, "drop_path": 0.0},
        decoder={"width": 16, "depth": 1, "heads": 4},
        predictor={"width": 8, "depth": 1},
        blocks={"min_keep": 0, "edges": "fixed", "targets": 2},
        loss={"koleo_weight": 0.0, "warmup_teacher_temp_epochs": 0},
        data={"batch_size": 512},
        optim={"learning_rate": 1e-3, "teacher_momentum": 0.9, "counting": "mae" if method == "mae" else "jepa"},
        evaluate={"max_images": 40, "neighbours": 3},
    )
    if method == "vjepa":
        videos = {"kind": "videos", "folder": str(folder), "batch_size": 3, "held_out": 0.25, "workers": 0}
        clips = {"clips": {"frames": 4, "step": 1}, "method": method}
        small = changed(small, data=videos, **clips)
    else:
        small = changed(small, method=method)
    return changed(small, **sections)
