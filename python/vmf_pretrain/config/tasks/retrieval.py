"""The retrieval task."""

from dataclasses import dataclass
from typing import Literal

from vmf_pretrain.config.checks import require, require_positive


@dataclass(frozen=True)
class RetrievalTask:
    """Images that answer a query, as on rOxford5k and rParis6k; or, without a ground truth, images of the same class.

    Attributes:
        size: largest side of an image, pixels; larger images are made smaller, none is enlarged.
        scales: factors of that size whose features are averaged; published multi-scale figures have 1, 0.7071 and 0.5.
        patch: side of the network's patches, pixels; sides are cut to a multiple.
        pooling: "class", or "gem", the generalised mean of the patches with power 3.
        whitening: folder of other images on which features are whitened; null does not whiten.
    """

    size: int = 512
    scales: tuple[float, ...] = (1.0,)
    patch: int = 16
    pooling: Literal["class", "gem"] = "class"
    whitening: str | None = None

    def __post_init__(self) -> None:
        require_positive("retrieval", size=self.size, patch=self.patch)
        require(
            len(set(self.scales)) == len(self.scales) > 0 and all(0 < scale <= 1 for scale in self.scales),
            f"retrieval.scales is {list(self.scales)}; expected different numbers above 0 and at most 1.",
        )
