"""What a run writes beside metrics.jsonl."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LogConfig:
    """What a run writes beside metrics.jsonl.

    Attributes:
        tensorboard: write the same numbers as TensorBoard events.
    """

    tensorboard: bool = True
