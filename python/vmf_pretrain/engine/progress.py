"""The progress of a run: a bar on a terminal, a line now and then elsewhere."""

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class RunProgress:
    """Context that shows the step, the newest numbers and the time left."""

    def __init__(self, console: Console, total_steps: int, first_step: int) -> None:
        self._console = console
        self._total = total_steps
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        self._bar = Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal)
        self._task = self._bar.add_task("", total=total_steps, completed=first_step)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def advance(self, step: int) -> None:
        """Show that ``step`` steps are done."""
        self._bar.update(self._task, completed=step)

    def tell(self, step: int, figures: dict[str, float]) -> None:
        """Show numbers: beside the bar, or as a line."""
        text = "  ".join(f"{name} {value:.3g}" for name, value in figures.items())
        if self._console.is_terminal:
            self._bar.update(self._task, description=text)
        else:
            self._console.print(f"step {step}/{self._total}  {text}", highlight=False, soft_wrap=True, markup=False)
