"""Which images a run trains on."""

from dataclasses import dataclass
from typing import Literal

from vmf_pretrain.config.checks import require, require_not_negative, require_positive


@dataclass(frozen=True)
class DataConfig:
    """Which images a run trains on, and in what batches.

    Attributes:
        kind: "digits" (scikit-learn's bundled handwritten digits on a 16 x 16 canvas) or "folder" (a folder of images).
        folder: the folder of images for kind "folder", searched recursively; its sub-folders are the classes of k-NN.
        batch_size: images per optimizer step.
        workers: processes that prepare batches; 0 prepares them in the training process. It never changes a result.
        held_out: share of the images held out for k-NN and linear accuracy; used only if the folder has class sub-folders.
    """

    kind: Literal["digits", "folder"] = "folder"
    folder: str | None = None
    batch_size: int = 64
    workers: int = 2
    held_out: float = 0.1

    def __post_init__(self) -> None:
        require_positive("data", batch_size=self.batch_size)
        require_not_negative("data", workers=self.workers)
        require(0 < self.held_out < 1, f"data.held_out is {self.held_out} but must lie strictly between 0 and 1.")
