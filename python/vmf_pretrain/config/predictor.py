"""The predictor of the joint-embedding predictive architectures."""

from dataclasses import dataclass

from vmf_pretrain.config.checks import require, require_positive


@dataclass(frozen=True)
class PredictorConfig:
    """The narrow transformer that predicts a target's features from those of a context; other methods ignore it.

    Attributes:
        width: embedding dimension; an even number.
        depth: number of blocks (I-JEPA: 6, and 12 for its ViT-H/14; V-JEPA: 12).
        heads: attention heads per block; null means as many as the backbone has, as published.
    """

    width: int = 384
    depth: int = 6
    heads: int | None = None

    def __post_init__(self) -> None:
        given = {} if self.heads is None else {"heads": self.heads}
        require_positive("predictor", width=self.width, depth=self.depth, **given)
        require(self.width % 2 == 0, f"predictor.width is {self.width} but must be even.")
