"""The video task."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class VideoTask:
    """Objects of a first frame followed through videos, as on DAVIS 2017.

    Attributes:
        protocol: "dino" (480 pixels, the published tables) or "dinov3" (960 pixels).
        split: the list of videos in ``ImageSets/2017``; without the list all videos.
        predictions: folder of masks that were made elsewhere, which are scored in place of the network's; null has none.
    """

    protocol: Literal["dino", "dinov3"] = "dino"
    split: str = "val"
    predictions: str | None = None
