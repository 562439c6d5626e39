"""The task that looks at prototypes."""

from dataclasses import dataclass

from vmf_pretrain.config.checks import require, require_positive


@dataclass(frozen=True)
class PrototypesTask:
    """How the head of a run assigns images to prototypes.

    Attributes:
        eps: cosine distance below which two prototypes count as duplicates.
        shown: prototypes in the picture, those that are used most.
        nearest: images beside each of them.
        resize: shorter side that an image is resized to before the central square is cut, as a multiple of the square.
    """

    eps: float = 0.025
    shown: int = 8
    nearest: int = 6
    resize: float = 256 / 224

    def __post_init__(self) -> None:
        require_positive("prototypes", eps=self.eps, shown=self.shown, nearest=self.nearest)
        require(self.resize >= 1, f"prototypes.resize is {self.resize} but must be at least 1, the cut square itself.")
