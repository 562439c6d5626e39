"""Which patches of a view are hidden from the student."""

from dataclasses import dataclass
from typing import Literal

from vmf_pretrain.config.checks import require, require_not_negative, require_share


@dataclass(frozen=True)
class MasksConfig:
    """Which patches of a global view the student of ibot and dinov2 does not see; the teacher sees all.

    Attributes:
        ratios: for ibot, means of the share of patches that are hidden; each view takes one of them at random.
        spreads: for ibot, how far the share may lie from each mean, uniformly. With the defaults, half of the views are
            whole and the others lack 0.1 to 0.5.
        views: for dinov2, the share of a batch's global views that are masked.
        shares: for dinov2, the least and the largest share of hidden patches; they are spread evenly over the masked views.
        shape: "blocks" of patches, or patches at "random" places (ibot only).
        start_epoch: epochs before the first mask.
    """

    ratios: tuple[float, ...] = (0.0, 0.3)
    spreads: tuple[float, ...] = (0.0, 0.2)
    views: float = 0.5
    shares: tuple[float, float] = (0.1, 0.5)
    shape: Literal["blocks", "random"] = "blocks"
    start_epoch: int = 0

    def __post_init__(self) -> None:
        means, spreads = self.ratios, self.spreads
        fits = len(means) == len(spreads) > 0 and all(
            0 <= spread <= middle and middle + spread <= 1 for middle, spread in zip(means, spreads, strict=False)
        )
        require(
            fits,
            f"masks.ratios are {list(means)} and masks.spreads {list(spreads)} but must be as many, and mean - spread and "
            "mean + spread must lie in [0, 1].",
        )
        low, high = self.shares
        require(0 <= low <= high <= 1, f"masks.shares are {[low, high]} but must rise and lie in [0, 1].")
        require_share("masks", views=self.views)
        require_not_negative("masks", start_epoch=self.start_epoch)
