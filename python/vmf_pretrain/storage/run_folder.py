"""The folder of one run: its paths."""

import contextlib
from dataclasses import dataclass
from pathlib import Path

from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.storage.durable import replace_durably
from vmf_pretrain.storage.step_folders import LATEST, folder_of


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
        """Raise PretrainError if ``path`` holds anything but a lock (``RunLock``) and what a run that never began left.

        That is empty folders, unfinished files, whose names begin with a dot, and without ``config.yaml`` the checkpoint of
        step 0, which is written before it. Creates nothing.
        """
        if path.exists() and (not path.is_dir() or _holds_something(path)):
            begun = (path / "config.yaml").is_file()
            found = "already exists" if begun or not path.is_dir() else "already exists and holds other files"
            hint = ", or go on with --resume" if begun else ""
            raise PretrainError(f"run folder {path} {found}; choose another with --out{hint}.")

    @staticmethod
    def remove_if_empty(path: Path) -> None:
        """Remove a folder that holds nothing; any other stays."""
        with contextlib.suppress(OSError):
            path.rmdir()

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

    def write_config(self, text: str) -> None:
        """Write ``config.yaml``, the sign that a run has begun, whole or not at all.

        Raises:
            PretrainError: it cannot be written.
        """
        try:
            replace_durably(self.config, text.encode())
        except OSError as error:
            raise PretrainError(f"{self.config} cannot be written: {error.strerror or error}.") from None

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        """One JSON object per line."""
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        """The same as TensorBoard events."""
        return self.path / "tensorboard"

    @property
    def bad_files(self) -> Path:
        """Images that could not be read, one JSON object per line."""
        return self.path / "bad_files.jsonl"

    @property
    def skipped_steps(self) -> Path:
        """Steps whose loss or gradient was not finite, one JSON object per line."""
        return self.path / "skipped_steps.jsonl"

    @property
    def history(self) -> Path:
        """How the run started and ended, each time, one JSON object per line."""
        return self.path / "history.jsonl"

    @property
    def histograms(self) -> Path:
        """Singular values of features, usage and concentrations of prototypes at each evaluation, one JSON object per line."""
        return self.path / "histograms.jsonl"

    @property
    def report(self) -> Path:
        """The page for people."""
        return self.path / "report.html"

    @property
    def pictures(self) -> Path:
        """PNGs of what the trained network makes of images."""
        return self.path / "pictures"

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


def _holds_something(folder: Path) -> bool:
    """Whether there is a file that a run which never began could not have left."""
    checkpoints = RunFolder(folder).checkpoints
    early = {checkpoints / LATEST, *folder_of(checkpoints, 0).glob("*")}
    files = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    kept = [path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    return any(path not in early for path in kept)
