"""What a run writes beside metrics.jsonl."""

from dataclasses import dataclass
from typing import Literal

from vmf_pretrain.config.checks import require


@dataclass(frozen=True)
class LogConfig:
    """What a run writes beside metrics.jsonl. Nothing leaves the machine unless one of these says so.

    Attributes:
        tensorboard: write the same numbers as TensorBoard events.
        wandb: "none"; "offline" writes them for Weights & Biases below the run's folder, "online" sends them there.
        mlflow: "none"; "local" writes them for MLflow below the run's folder; or the address of a tracking server.
        project: under which W&B and MLflow list the run.
    """

    tensorboard: bool = True
    wandb: Literal["none", "offline", "online"] = "none"
    mlflow: str = "none"
    project: str = "vmf_pretrain"

    def __post_init__(self) -> None:
        known = self.mlflow in ("none", "local") or "://" in self.mlflow
        require(known, f'log.mlflow is {self.mlflow} but must be "none", "local" or the address of a tracking server.')
        require(bool(self.project), "log.project is empty but must be a name.")
