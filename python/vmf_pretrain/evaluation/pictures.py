"""Pictures that several rooms draw: rows of images beside what is made of them, and figures with their intervals.

Legend: N images, C channels.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

DOTS_PER_INCH = 120
TILE = 1.5  # side of an image, inches
LINE = 0.28  # height of a figure's line, inches

Line = tuple[str, float, float | None, float | None]  # name, value, and the ends of its interval


def plot_pictures(columns: Mapping[str, Tensor], path: Path) -> None:
    """One row for each image, one column for each kind of picture.

    Args:
        columns: [N, 1 or 3, H, W] pixels by title; values outside [0, 1] are shown as the nearest one inside.
        path: file to write.
    """
    count = len(next(iter(columns.values())))
    size = (TILE * len(columns) + 0.2, TILE * count + 0.5)
    figure = Figure(figsize=size, dpi=DOTS_PER_INCH, layout="constrained")
    grid = figure.subplots(count, len(columns), squeeze=False)
    for column, (title, images) in enumerate(columns.items()):
        grid[0, column].set_title(title, fontsize=9)
        for row, image in enumerate(images.detach().float().clamp(0, 1).cpu()):
            shown = image[0] if len(image) == 1 else image.permute(1, 2, 0)
            grid[row, column].imshow(shown.numpy(), cmap="gray", vmin=0.0, vmax=1.0)
            grid[row, column].set_xticks([])
            grid[row, column].set_yticks([])
    FigureCanvasAgg(figure)
    figure.savefig(path)


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
    FigureCanvasAgg(figure)
    figure.savefig(path)
