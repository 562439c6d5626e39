"""A run as its folder has it: whatever of it can be read, of a run that is finished, failed, killed or still going."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.config.file import read_config
from vmf_pretrain.config.resume import flat
from vmf_pretrain.config.run import Config
from vmf_pretrain.storage.history import read_history
from vmf_pretrain.storage.lines import read_lines
from vmf_pretrain.storage.lock import Holder, holder_of
from vmf_pretrain.storage.metrics import read_metrics
from vmf_pretrain.storage.run_folder import RunFolder

Record = Mapping[str, Any]
CRASH = "crash.txt"


@dataclass(frozen=True, eq=False)
class RunData:
    """One run.

    Attributes:
        folder: of the run.
        name: for people; differs from those of the other runs of a page.
        text: config.yaml.
        config: the same as settings; None if this version cannot read them.
        unfit: why not, or nothing.
        records: of metrics.jsonl, each with a step; None for what is not finite.
        summary: of summary.json; None if there is none.
        history: starts and ends.
        holder: the process that has locked the folder; None if none has.
        histograms: of each evaluation.
        bad: images that could not be read.
        skipped: steps that were not finite.
    """

    folder: RunFolder
    name: str
    text: str
    config: Config | None
    unfit: str
    records: Sequence[Record]
    summary: Record | None
    history: Sequence[Record]
    holder: Holder | None
    histograms: Sequence[Record]
    bad: Sequence[Record]
    skipped: Sequence[Record]

    @property
    def method(self) -> str:
        """Its name; "unknown" if the settings cannot be read."""
        return "unknown" if self.config is None else self.config.method

    @property
    def settings(self) -> dict[str, Any]:
        """By dotted name."""
        return {} if self.config is None else flat(asdict(self.config))

    @property
    def end(self) -> Record | None:
        """How the run ended; None if it has not, or not said so."""
        last = self.history[-1] if self.history else None
        return last if last is not None and last.get("event") == "end" else None

    @property
    def starts(self) -> list[Record]:
        """Each start."""
        return [event for event in self.history if event.get("event") == "start"]

    @property
    def step(self) -> int:
        """The last one that anything is known of."""
        known = [record["step"] for record in self.records]
        return max([*known, int((self.end or {}).get("step", 0))], default=0)

    def series(self, key: str) -> list[tuple[float, float | None]]:
        """Steps and values of a figure; None where it is not finite."""
        return [(record["step"], _finite(record[key])) for record in self.records if key in record]

    def last(self, key: str) -> float | None:
        """The last finite value of a figure."""
        return next((value for _, value in reversed(self.series(key)) if value is not None), None)


def read_run(path: Path, name: str | None = None) -> RunData:
    """All that is known of a run.

    Args:
        path: of its folder.
        name: what it is called; None takes the folder's name.

    Raises:
        PretrainError: it is no run's folder, or cannot be read.
    """
    folder = RunFolder(path)
    if not folder.config.is_file():
        raise PretrainError(f"{path} holds no run; expected a config.yaml in it.")
    try:
        text = folder.config.read_text(encoding="utf-8", errors="replace")
        config, unfit = _settings(folder.config)
        holder = holder_of(path)  # before the history: a run that ends in between has said so there
        return RunData(
            folder,
            path.absolute().name if name is None else name,
            text,
            config,
            unfit,
            [_known(record) for record in read_metrics(folder) if _step(record)],
            _summary(folder.summary),
            read_history(folder),
            holder,
            [record for record in read_lines(folder.histograms) if _step(record)],
            read_lines(folder.bad_files),
            read_lines(folder.skipped_steps),
        )
    except OSError as error:
        raise PretrainError(f"run {path} cannot be read: {error.strerror or error}.") from None


def read_runs(paths: Sequence[Path]) -> list[RunData]:
    """Several runs, by the names of their folders, or by their paths where two have one name.

    Raises:
        PretrainError: one is none, or is given twice.
    """
    whole = [path.absolute() for path in paths]
    twice = next((path for path in whole if whole.count(path) > 1), None)
    if twice is not None:
        raise PretrainError(f"run {twice} is given twice; expected each run once.")
    names = [path.name for path in whole]
    return [
        read_run(path, given.name if names.count(given.name) == 1 else str(path))
        for path, given in zip(paths, whole, strict=True)
    ]


def _settings(path: Path) -> tuple[Config | None, str]:
    try:
        return read_config(path), ""
    except PretrainError as error:
        return None, str(error)


def _summary(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _step(record: Record) -> bool:
    return isinstance(record.get("step"), int) and not isinstance(record["step"], bool)


def _known(record: Record) -> Record:
    return {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in record.items()}


def _finite(value: Any) -> float | None:
    known = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if known else None
