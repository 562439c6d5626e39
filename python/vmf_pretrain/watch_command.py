"""The sub-command ``vmf-pretrain watch``: follows a run of another process, also one that has not begun or has ended."""

import argparse
import json
import time
from pathlib import Path
from typing import Any

from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.config.paths import expanded
from vmf_pretrain.config.resume import resume_command
from vmf_pretrain.storage.lines import Followed
from vmf_pretrain.storage.lock import holder_of
from vmf_pretrain.storage.run_folder import RunFolder

NAME = "watch"
PAUSE = 1.0  # seconds between two looks at the run
LEFT = "Left; the run goes on."


def add_watch(commands: Any) -> None:
    """Add the sub-command's options to argparse's sub-commands."""
    command = commands.add_parser(NAME, help="follow a run of another process", allow_abbrev=False)
    command.add_argument("run", type=Path, metavar="RUN", help="folder of the run, also of one that has not begun yet")


def run_watch(chosen: argparse.Namespace) -> None:
    """Show the run until it ends, or until Ctrl-C; on standard output.

    Raises:
        PretrainError: the path is a file.
    """
    from vmf_pretrain.report.console import run_console

    folder = RunFolder(expanded(chosen.run, "RUN"))
    if folder.path.is_file():
        raise PretrainError(f"{folder.path} is a file; expected the folder of a run.")
    console = run_console()
    try:
        Watch(folder, console).follow()
    except KeyboardInterrupt:  # wherever it comes: what is watched does not feel it
        console.print(LEFT, highlight=False)


class Watch:
    """Shows a run as its records come.

    Args:
        folder: of the run.
        console: to print to.
        pause: seconds between two looks.
    """

    def __init__(self, folder: RunFolder, console: Any, pause: float = PAUSE) -> None:
        self._folder, self._console, self._pause = folder, console, pause
        self._records = Followed(folder.metrics)
        self._last: dict[str, Any] = {}  # the newest record of a training step
        self._waited = False

    def follow(self) -> None:
        """Until the run has ended."""
        from vmf_pretrain.engine.progress import RunProgress

        known = self._begun()
        if known is None:
            return
        trained = [record for record in known if "steps" in record]
        self._last = trained[-1] if trained else {}
        bar = RunProgress(self._console, int(self._last.get("steps", 0)), int(self._last.get("step", 0)))
        with bar as progress:
            for record in (*(one for one in known if "warning" in one), *trained[-1:]):
                self._show(record, progress)
            while self._running():
                time.sleep(self._pause)
                for record in self._records.new():
                    self._show(record, progress)
            for record in self._records.new():  # written between the last look and the end
                self._show(record, progress)
        self._say(self._ending())

    def _begun(self) -> list[dict[str, Any]] | None:
        """What the run has written so far, once it has begun; None if it ended before."""
        while True:
            found = self._records.new()
            if found or self._folder.summary.exists():
                return found
            holder = holder_of(self._folder.path)
            if holder is not None and holder.dead:
                self._say(f"Process {holder.pid} ended before the run in {self._folder.path} began.")
                return None
            if not self._waited:
                self._waited = True
                self._say(f"Waiting for the run in {self._folder.path} to begin (Ctrl-C leaves).")
            time.sleep(self._pause)

    def _running(self) -> bool:
        holder = holder_of(self._folder.path)
        return holder is not None and not holder.dead

    def _show(self, record: dict[str, Any], progress: Any) -> None:
        if "warning" in record:
            tried = f" Try: {record['try'][0]}." if record.get("try") else ""
            self._say(f"WARNING at step {record['step']}: {record['words']}{tried}")
            return
        if "steps" in record:
            self._last = record
            progress.total(int(record["steps"]))
        progress.advance(int(record["step"]))
        progress.learn(record)

    def _ending(self) -> str:
        """How the run has ended, in words."""
        step, steps = int(self._last.get("step", 0)), int(self._last.get("steps", 0))
        on = f"Go on with: {resume_command(self._folder.path)}"
        holder = holder_of(self._folder.path)
        if holder is not None:
            return f"The run was killed: process {holder.pid} ended after step {step} of {steps}, and still has the lock. {on}"
        summary = _summary(self._folder.summary)
        if summary is not None and summary.get("ended"):
            return f"The run has ended at step {step} of {steps}: {summary['ended']}"
        if step < steps or summary is None:
            return f"The run has stopped at step {step} of {steps}. {on}"
        return f"The run has ended at step {step} of {steps}. {_verdict(summary)}".rstrip()

    def _say(self, text: str) -> None:
        self._console.print(text, soft_wrap=True, highlight=False, markup=False)


def _summary(path: Path) -> dict[str, Any] | None:
    """What a run has left at its end; None if it has not, empty if that cannot be read."""
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _verdict(summary: dict[str, Any]) -> str:
    """The words of a run's verdict; "" if its summary has none."""
    said = summary.get("verdict")
    return str(said.get("words", "")) if isinstance(said, dict) else ""
