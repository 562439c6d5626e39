"""Plots: what is drawn, read back from the figure; and that a readable image is written."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.patches import Rectangle
from matplotlib.text import Text

from tests.on_ranks import imported_after
from vmf_pretrain.evaluation.pictures import save_figure
from vmf_pretrain.report import plots
from vmf_pretrain.report.plots import plot_attention, plot_kappa, plot_knn, plot_loss, plot_usage

PROTOTYPES = 512
RECORDS = [{"step": 10 * i, "loss": 5.0 - i, "teacher_entropy": 4.0 - i, "kl": 1.0} for i in range(4)]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Every figure saved."""
    figures: list[Figure] = []

    def keep(figure: Figure, path: Path) -> None:
        figures.append(figure)
        save_figure(figure, path)

    monkeypatch.setattr(plots, "save_figure", keep)
    return figures


def texts(figure: Figure) -> list[str]:
    """Every text that is shown."""
    return [text.get_text() for text in figure.findobj(Text) if text.get_text() and text.get_visible()]


def assert_readable(path: Path) -> None:
    """An image of a useful size in which something is drawn."""
    pixels = imread(path)
    height, width = pixels.shape[:2]
    assert height >= 200, f"{path.name} is {width} x {height}"
    assert width >= 400, f"{path.name} is {width} x {height}"
    ink = float((pixels[..., :3].min(axis=-1) < 0.9).mean())
    assert 0.002 < ink < 0.98, f"{path.name} has {100 * ink:.2f} % ink"


def assert_labelled(axes: Axes, x: str, y: str) -> None:
    got = (axes.get_xlabel(), axes.get_ylabel())
    assert axes.get_title(), "the axes have no title"
    assert x in got[0], f"axes are labelled {got}"
    assert y in got[1], f"axes are labelled {got}"


def rectangles(axes: Axes) -> list[Rectangle]:
    """Every patch, all of which are bars or bands."""
    found = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    assert len(found) == len(axes.patches), axes.patches
    return found


def heights(axes: Axes) -> dict[float, float]:
    """Height of every bar that is not 0 by its left edge."""
    return {bar.get_x(): bar.get_height() for bar in rectangles(axes) if bar.get_height()}


def test_the_loss_is_drawn_with_its_parts_between_bands_of_collapse(tmp_path: Path, drawn: list[Figure]) -> None:
    plot_loss(RECORDS, PROTOTYPES, tmp_path / "loss.png")
    axes = drawn[0].axes[0]
    assert_labelled(axes, "step", "nats")
    lines = {str(line.get_label()): line for line in axes.lines}
    assert list(lines) == ["loss", "teacher entropy H(q)", "KL(q || p)"], f"lines are {list(lines)}"
    for line, key in zip(lines.values(), ("loss", "teacher_entropy", "kl"), strict=True):
        assert np.asarray(line.get_ydata()).tolist() == [record[key] for record in RECORDS], (
            f"{key} is {line.get_ydata()}"
        )
        assert np.asarray(line.get_xdata()).tolist() == [0, 10, 20, 30], f"steps of {key} are {line.get_xdata()}"
    middles = [band.get_y() + band.get_height() / 2 for band in rectangles(axes)]
    assert middles == pytest.approx([0.0, math.log(PROTOTYPES)]), f"bands lie at {middles}"
    for label in ("one-hot collapse: 0", "uniform collapse: ln 512 = 6.24"):
        assert label in texts(drawn[0]), f"{label!r} is not among {texts(drawn[0])}"
    assert_readable(tmp_path / "loss.png")


def test_a_run_without_steps_says_so(tmp_path: Path, drawn: list[Figure]) -> None:
    plot_loss([], PROTOTYPES, tmp_path / "loss.png")
    assert "no step was logged" in texts(drawn[0]), f"texts are {texts(drawn[0])}"
    assert_readable(tmp_path / "loss.png")


def test_knn_is_drawn_beside_its_baselines(tmp_path: Path, drawn: list[Figure]) -> None:
    points = [{"step": 0, "knn": 60.0}, {"step": 50, "rankme": 3.0}, {"step": 100, "knn": 90.25}]
    plot_knn(points, {"pixels": 95.0, "untrained": 62.5}, tmp_path / "knn.png")
    axes = drawn[0].axes[0]
    assert_labelled(axes, "step", "percent")
    run = axes.lines[-1]
    assert np.asarray(run.get_xydata()).tolist() == [[0, 60.0], [100, 90.25]]
    levels = {str(line.get_label()): float(np.asarray(line.get_ydata())[0]) for line in axes.lines[:-1]}
    assert levels == {"pixels: 95.0 %": 95.0, "untrained: 62.5 %": 62.5}, f"baselines are {levels}"
    for label in (*levels, "this run: 90.2 % at the end"):
        assert label in texts(drawn[0]), f"{label!r} is not among {texts(drawn[0])}"
    assert_readable(tmp_path / "knn.png")


