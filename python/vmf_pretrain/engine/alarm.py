"""Warnings in words while a run goes on: each fault once, with its evidence and one thing to try."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vmf_pretrain.config.run import Config
from vmf_pretrain.engine.votes import AgreedError
from vmf_pretrain.report.bands import HELD
from vmf_pretrain.report.caution import not_learning
from vmf_pretrain.report.verdict import verdict

WARNING = "warning"  # the key of a warning's kind in metrics.jsonl
RECENT = 200  # logged steps that are looked at: all of a long run would take longer each time
EXTREMES = (
    "mutual_information",
    "patch_mutual_information",
    "feature_rank",
)  # figures whose highest value so far matters


class CollapseError(AgreedError):
    """``train.stop_on_collapse`` ends the run."""


class Alarm:
    """Looks at every logged step of the first rank.

    Args:
        config: of the run.
        write: appends a record to metrics.jsonl.
        say: takes a sentence for a person.
        before: records of the run up to where it goes on.

    Attributes:
        warnings: what was said so far, as it stands in metrics.jsonl.
        stopped: why the run is to stop, if ``train.stop_on_collapse`` wishes so.
    """

    def __init__(
        self,
        config: Config,
        write: Callable[[Mapping[str, Any]], None],
        say: Callable[[str], None],
        before: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        self._config, self._write, self._say = config, write, say
        self.warnings = [dict(record) for record in before if WARNING in record]
        self.stopped: str | None = None
        self._first: list[Mapping[str, Any]] = []
        self._recent: list[Mapping[str, Any]] = []
        self._highest: dict[str, Mapping[str, Any]] = {}
        for record in before:
            if WARNING not in record:
                self._keep(record)

    def learn(self, record: Mapping[str, Any]) -> None:
        """Look at a logged step."""
        self._keep(record)
        found = verdict(self._kept(), self._config)
        if found.fault:
            self.warn(found.kind, found.step, found.words, found.evidence, found.advice)
            if self._config.train.stop_on_collapse:
                self.stopped = f"{found.words} Try: {found.advice[0]}."
            return
        caution = not_learning(self._kept(), self._config)
        if caution is not None:
            self.warn(caution.kind, found.step, caution.words, caution.evidence, caution.advice)

    def warn(self, kind: str, step: int, words: str, evidence: Sequence[str], advice: Sequence[str]) -> None:
        """Say and write a warning, unless one of its kind was before."""
        if any(said[WARNING] == kind for said in self.warnings):
            return
        record = {"step": step, WARNING: kind, "words": words, "evidence": list(evidence), "try": list(advice)}
        self.warnings.append(record)
        self._write(record)
        because = f" ({evidence[0]})" if evidence else ""
        tried = f" Try: {advice[0]}." if advice else ""
        self._say(f"WARNING at step {step}: {words}{because}{tried}")

    def _keep(self, record: Mapping[str, Any]) -> None:
        if len(self._first) < HELD and "loss" in record:
            self._first.append(record)
        self._recent = [*self._recent[1 - RECENT :], record]
        for name in EXTREMES:
            value, best = record.get(name), self._highest.get(name)
            if value is not None and (best is None or value > best[name]):
                self._highest[name] = record

    def _kept(self) -> list[Mapping[str, Any]]:
        """The records that matter, in order."""
        since = int(self._recent[0]["step"])
        old = (*self._first, *self._highest.values())
        unique = {int(record["step"]): record for record in old if int(record["step"]) < since}
        return [*(unique[step] for step in sorted(unique)), *self._recent]
