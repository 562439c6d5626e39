"""The masked autoencoder: what is masked, what is reconstructed, and by which decoder."""

from dataclasses import dataclass
from typing import Literal

from vmf_pretrain.config.checks import require, require_positive


@dataclass(frozen=True)
class DecoderConfig:
    """MAE's mask and decoder; other methods ignore it.

    Attributes:
        masked: share of an image's patches that the encoder does not see.
        width: embedding dimension of the decoder; a multiple of 4, because its positions have two axes.
        depth: blocks of the decoder.
        heads: attention heads per block of the decoder.
        norm_pixels: reconstruct each patch minus its mean and over its deviation, instead of pixels.
        features: what is evaluated: the "class" token, as in the published linear probe, or the "mean" of the patches.
    """

    masked: float = 0.75
    width: int = 512
    depth: int = 8
    heads: int = 16
    norm_pixels: bool = True
    features: Literal["class", "mean"] = "class"

    def __post_init__(self) -> None:
        require_positive("decoder", width=self.width, depth=self.depth, heads=self.heads)
        require(0 < self.masked < 1, f"decoder.masked is {self.masked} but must lie strictly between 0 and 1.")
        require(
            self.width % 4 == 0 and self.width % self.heads == 0,
            f"decoder.width is {self.width} but must be a multiple of 4 and of decoder.heads, {self.heads}.",
        )
