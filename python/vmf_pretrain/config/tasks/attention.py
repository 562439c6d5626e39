"""The attention task."""

from dataclasses import dataclass

from vmf_pretrain.config.checks import require, require_positive


@dataclass(frozen=True)
class AttentionTask:
    """Attention of the class token in the last block, drawn, and compared with given masks.

    Attributes:
        shown: images in the picture, evenly spread over all.
        mass: a head's mask is made of the patches with the most attention, which have this share of it.
        masks: folder of masks by the same relative paths as the images, whatever their endings; pixels other than 0 are the
            object. null compares with none.
        resize: shorter side that an image is resized to before the central square is cut, as a multiple of the square.
    """

    shown: int = 6
    mass: float = 0.6
    masks: str | None = None
    resize: float = 256 / 224

    def __post_init__(self) -> None:
        require_positive("attention", shown=self.shown)
        require(0 < self.mass <= 1, f"attention.mass is {self.mass} but must be above 0 and at most 1.")
        require(self.resize >= 1, f"attention.resize is {self.resize} but must be at least 1, the cut square itself.")
