"""Length, device and bookkeeping of a run."""

from dataclasses import dataclass
from typing import Literal

from vmf_pretrain.config.checks import require_positive


@dataclass(frozen=True)
class TrainConfig:
    """Length, device and bookkeeping of the run.

    Attributes:
        epochs: passes over the training images.
        device: "auto" uses a GPU if there is one.
        precision: "32-true", or "bf16-mixed" for autocast.
        log_every: optimizer steps between two lines of metrics.jsonl.
        checkpoint_every: epochs between two checkpoints; one is always written at the end and on Ctrl-C.
        keep_checkpoints: how many of the newest checkpoints are kept; if one is damaged, a run resumes from the one before.
    """

    epochs: int = 100
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    log_every: int = 10
    checkpoint_every: int = 1
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        require_positive(
            "train",
            epochs=self.epochs,
            log_every=self.log_every,
            checkpoint_every=self.checkpoint_every,
            keep_checkpoints=self.keep_checkpoints,
        )
