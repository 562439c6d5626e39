"""How a video is followed, as two codebases publish it: sizes of frames and masks, and the propagation between them.

Legend: C objects and the background, H x W pixels, h x w patches, p pixels of a patch.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional

from vmf_pretrain.evaluation.video.propagate import Propagation
from vmf_pretrain.evaluation.video.reach import circle, square

Labels = NDArray[np.uint8]
FULL_BYTE = 255.0
DINO_SHORT, DINO_MULTIPLE = 480, 64  # pixels; other sides are cut to a multiple, 854 to 832
DINOV3_SHORT = 960  # at a patch of 16 as many patches as at 480 with one of 8
EARLIER_FRAMES = 7  # beside the first


@dataclass(frozen=True)
class Protocol:
    """A way to follow objects through a video.

    Attributes:
        name: of the codebase.
        size: height and width of the network's input from those of a frame and p.
        resized: [3, H, W] uint8 to [3, *size] in [0, 1].
        shrunk: [H, W] numbers of objects to [h, w].
        enlarged: [C, h, w] soft labels, p, and height and width of the frame, to [H, W] numbers.
        propagation: from frame to frame.
        earlier: how many frames before this one are sources, beside the first.
    """

    name: str
    size: Callable[[int, int, int], tuple[int, int]]
    resized: Callable[[Tensor, tuple[int, int]], Tensor]
    shrunk: Callable[[Labels, tuple[int, int]], Labels]
    enlarged: Callable[[Tensor, int, tuple[int, int]], Labels]
    propagation: Propagation
    earlier: int = EARLIER_FRAMES


def _dino_size(height: int, width: int, patch: int) -> tuple[int, int]:
    longer = max(height, width) * DINO_SHORT // min(height, width) // DINO_MULTIPLE * DINO_MULTIPLE
    short, longer = (side // patch * patch for side in (DINO_SHORT, longer))
    # of a square frame the width is cut, as published
    return (longer, short) if height > width else (short, longer)


def _dinov3_size(height: int, width: int, patch: int) -> tuple[int, int]:
    def up(side: float) -> int:
        return -int(-side // patch) * patch

    short = up(DINOV3_SHORT)
    return (short, up(width * short / height)) if width > height else (up(height * short / width), short)


def _bilinear_bytes(frame: Tensor, size: tuple[int, int]) -> Tensor:
    """Without a filter, and rounded to bytes, as OpenCV does it."""
    sized = functional.interpolate(frame[None].float(), size=size, mode="bilinear", align_corners=False)
    return sized[0].round_().div_(FULL_BYTE)


def _bicubic(frame: Tensor, size: tuple[int, int]) -> Tensor:
    sized = functional.interpolate(frame[None].float(), size=size, mode="bicubic", antialias=True)
    return sized[0].clamp_(0, FULL_BYTE).div_(FULL_BYTE)


def _nearest(labels: Labels, size: tuple[int, int]) -> Labels:
    """The pixel under the centre of each new one; Pillow's rule and torch's ``nearest-exact``."""
    return np.asarray(Image.fromarray(labels).resize(size[::-1], Image.Resampling.NEAREST))


def _dino_enlarged(scores: Tensor, patch: int, size: tuple[int, int]) -> Labels:
    large = functional.interpolate(scores[None], scale_factor=patch, mode="bilinear", align_corners=False)[0]
    return _nearest(_stretched(large).argmax(dim=0).to(torch.uint8).cpu().numpy(), size)


def _dinov3_enlarged(scores: Tensor, patch: int, size: tuple[int, int]) -> Labels:
    numbers = _stretched(functional.interpolate(scores[None], size=size, mode="nearest")[0]).argmax(dim=0)
    return numbers.to(torch.uint8).cpu().numpy()


def _stretched(scores: Tensor) -> Tensor:
    """[C, H, W] scores of which each label's run from 0 to 1; a label that is the same everywhere stays as it is."""
    low, high = scores.amin(dim=(1, 2), keepdim=True), scores.amax(dim=(1, 2), keepdim=True)
    varies = high > low
    return torch.where(varies, (scores - low) / torch.where(varies, high - low, 1), scores)


DINO = Protocol("dino", _dino_size, _bilinear_bytes, _nearest, _dino_enlarged, Propagation(5, 0.1, square(12)))
DINOV3 = Protocol("dinov3", _dinov3_size, _bicubic, _nearest, _dinov3_enlarged, Propagation(5, 0.2, circle(12)))
PROTOCOLS = {protocol.name: protocol for protocol in (DINO, DINOV3)}
