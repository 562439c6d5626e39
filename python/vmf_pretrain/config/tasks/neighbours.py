"""The task that shows neighbours."""

from dataclasses import dataclass

from vmf_pretrain.config.checks import require, require_positive


@dataclass(frozen=True)
class NeighboursTask:
    """The nearest images of some, and near-duplicates among all; it needs no labels.

    Attributes:
        queries: images whose neighbours are drawn, evenly spread over all.
        nearest: neighbours of each.
        near: cosine of two images' features from which on they count as near-duplicates.
        pairs: of the most similar images, in the second picture.
        resize: shorter side that an image is resized to before the central square is cut, as a multiple of the square.
    """

    queries: int = 8
    nearest: int = 6
    near: float = 0.99
    pairs: int = 12
    resize: float = 256 / 224

    def __post_init__(self) -> None:
        require_positive("neighbours", queries=self.queries, nearest=self.nearest, pairs=self.pairs)
        require(-1 < self.near <= 1, f"neighbours.near is {self.near} but must be a cosine above -1.")
        require(self.resize >= 1, f"neighbours.resize is {self.resize} but must be at least 1, the cut square itself.")
