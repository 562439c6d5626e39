"""Rows of images beside what a method makes of them.

Legend: N images, C channels.
"""

from collections.abc import Mapping
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

DOTS_PER_INCH = 120
TILE = 1.5  # side of an image, inches


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
