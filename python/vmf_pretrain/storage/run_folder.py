"""The folder of one run: its paths, and the log of metrics."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from vmf_pretrain.config.errors import PretrainError


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run."""

    path: Path

    @classmethod
    def create(cls, path: Path) -> "RunFolder":
        """A new run's folder.

        Raises:
            PretrainError: the folder exists and is not empty, or cannot be made.
        """
        cls.refuse_existing(path)
        return cls._made(path)

    @classmethod
    def refuse_existing(cls, path: Path) -> None:
        """Raise PretrainError if ``path`` is taken; creates nothing."""
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise PretrainError(f"run folder {path} already exists; choose another with --out, or go on with --resume.")

    @classmethod
    def reopen(cls, path: Path) -> "RunFolder":
        """The folder of a run to continue.

        Raises:
            PretrainError: the folder holds no run.
        """
        if not (path / "config.yaml").is_file():
            raise PretrainError(f"run folder {path} holds no run to resume; expected a config.yaml in it.")
        return cls._made(path)

    @classmethod
    def _made(cls, path: Path) -> "RunFolder":
        folder = cls(path)
        try:
            for part in (folder.weights, folder.plots, folder.checkpoints):
                part.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise PretrainError(f"run folder {path} cannot be made: {error.strerror}.") from None
        return folder

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        """One JSON object per line."""
        return self.path / "metrics.jsonl"

    @property
    def summary(self) -> Path:
        """The numbers at the end of the run."""
        return self.path / "summary.json"

    @property
    def weights(self) -> Path:
        """Last and best weights of the teacher."""
        return self.path / "weights"

    @property
    def plots(self) -> Path:
        """PNG plots."""
        return self.path / "plots"

    @property
    def checkpoints(self) -> Path:
        """Where ``--resume`` continues from."""
        return self.path / "checkpoints"


class MetricsLog:
    """metrics.jsonl and TensorBoard events. On resume, records of steps that will run again are removed."""

    def __init__(self, folder: RunFolder, from_step: int) -> None:
        self._path = folder.metrics
        kept = [record for record in read_metrics(folder) if record["step"] <= from_step]
        rewritten = self._path.with_suffix(".tmp")
        rewritten.write_text("".join(json.dumps(record) + "\n" for record in kept))
        os.replace(rewritten, self._path)  # atomic, so that a crash here does not lose the history
        self._events = SummaryWriter(str(folder.path / "tensorboard"), purge_step=from_step + 1)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record; every number except the step also becomes a TensorBoard scalar."""
        finite = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in record.items()}
        with self._path.open("a") as lines:
            lines.write(json.dumps(finite) + "\n")
        for key, value in finite.items():
            if key != "step" and isinstance(value, int | float):
                self._events.add_scalar(key, value, int(record["step"]))

    def close(self) -> None:
        """Flush TensorBoard's events."""
        self._events.close()


def read_metrics(folder: RunFolder) -> list[dict[str, Any]]:
    """Every record so far; a last line cut short by a crash is ignored."""
    if not folder.metrics.exists():
        return []
    records = []
    for line in folder.metrics.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records
