"""The task that colours patches."""

from dataclasses import dataclass

from vmf_pretrain.config.checks import require, require_positive


@dataclass(frozen=True)
class PcaTask:
    """The first three principal components of patch features, as colours.

    Attributes:
        shown: images, evenly spread over all; the components are those of their patches together.
        resize: shorter side that an image is resized to before the central square is cut, as a multiple of the square.
    """

    shown: int = 6
    resize: float = 256 / 224

    def __post_init__(self) -> None:
        require_positive("pca", shown=self.shown)
        require(self.resize >= 1, f"pca.resize is {self.resize} but must be at least 1, the cut square itself.")
