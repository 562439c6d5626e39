"""Figures of a run, written as PNG without a display or any global state.

Legend: N images, K prototypes, h x w patches.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from vmf_pretrain.evaluation.histograms import LOWEST_USAGE
from vmf_pretrain.evaluation.pictures import save_figure

DOTS_PER_INCH = 120
BAND = 0.025  # half-height of a band of collapse, as a share of ln K
USAGE_BINS_PER_DECADE = 8
KAPPA_BINS = 50
TILE = 1.5  # side of an image, inches
COLOURS = ("#1f4e79", "#c55a11", "#548235", "#7f6000", "#7030a0")


def plot_loss(records: Sequence[Mapping[str, float]], prototypes: int, path: Path) -> None:
    """The loss and its two parts over the steps, with bands where a collapsed head would be.

    Args:
        records: with the keys "step", "loss", "teacher_entropy" (mean H(q)) and "kl" (mean KL(q || p)), in nats.
        prototypes: K; ``ln K`` is the entropy of a uniform assignment.
        path: file to write.
    """
    figure, axes = _figure("Training loss = teacher entropy + KL divergence", "optimizer step", "nats")
    uniform = math.log(prototypes)
    for level, name in ((0.0, "one-hot collapse: 0"), (uniform, f"uniform collapse: ln {prototypes} = {uniform:.2f}")):
        axes.axhspan(level - BAND * uniform, level + BAND * uniform, color="#d9d9d9", zorder=0)
        axes.text(0.99, level, name, transform=axes.get_yaxis_transform(), ha="right", va="center", fontsize=8)
    parts = {"loss": "loss", "teacher_entropy": "teacher entropy H(q)", "kl": "KL(q || p)"}
    for (key, name), colour in zip(parts.items(), COLOURS, strict=False):
        steps = [record["step"] for record in records]
        axes.plot(steps, [record[key] for record in records], label=name, color=colour, lw=2 if key == "loss" else 1.2)
    if records:
        _legend_below(figure)
    else:
        _say(axes, "no step was logged")
    save_figure(figure, path)


def plot_knn(evaluations: Sequence[Mapping[str, Any]], baselines: Mapping[str, float], path: Path) -> None:
    """k-NN accuracy over the steps, and accuracies that need no training.

    Args:
        evaluations: with the keys "step" and "knn" (percent); entries without "knn" are ignored. If none has it, the figure
            says that there are no labels.
        baselines: percent by name.
        path: file to write.
    """
    figure, axes = _figure("k-NN accuracy on held-out images", "optimizer step", "accuracy, percent")
    measured = [(point["step"], point["knn"]) for point in evaluations if point.get("knn") is not None]
    for (name, accuracy), colour in zip(baselines.items(), _cycle(len(baselines)), strict=True):
        axes.axhline(accuracy, color=colour, ls="--", lw=1.2, label=f"{name}: {accuracy:.1f} %")
    if measured:
        steps, accuracies = zip(*measured, strict=True)
        axes.plot(
            steps, accuracies, "o-", color=COLOURS[0], lw=2, ms=4, label=f"this run: {accuracies[-1]:.1f} % at the end"
        )
    else:
        axes.set_ylim(0, 100)
        _say(axes, "no labels, so there is no k-NN accuracy")
    if measured or baselines:
        _legend_below(figure)
    save_figure(figure, path)


def plot_usage(usage: Tensor, path: Path) -> None:
    """Histogram of [K] mean probabilities of the prototypes, times K, on a logarithmic axis."""
    relative = usage.detach().double().cpu() * usage.shape[0]
    title = f"How often each of {usage.shape[0]} prototypes is used"
    figure, axes = _figure(title, "mean probability times K", "prototypes")
    dead = int((relative < LOWEST_USAGE).sum())
    low = math.floor(math.log10(LOWEST_USAGE))
    high = max(1, math.ceil(math.log10(max(float(relative.max()), 1.0))))
    edges = torch.logspace(low, high, (high - low) * USAGE_BINS_PER_DECADE + 1, dtype=torch.float64)
    clipped = relative.clamp(LOWEST_USAGE, float(edges[-1]))
    edges[0], edges[-1] = LOWEST_USAGE, max(float(edges[-1]), float(clipped.max()))  # as rounded as what they hold
    axes.hist(clipped.numpy(), bins=edges.tolist(), color=COLOURS[0])
    axes.axvline(1.0, color=COLOURS[1], ls="--", label="1 = uniform use")
    if dead:
        axes.axvline(LOWEST_USAGE, color=COLOURS[4], ls=":", label=f"{dead} below {LOWEST_USAGE:g}, counted here")
    axes.set_xscale("log")
    _legend_below(figure)
    save_figure(figure, path)


def plot_kappa(kappa: Tensor, path: Path) -> None:
    """Histogram of [K] concentrations ``||w|| / tau`` of the prototypes, with their median."""
    values = kappa.detach().double().cpu()
    title = f"Concentrations of {values.shape[0]} prototypes"
    figure, axes = _figure(title, "concentration κ = ‖w‖ / τ (dimensionless)", "prototypes")
    axes.hist(values.numpy(), bins=KAPPA_BINS, color=COLOURS[0])
    median = float(values.median())
    axes.axvline(median, color=COLOURS[1], ls="--", label=f"median {median:.3g}")
    _legend_below(figure)
    save_figure(figure, path)


def plot_attention(images: Tensor, maps: Tensor, path: Path) -> None:
    """Each image with the class token's attention beside it: the mean over heads, then every head.

    Args:
        images: [N, 1 or 3, H, W]; each is stretched to the full range of brightness.
        maps: [N, heads, h, w] shares of attention; each image has one colour scale, from 0 to its highest share.
        path: file to write.

    Raises:
        ValueError: the numbers of images differ, or there is none.
    """
    count, heads = maps.shape[:2]
    if count != images.shape[0] or not count:
        raise ValueError(f"images are {images.shape[0]} but maps {count}; expected the same number, at least 1")
    columns = 2 + heads
    figure = Figure(figsize=(TILE * columns + 1.2, TILE * count + 0.9), dpi=DOTS_PER_INCH, layout="constrained")
    figure.suptitle("Where the class token looks in the last block")
    grid = figure.subplots(count, columns, squeeze=False)
    names = ["image", "mean of heads", *(f"head {head}" for head in range(1, heads + 1))]
    for column, name in enumerate(names):
        grid[0, column].set_title(name, fontsize=9)
    for row in range(count):
        _draw_attention(figure, list(grid[row]), images[row], maps[row])
    save_figure(figure, path)


def _draw_attention(figure: Figure, row: list[Axes], image_CHW: Tensor, maps_Hhw: Tensor) -> None:
    """One image, its mean map and its maps per head, with a scale at the end."""
    for axes in row:
        axes.set_xticks([])
        axes.set_yticks([])
    row[0].imshow(_displayable(image_CHW).numpy(), cmap="gray", vmin=0.0, vmax=1.0)
    shares = maps_Hhw.detach().float().cpu()
    highest = float(shares.max())
    for axes, share in zip(row[1:], [shares.mean(dim=0), *shares], strict=True):
        drawn = axes.imshow(share.numpy(), cmap="viridis", vmin=0.0, vmax=highest)
    scale = figure.colorbar(drawn, ax=row, location="right", pad=0.01, aspect=12)
    scale.set_label("share of attention\nper patch", fontsize=7)
    scale.ax.tick_params(labelsize=7)


def _displayable(image_CHW: Tensor) -> Tensor:
    """[H, W] or [H, W, 3] in [0, 1]; an image of uniform brightness becomes black."""
    image = image_CHW.detach().float().cpu()
    low, high = image.min(), image.max()
    stretched = (image - low) / (high - low).clamp(min=torch.finfo(torch.float32).tiny)
    return stretched[0] if stretched.shape[0] == 1 else stretched.permute(1, 2, 0)


def _figure(title: str, x_label: str, y_label: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7.0, 4.4), dpi=DOTS_PER_INCH, layout="constrained")
    axes = figure.subplots()
    axes.set_title(title)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _cycle(count: int) -> list[str]:
    """Colours of ``count`` lines beside the run's own."""
    others = COLOURS[1:]
    return [others[i % len(others)] for i in range(count)]


def _legend_below(figure: Figure) -> None:
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)


def _say(axes: Axes, text: str) -> None:
    """Write ``text`` in place of the curves, and remove the ticks of the steps."""
    axes.set_xticks([])
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", fontsize=12)