@pytest.mark.parametrize("points", [[], [{"step": 0, "knn": None}], [{"step": 0, "rankme": 3.0}]])
def test_images_without_labels_make_a_figure_that_says_so(
    tmp_path: Path, drawn: list[Figure], points: list[dict[str, float]]
) -> None:
    plot_knn(points, {}, tmp_path / "knn.png")
    assert any("no labels" in text for text in texts(drawn[0])), f"texts are {texts(drawn[0])}"
    assert_readable(tmp_path / "knn.png")


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        (torch.tensor([0.5, 0.25, 0.25, 0.0]), {-4: 1, 0: 3}),
        (torch.full((64,), 1 / 64), {0: 64}),
        (torch.eye(4096)[0], {-4: 4095, 3: 1}),
    ],
    ids=["one-dead", "uniform", "one-for-all"],
)
def test_every_prototype_is_in_the_histogram_of_usage(
    tmp_path: Path, drawn: list[Figure], usage: torch.Tensor, expected: dict[int, int]
) -> None:
    plot_usage(usage, tmp_path / "usage.png")
    axes = drawn[0].axes[0]
    assert_labelled(axes, "times K", "prototypes")
    assert axes.get_xscale() == "log", f"the axis is {axes.get_xscale()}"
    counted: dict[int, int] = {}
    for left, height in heights(axes).items():
        decade = math.floor(math.log10(left) + 1e-9)
        counted[decade] = counted.get(decade, 0) + int(height)
    assert counted == expected, f"prototypes by decade are {counted}"
    assert float(np.asarray(axes.lines[0].get_xdata())[0]) == 1.0, "uniform use is not marked at 1"
    dead = int((usage == 0).sum())
    assert any(f"{dead} below" in text for text in texts(drawn[0])) == bool(dead), f"texts are {texts(drawn[0])}"
    assert_readable(tmp_path / "usage.png")


@pytest.mark.parametrize("kappa", [torch.linspace(5, 25, 201), torch.full((64,), 10.0)], ids=["spread", "equal"])
def test_every_concentration_is_in_the_histogram(tmp_path: Path, drawn: list[Figure], kappa: torch.Tensor) -> None:
    plot_kappa(kappa, tmp_path / "kappa.png")
    axes = drawn[0].axes[0]
    assert_labelled(axes, "‖w‖ / τ", "prototypes")
    total = sum(heights(axes).values())
    assert total == len(kappa), f"{total} of {len(kappa)} prototypes are drawn"
    assert f"median {kappa.median().item():.3g}" in texts(drawn[0]), f"texts are {texts(drawn[0])}"
    assert_readable(tmp_path / "kappa.png")


@pytest.mark.parametrize("channels", [1, 3])
def test_attention_is_drawn_as_image_mean_and_heads(tmp_path: Path, drawn: list[Figure], channels: int) -> None:
    images, maps = torch.randn(2, channels, 16, 24), torch.rand(2, 3, 4, 6) / 24
    plot_attention(images, maps, tmp_path / "attention.png")
    panels = [axes for axes in drawn[0].axes if axes.get_images() and axes.get_label() != "<colorbar>"]
    titles = [axes.get_title() for axes in panels[:5]]
    assert titles == ["image", "mean of heads", "head 1", "head 2", "head 3"], f"titles are {titles}"
    assert len(panels) == 2 * 5, f"{len(panels)} panels"
    for row in range(2):
        shown = [axes.get_images()[0] for axes in panels[5 * row : 5 * row + 5]]
        picture = np.asarray(shown[0].get_array())
        assert picture.shape == ((16, 24) if channels == 1 else (16, 24, 3)), f"the image has shape {picture.shape}"
        assert (picture.min(), picture.max()) == (0.0, 1.0), f"it spans {picture.min()} to {picture.max()}"
        expected = [maps[row].mean(0), *maps[row]]
        for panel, values in zip(shown[1:], expected, strict=True):
            error = float(np.abs(np.asarray(panel.get_array()) - values.numpy()).max())
            assert error < 1e-6, f"row {row} is off by {error}"
            assert panel.get_clim() == pytest.approx((0.0, maps[row].max().item())), f"scale is {panel.get_clim()}"
    assert sum("share of attention" in text for text in texts(drawn[0])) == 2, f"texts are {texts(drawn[0])}"
    assert_readable(tmp_path / "attention.png")


def test_an_image_of_one_brightness_is_drawn(tmp_path: Path, drawn: list[Figure]) -> None:
    plot_attention(torch.full((1, 1, 8, 8), 0.7), torch.full((1, 2, 2, 2), 0.25), tmp_path / "attention.png")
    picture = np.asarray(drawn[0].axes[0].get_images()[0].get_array())
    assert not picture.any(), f"it holds {np.unique(picture)}"


@pytest.mark.parametrize(("images", "maps"), [(2, 3), (0, 0)])
def test_images_without_their_maps_are_refused(tmp_path: Path, images: int, maps: int) -> None:
    with pytest.raises(ValueError, match=f"images are {images} but maps {maps}"):
        plot_attention(torch.zeros(images, 1, 8, 8), torch.zeros(maps, 2, 2, 2), tmp_path / "attention.png")


def test_the_same_figure_is_the_same_file(tmp_path: Path) -> None:
    for name in ("one.png", "two.png"):
        plot_loss(RECORDS, PROTOTYPES, tmp_path / name)
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()


def test_plotting_leaves_matplotlibs_settings_alone(tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    plot_loss(RECORDS, PROTOTYPES, tmp_path / "loss.png")
    changed = [name for name, value in matplotlib.rcParams.items() if before[name] != value]
    assert not changed, f"{changed} changed"


def test_training_does_not_import_pyplot() -> None:
    imported = imported_after()
    assert "vmf_pretrain.report.plots" in imported
    assert "matplotlib.pyplot" not in imported
