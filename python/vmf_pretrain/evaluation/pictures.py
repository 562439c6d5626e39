"""Pictures that several rooms draw: images beside what is made of them or beside their neighbours, figures, and curves.

Legend: N images, C channels.
"""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from vmf_pretrain.storage.durable import replace_durably

DOTS_PER_INCH = 120
TILE = 1.5  # side of an image, inches
SMALL_TILE = 0.8  # the same of a neighbour
OTHER_CLASS = "#c00000"
QUERY = "#1f4e79"  # frame of a query
LINE = 0.28  # height of a figure's line, inches

Line = tuple[str, float, float | None, float | None]  # name, value, and the ends of its interval


def plot_pictures(columns: Mapping[str, Tensor], path: Path, rows: Sequence[str] = ()) -> None:
    """One row for each image, one column for each kind of picture.

    Args:
        columns: [N, 1 or 3, H, W] pixels by title; values outside [0, 1] are shown as the nearest one inside.
        path: file to write.
        rows: titles of the rows, or none.
    """
    count = len(next(iter(columns.values())))
    size = (TILE * len(columns) + 0.2, TILE * count + 0.5)
    figure = Figure(figsize=size, dpi=DOTS_PER_INCH, layout="constrained")
    grid = figure.subplots(count, len(columns), squeeze=False)
    for column, (title, images) in enumerate(columns.items()):
        grid[0, column].set_title(title, fontsize=9)
        for row, image in enumerate(images):
            _draw(grid[row, column], image)
    for row, title in enumerate(rows):
        grid[row, 0].set_ylabel(title, fontsize=7)
    save_figure(figure, path)


def plot_neighbours(rows: Sequence[tuple[Tensor, Sequence[str]]], path: Path) -> None:
    """One row for each query: the query, and its neighbours with their classes; another class than the query's is marked.

    Args:
        rows: [1 + k, 1 or 3, H, W] pixels, the query first, and the name of each one's class, "" without classes.
        path: file to write.
    """
    columns = max(len(pixels) for pixels, _ in rows)
    size = (SMALL_TILE * columns, 1.15 * SMALL_TILE * len(rows))
    figure = Figure(figsize=size, dpi=DOTS_PER_INCH, layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for axes, (pixels, names) in zip(grid, rows, strict=True):
        for place, (image, name) in enumerate(zip(pixels, names, strict=True)):
            _draw(axes[place], image)
            axes[place].set_title(name, fontsize=6, pad=2, color=OTHER_CLASS if name != names[0] else "black")
        for spine in axes[0].spines.values():
            spine.set(linewidth=2, edgecolor=QUERY)
    save_figure(figure, path)


def plot_intervals(lines: Sequence[Line], unit: str, path: Path) -> None:
    """One line for each figure: a dot at its value, and a bar over its interval.

    Args:
        lines: the first one is drawn at the top; all have the same unit.
        unit: of the horizontal axis.
        path: file to write.
    """
    figure = Figure(figsize=(6.5, 0.9 + LINE * len(lines)), dpi=DOTS_PER_INCH, layout="constrained")
    axes = figure.subplots()
    for height, (_, value, low, high) in enumerate(lines):
        axes.plot([value], [height], "o", color="C0", markersize=4)
        if low is not None and high is not None:
            axes.plot([low, high], [height, height], color="C0", linewidth=1.5)
    axes.set_yticks(range(len(lines)), [name for name, *_ in lines], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(f"{unit or 'value'} (bar: 95 % bootstrap interval)", fontsize=8)
    axes.grid(axis="x", alpha=0.3)
    save_figure(figure, path)


def plot_curves(curves: Mapping[str, Sequence[tuple[float, float]]], across: str, up: str, path: Path) -> None:
    """A line for each entry, over a logarithmic horizontal axis.

    Args:
        curves: pairs of a positive setting and a value, by what the legend calls them.
        across: title of the horizontal axis.
        up: of the vertical one.
        path: file to write.
    """
    figure = Figure(figsize=(6.5, 4.0), dpi=DOTS_PER_INCH, layout="constrained")
    axes = figure.subplots()
    for name, pairs in curves.items():
        axes.plot([x for x, _ in pairs], [y for _, y in pairs], "o-", markersize=3, linewidth=1, label=name)
    axes.set_xscale("log")
    axes.set_xlabel(across, fontsize=8)
    axes.set_ylabel(up, fontsize=8)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    save_figure(figure, path)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, whole or not at all. Raises OSError."""
    FigureCanvasAgg(figure)
    drawn = io.BytesIO()
    figure.savefig(drawn)
    replace_durably(path, drawn.getvalue())


def _draw(axes: Axes, image_CHW: Tensor) -> None:
    """An image without ticks; values outside [0, 1] are shown as the nearest one inside."""
    image = image_CHW.detach().float().clamp(0, 1).cpu()
    shown = image[0] if len(image) == 1 else image.permute(1, 2, 0)
    axes.imshow(shown.numpy(), cmap="gray", vmin=0.0, vmax=1.0)
    axes.set_xticks([])
    axes.set_yticks([])
