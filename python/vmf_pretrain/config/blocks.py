"""Which blocks of tokens are predicted from which."""

from dataclasses import dataclass
from typing import Literal

from vmf_pretrain.config.checks import require, require_not_negative, require_positive, require_range


@dataclass(frozen=True)
class BlocksConfig:
    """The block masks of I-JEPA and V-JEPA; other methods ignore them.

    Areas are shares of the grid of tokens; aspects are height over width.

    Attributes:
        targets: blocks that are predicted for each image (I-JEPA).
        target_area: range of their area.
        target_aspect: range of their aspect; one random number sets area and aspect, as published.
        context_area: range of the area of the square block that they are predicted from, before targets are taken out of it.
        min_keep: tokens that every block has to exceed; a context that does not is drawn again.
        edges: "published", where no block lies in the last row or column, or "fixed", where blocks lie anywhere.
        short_count: blocks of V-JEPA's first mask.
        short_area: area of each of them.
        long_count: blocks of V-JEPA's second mask.
        long_area: area of each of them.
        clip_aspect: range of the aspect of V-JEPA's blocks.
    """

    targets: int = 4
    target_area: tuple[float, float] = (0.15, 0.2)
    target_aspect: tuple[float, float] = (0.75, 1.5)
    context_area: tuple[float, float] = (0.85, 1.0)
    min_keep: int = 10
    edges: Literal["published", "fixed"] = "published"
    short_count: int = 8
    short_area: float = 0.15
    long_count: int = 2
    long_area: float = 0.7
    clip_aspect: tuple[float, float] = (0.75, 1.5)

    def __post_init__(self) -> None:
        require_positive("blocks", targets=self.targets, short_count=self.short_count, long_count=self.long_count)
        require_not_negative("blocks", min_keep=self.min_keep)
        areas = {"target_area": self.target_area, "context_area": self.context_area}
        shares = {"short_area": (self.short_area, self.short_area), "long_area": (self.long_area, self.long_area)}
        require_range("blocks", **areas, target_aspect=self.target_aspect, clip_aspect=self.clip_aspect, **shares)
        for name, (_, high) in {**areas, **shares}.items():
            require(high <= 1.0, f"blocks.{name} reaches {high} but an area's share is at most 1.")
