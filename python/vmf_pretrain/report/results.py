"""The results of an evaluation on the terminal, as tables."""

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from vmf_pretrain.evaluation.result import Figure, Result


def print_result(console: Console, name: str, result: Result, where: str, *, before: bool) -> None:
    """A task's figures with their intervals, its notes, and where the rest of it is.

    Args:
        console: to print to.
        name: of the task.
        result: of the task.
        where: its folder.
        before: whether it had finished before and was not run again.
    """
    console.print(_table(name, result.figures))
    for note in result.notes:
        console.print(f"  {note}", markup=False, highlight=False, soft_wrap=True)
    again = " (finished before, not run again)" if before else ""
    console.print(f"  {where}{again}", markup=False, highlight=False, soft_wrap=True)


def features_progress(console: Console) -> Progress:
    """A bar of images whose features are computed; nothing on what is no terminal."""
    columns = TextColumn("features"), BarColumn(), MofNCompleteColumn(), TaskProgressColumn(), TimeRemainingColumn()
    return Progress(*columns, console=console, disable=not console.is_terminal or console.quiet, transient=True)


def _table(name: str, figures: Sequence[Figure]) -> Table:
    spread = any(figure.spread is not None for figure in figures)
    table = Table(title=escape(name), title_justify="left", show_edge=False, pad_edge=False)
    table.add_column("figure")
    table.add_column("value", justify="right")
    table.add_column("95 % interval", justify="right")
    if spread:
        table.add_column("deviation over draws", justify="right")
    for figure in figures:
        cells = [escape(figure.name), _number(figure.value, figure.unit), _interval(figure)]
        table.add_row(*cells, *([_spread(figure)] if spread else []))
    return table


def _number(value: float, unit: str) -> str:
    return f"{value:.2f} {unit}" if unit else f"{value:.4g}"


def _interval(figure: Figure) -> str:
    if figure.low is None or figure.high is None:
        return ""
    return f"{_bare(figure.low, figure.unit)} to {_bare(figure.high, figure.unit)}"


def _spread(figure: Figure) -> str:
    return "" if figure.spread is None else _bare(figure.spread, figure.unit)


def _bare(value: float, unit: str) -> str:
    return f"{value:.2f}" if unit else f"{value:.4g}"
