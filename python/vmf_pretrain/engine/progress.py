"""The progress of a run: a bar with the newest figures on a terminal, a line now and then elsewhere."""

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

SHOWN = {  # what a person sees, by its name in metrics.jsonl, in order; what a method does not log is left out
    "loss": ("loss", "{:.3f}"),
    "teacher_entropy": ("H(q)", "{:.2f}"),
    "kl": ("KL", "{:.2f}"),
    "mutual_information": ("MI", "{:.2f}"),
    "relative_loss": ("of constant", "{:.2f}"),
    "prototypes_in_use": ("prototypes", "{:.0f}"),
    "feature_rank": ("rank", "{:.1f}"),
    "knn": ("k-NN", "{:.1f} %"),
    "images_per_second": ("images/s", "{:.0f}"),
    "data_wait": ("data wait", "{:.0%}"),
    "memory_gib": ("memory", "{:.2f} GiB"),
}
REFRESHES = 4  # of a terminal, a second
PERCENT = " %"


class RunProgress:
    """Context that shows the step, the newest figures and the time left.

    Args:
        console: to print to.
        total_steps: of the run.
        first_step: that the run begins or goes on with.
    """

    def __init__(self, console: Console, total_steps: int, first_step: int) -> None:
        self._console, self._total = console, total_steps
        self._step = self._from = first_step
        self._since = time.perf_counter()
        self._figures: dict[str, str] = {}
        columns = (BarColumn(), MofNCompleteColumn(), TaskProgressColumn(), TimeElapsedColumn())
        self._bar = Progress(*columns, console=console)
        self._task = self._bar.add_task("", total=total_steps, completed=first_step)
        on = console.is_terminal and not console.quiet
        self._live = Live(console=console, get_renderable=self._shown, refresh_per_second=REFRESHES) if on else None

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def advance(self, step: int) -> None:
        """Show that ``step`` steps are done."""
        self._step = step
        self._bar.update(self._task, completed=step)

    def total(self, steps: int) -> None:
        """Show how many steps the run has, where that was not known before."""
        self._total = steps
        self._bar.update(self._task, total=steps)

    def learn(self, record: Mapping[str, Any]) -> None:
        """Show a record of metrics.jsonl: beside the bar, or as a line."""
        found = figures_of(record)
        if not found:
            return
        self._figures |= found
        if self._live is not None:
            return
        self.advance(int(record["step"]))
        text = "  ".join(f"{name} {value}" for name, value in found.items())
        self._console.print(
            f"step {self._step}/{self._total}  {text}  {self.left}", highlight=False, soft_wrap=True, markup=False
        )

    @property
    def left(self) -> str:
        """The time left at the speed so far, as words; "" before the first step."""
        done = self._step - self._from
        if done <= 0:
            return ""
        seconds = (time.perf_counter() - self._since) / done * (self._total - self._step)
        return f"ETA {duration(seconds)}"

    def _shown(self) -> Group:
        figures = Table.grid(padding=(0, 2))
        cells = [*self._figures.items(), *([("ETA", self.left.removeprefix("ETA "))] if self.left else [])]
        figures.add_row(*(Text.assemble((f"{name} ", "dim"), value) for name, value in cells))
        return Group(self._bar, figures)


def figures_of(record: Mapping[str, Any]) -> dict[str, str]:
    """What is shown of a record, in order, by the names that a person sees; accuracies of other evaluations as percent."""
    found = {}
    for key, (name, form) in SHOWN.items():
        if isinstance(record.get(key), int | float):
            found[name] = form.format(record[key])
    if "loss" not in record and "total" not in record:
        rest = {key: value for key, value in record.items() if key not in ("step", "steps", "epoch", *SHOWN)}
        found |= {key: f"{value:.1f}{PERCENT}" for key, value in rest.items() if isinstance(value, float)}
    return found


def duration(seconds: float) -> str:
    """A time in its two largest units: 3 h 05 min, 12 min 30 s, 8 s."""
    whole = round(seconds)
    minutes, hours = whole // 60, whole // 3600
    if hours:
        return f"{hours} h {minutes % 60:02d} min"
    return f"{minutes} min {whole % 60:02d} s" if minutes else f"{whole} s"
