"""The numbers of a run for Weights & Biases and MLflow, if a person asks for them; what fails there never stops a run."""

import functools
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, Protocol

from vmf_pretrain.config.resume import flat
from vmf_pretrain.config.run import Config
from vmf_pretrain.storage.run_folder import RunFolder

IDENTITY = 8  # bytes of a run's name there: the same when it goes on
LONGEST = 500  # characters of a setting, as MLflow takes them


class Tracker(Protocol):
    """A library that keeps the numbers of runs."""

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Add numbers at a step."""

    def close(self) -> None:
        """The run has ended."""


class Tracked:
    """Trackers, each given up, with a sentence, when it fails.

    Args:
        config: of the run.
        folder: of the run.
        say: takes a sentence for a person.
    """

    def __init__(self, config: Config, folder: RunFolder, say: Callable[[str], None]) -> None:
        self._say = say
        self._trackers: dict[str, Tracker] = {}
        wanted: dict[str, Callable[[], Tracker]] = {}
        if config.log.wandb != "none":
            wanted["wandb"] = lambda: WandB(config, folder)
        if config.log.mlflow != "none":
            wanted["mlflow"] = lambda: MLflow(config, folder)
        for name, start in wanted.items():
            self._attempt(name, functools.partial(self._start, name, start))

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Add numbers at a step."""
        for name, tracker in list(self._trackers.items()):
            self._attempt(name, functools.partial(tracker.write, step, scalars))

    def close(self) -> None:
        """The run has ended."""
        for name, tracker in list(self._trackers.items()):
            self._attempt(name, tracker.close)

    def _start(self, name: str, start: Callable[[], Tracker]) -> None:
        self._trackers[name] = start()

    def _attempt(self, name: str, do: Callable[[], object]) -> None:
        try:
            do()
        except ModuleNotFoundError as error:
            self._trackers.pop(name, None)
            self._say(
                f'log.{name} is set but {error.name} is missing (pip install "vmf_kernels[{name}]"); training goes on.'
            )
        except Exception as error:  # a stranger's library on a stranger's network: whatever it raises, training goes on
            self._trackers.pop(name, None)
            reason = " ".join(str(error).split()) or type(error).__name__
            self._say(f"{name} gets no more numbers: {reason}; training goes on, and metrics.jsonl has them all.")


class WandB:
    """Weights & Biases; offline it writes below the run's folder, for ``wandb sync``."""

    def __init__(self, config: Config, folder: RunFolder) -> None:
        import wandb

        self._run = wandb.init(
            project=config.log.project,
            name=folder.path.name,
            id=identity(folder),
            resume="allow",
            dir=str(folder.path),
            mode=config.log.wandb,
            config=asdict(config),
        )

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Add numbers at a step."""
        self._run.log(scalars, step=step)

    def close(self) -> None:
        """The run has ended."""
        self._run.finish()


class MLflow:
    """MLflow; locally it writes to a database below the run's folder."""

    def __init__(self, config: Config, folder: RunFolder) -> None:
        from mlflow.tracking import MlflowClient

        where = config.log.mlflow
        address = f"sqlite:///{folder.path.absolute() / 'mlflow.db'}" if where == "local" else where
        self._client: Any = MlflowClient(tracking_uri=address)
        found = self._client.get_experiment_by_name(config.log.project)
        experiment = self._client.create_experiment(config.log.project) if found is None else found.experiment_id
        tag = {"vmf_pretrain": identity(folder)}
        before = self._client.search_runs([experiment], filter_string=f"tags.vmf_pretrain = '{identity(folder)}'")
        if before:
            self._run = before[0].info.run_id
            self._client.update_run(self._run, status="RUNNING")
            return
        self._run = self._client.create_run(experiment, run_name=folder.path.name, tags=tag).info.run_id
        for name, value in _settings(config).items():
            self._client.log_param(self._run, name, value)

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Add numbers at a step."""
        for name, value in scalars.items():
            self._client.log_metric(self._run, name, value, step=step)

    def close(self) -> None:
        """The run has ended."""
        self._client.set_terminated(self._run)


def identity(folder: RunFolder) -> str:
    """The name of a run in a tracker: that of its folder's path, so that a resumed run goes on in the same place."""
    return hashlib.blake2b(str(folder.path.absolute()).encode(), digest_size=IDENTITY).hexdigest()


def _settings(config: Config) -> Mapping[str, str]:
    return {name: str(value)[:LONGEST] for name, value in flat(asdict(config)).items()}
