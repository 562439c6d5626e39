"""The views of a few images, as the network sees them, in one picture.

Legend: C channels.
"""

import io
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from vmf_pretrain.data.batches import ViewBatches
from vmf_pretrain.data.network_input import network_input
from vmf_pretrain.storage.durable import replace_durably

SHOWN = 5  # images
TILE = 112  # side of the largest view in the picture, at least, pixels
GAP = 4  # between views
VIDEO_AXES = 5  # of clips: images, frames, channels, rows, columns


def draw_views(batches: ViewBatches, path: Path) -> None:
    """Write a PNG, whole or not at all.

    It has a row for each of the first images of the first epoch: its large views, then its small ones.

    Raises:
        PretrainError: images cannot be read.
        OSError: the file cannot be written.
    """
    fed = network_input(batches.config)
    chosen = batches.order(0)[:SHOWN].tolist()
    views = [_stills(fed.pixels(view)) for view in batches.views(0, chosen)]
    scale = max(1, round(TILE / max(view.shape[-1] for view in views)))
    sides = [scale * view.shape[-1] for view in views]
    width, height = sum(sides) + GAP * (len(sides) - 1), (max(sides) + GAP) * len(chosen) - GAP
    sheet = Image.new("RGB", (width, height), "white")
    across = 0
    for side, view in zip(sides, views, strict=True):
        for row, image in enumerate(view):
            sheet.paste(
                _image(image).resize((side, side), Image.Resampling.NEAREST), (across, row * (max(sides) + GAP))
            )
        across += side + GAP
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn = io.BytesIO()
    sheet.save(drawn, "PNG")
    replace_durably(path, drawn.getvalue())


def _stills(pixels: Tensor) -> Tensor:
    """Of clips their middle frames."""
    return pixels[:, pixels.shape[1] // 2] if pixels.ndim == VIDEO_AXES else pixels


def _image(pixels_CHW: Tensor) -> Image.Image:
    """Values outside [0, 1] are shown as the nearest one inside."""
    shown = (pixels_CHW.clamp(0, 1) * 255).round().to(torch.uint8).expand(3, -1, -1)
    return Image.fromarray(shown.permute(1, 2, 0).contiguous().numpy())
