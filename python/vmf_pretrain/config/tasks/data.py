"""Which images an evaluation looks at."""

from dataclasses import dataclass

from vmf_pretrain.config.checks import require, require_positive


@dataclass(frozen=True)
class DataTask:
    """Which images an evaluation looks at.

    Attributes:
        folder: images, searched recursively. With ``train/`` and one of ``val/``, ``validation/`` and ``test/`` in it, those
            are the two splits; else a share is held out, as a run does. The first sub-folder is the class. null takes the
            images and the split of the run that is evaluated.
        held_out: share of the images that is held out where the folder has no splits.
        max_images: largest number of images of each split, evenly spread over all; null takes all. The tasks whose folders
            have an order of their own (retrieval, copies, video, dense) take all.
    """

    folder: str | None = None
    held_out: float = 0.1
    max_images: int | None = None

    def __post_init__(self) -> None:
        require(0 < self.held_out < 1, f"data.held_out is {self.held_out} but must lie strictly between 0 and 1.")
        if self.max_images is not None:
            require_positive("data", max_images=self.max_images)
