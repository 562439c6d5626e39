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
        precision: "fp32"; "bf16" or "fp16" for autocast, fp16 with a scaled loss; "fp64" for comparisons.
        parallel: how several ranks share the networks: "ddp" (each has all) or "fsdp" (each has a part).
        accumulate: in how many parts a rank computes its images, so that only one part's activations are in memory; the result
            is that of the whole batch.
        activation_checkpointing: whether a backbone's blocks compute their activations again in the backward pass.
        compile: whether the backbones' blocks are compiled (``torch.compile``).
        max_skipped: steps in a row without a finite loss and gradient that end the run.
        stop_on_collapse: whether a run that collapses or diverges ends then, instead of only saying so.
        log_every: optimizer steps between two lines of metrics.jsonl.
        checkpoint_every: epochs between two checkpoints; one is always written at the end and on Ctrl-C.
        keep_checkpoints: how many of the newest checkpoints are kept; if one is damaged, a run resumes from the one before.
    """

    epochs: int = 100
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16", "fp16", "fp64"] = "fp32"
    parallel: Literal["ddp", "fsdp"] = "ddp"
    accumulate: int = 1
    activation_checkpointing: bool = False
    compile: bool = False
    max_skipped: int = 3
    stop_on_collapse: bool = False
    log_every: int = 10
    checkpoint_every: int = 1
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        require_positive(
            "train",
            accumulate=self.accumulate,
            max_skipped=self.max_skipped,
            epochs=self.epochs,
            log_every=self.log_every,
            checkpoint_every=self.checkpoint_every,
            keep_checkpoints=self.keep_checkpoints,
        )
