"""The plot of ``bench.pretrain_methods --norms``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from bench.pretrain_tables import groups

COLOURS = ("#1f4e79", "#c55a11", "#548235")
DOTS_PER_INCH = 110


def plot_norms(results: Mapping[str, Any], path: Path) -> None:
    """The norms of the teacher's prototypes over the steps: a panel for each number of prototypes, a colour for each variant.

    Lines are medians over the prototypes, one for each seed; bands reach from the least to the largest norm.
    """
    counts = sorted({run["prototypes"] for run in results["runs"]})
    figure = Figure(figsize=(4.6 * len(counts), 3.6), dpi=DOTS_PER_INCH, layout="constrained")
    panels = figure.subplots(1, len(counts), squeeze=False)[0]
    for axes, prototypes in zip(panels, counts, strict=True):
        axes.set_title(f"{prototypes:,} prototypes")
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("norm of a prototype")
        axes.spines[["top", "right"]].set_visible(False)
        chosen = [run for run in results["runs"] if run["prototypes"] == prototypes]
        for (name, mine), colour in zip(groups(chosen), COLOURS, strict=False):
            for place, run in enumerate(mine):
                steps, least, median, largest = zip(*run["norms"], strict=True)
                axes.fill_between(steps, least, largest, color=colour, alpha=0.12, lw=0)
                axes.plot(steps, median, color=colour, lw=1.4, label=None if place else name)
    panels[0].legend(frameon=False, fontsize=9)
    FigureCanvasAgg(figure)
    figure.savefig(path)
