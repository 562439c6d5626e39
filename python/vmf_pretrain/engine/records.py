"""The lists that a run writes as it goes: numbers, histograms, unreadable images, skipped steps. The first rank writes them."""

from collections.abc import Mapping
from typing import Any, Protocol

from vmf_pretrain.config.run import Config
from vmf_pretrain.storage.lines import JsonLines
from vmf_pretrain.storage.metrics import MetricsLog
from vmf_pretrain.storage.run_folder import RunFolder
from vmf_pretrain.storage.tolerant import TolerantWrites
from vmf_pretrain.storage.trackers import Tracked


class _Writes(Protocol):
    def write(self, record: Mapping[str, Any]) -> None: ...


class _Nothing:
    """What the other ranks write to."""

    def write(self, record: Mapping[str, Any]) -> None:
        """Nothing."""


class Records:
    """metrics.jsonl with TensorBoard's events, histograms.jsonl, bad_files.jsonl and skipped_steps.jsonl.

    Args:
        folder: of the run.
        step: that the run begins or goes on with; records of steps that run again are dropped.
        tolerant: takes what the disk refuses.
        config: of the run; its section ``log`` says what gets the numbers beside metrics.jsonl.
        writes: whether this is the first rank.
    """

    def __init__(self, folder: RunFolder, step: int, tolerant: TolerantWrites, config: Config, *, writes: bool) -> None:
        self.metrics: _Writes = _Nothing()
        self.bad: _Writes = _Nothing()
        self.skipped: _Writes = _Nothing()
        self.histograms: _Writes = _Nothing()
        self._metrics: MetricsLog | None = None
        self._lists: list[JsonLines] = []
        if writes:
            tracked = Tracked(config, folder, tolerant.say)
            log = MetricsLog(folder, step, tolerant, tensorboard=config.log.tensorboard, tracked=tracked)
            self.metrics = self._metrics = log
            paths = (folder.bad_files, folder.skipped_steps)
            self._lists = [JsonLines(path, tolerant, lambda record: record.get("step", 0) < step) for path in paths]
            self.bad, self.skipped = self._lists
            # of the state after its step, as a record of the metrics is
            histograms = JsonLines(folder.histograms, tolerant, lambda record: record.get("step", 0) <= step)
            self._lists.append(histograms)
            self.histograms = histograms

    def close(self) -> None:
        """Try once more to write what the disk refused."""
        if self._metrics is not None:
            self._metrics.close()
        for each in self._lists:
            each.flush()
