"""Pictures of a finished run: which are drawn, of which images, and with which neighbours."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from matplotlib.image import imread
from torch import Tensor, nn

from tests.pretrain.methods.masked_runs import masked_config
from tests.pretrain.tiny import a_run, changed, digits_config
from vmf_pretrain.cli import main
from vmf_pretrain.config.run import Config
from vmf_pretrain.data.bundled import DigitImages, digits
from vmf_pretrain.data.images import Found
from vmf_pretrain.data.network_input import NetworkInput
from vmf_pretrain.evaluation.evaluated import load_evaluated
from vmf_pretrain.evaluation.features import extract_features
from vmf_pretrain.evaluation.pictures import plot_neighbours
from vmf_pretrain.report import gallery

TRAIN, HELD_OUT = (part.subset(torch.arange(count)) for part, count in zip(digits(), (60, 40), strict=True))
METHODS = {
    "dino": ["attention.png", "neighbours.png", "pca.png", "views.png"],
    "mae": ["attention.png", "neighbours.png", "pca.png", "reconstructions.png", "views.png"],
    "ijepa": ["neighbours.png", "pca.png", "views.png"],
}
Rows = list[tuple[Tensor, list[str]]]


def few(config: Config, **_: Any) -> tuple[DigitImages, DigitImages, Found]:
    """The digits of this file in place of all."""
    return TRAIN, HELD_OUT, Found("some digits", 100, tuple("0123456789"), 40, facts={"images": 100, "held_out": None})


@pytest.fixture(autouse=True)
def neighbours(monkeypatch: pytest.MonkeyPatch) -> list[Rows]:
    """The rows of each figure of neighbours."""
    seen: list[Rows] = []

    def drawn(rows: Rows, path: Path) -> None:
        seen.append(rows)
        plot_neighbours(rows, path)

    monkeypatch.setattr(gallery, "plot_neighbours", drawn)
    monkeypatch.setattr(gallery, "load_images", few)
    monkeypatch.setattr(gallery, "SHOWN", 3)  # drawing takes longer than all the rest
    monkeypatch.setattr(gallery, "NEIGHBOURS", 3)
    monkeypatch.setattr("vmf_pretrain.engine.run.load_images", few)
    monkeypatch.setattr("vmf_pretrain.engine.run.draw_plots", lambda *_: None)
    return seen


def trained(method: str, out: Path) -> Path:
    """A run of one epoch of a step."""
    config = digits_config(method=method) if method == "dino" else masked_config(method)
    short = {"epochs": 1}
    a_run(changed(config, data={"batch_size": 60}, train=short), out)[0].train()
    return out


@pytest.mark.parametrize("method", METHODS)
def test_pictures_of_a_run_are_those_that_its_method_has(
    method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], neighbours: list[Rows]
) -> None:
    run, out = trained(method, tmp_path / "run"), tmp_path / "pictures"
    before = torch.random.get_rng_state()
    assert main(["pictures", str(run), "--out", str(out)]) == 0
    assert torch.equal(torch.random.get_rng_state(), before), "it drew from the global generator"
    written = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert sorted(path.name for path in written) == METHODS[method]
    assert all(path.parent == out and imread(path).std() > 0.01 for path in written)
    (rows,) = neighbours
    assert sorted(names[0] for _, names in rows) == ["0", "1", "2"], "each class in turn"
    assert_nearest(rows, run)


def assert_nearest(rows: Rows, run: Path) -> None:
    """Each row is a held-out digit, and the training digits whose features have the largest cosines, with their classes."""
    evaluated = load_evaluated(str(run), device=torch.device("cpu"))
    features = extract_features(evaluated.network, [evaluated.fed.of(TRAIN.evaluation_pixels(range(len(TRAIN))))])
    for pixels, names in rows:
        query = extract_features(evaluated.network, [evaluated.fed.of(pixels[:1])])
        cosines = torch.cosine_similarity(query.double(), features.double())
        places = [int((TRAIN.canvases == digit).flatten(1).all(dim=1).nonzero()[0]) for digit in pixels[1:]]
        worst = (cosines[places] - cosines.topk(gallery.NEIGHBOURS).values).abs().max().item()
        assert worst < 1e-5, f"not the nearest: cosines are {worst:.1e} off"
        assert names[1:] == [str(TRAIN.labels[place].item()) for place in places]
        assert any(torch.equal(pixels[0, 0], digit) for digit in HELD_OUT.canvases), "the query is no held-out digit"


class Unlabelled(Tensor):
    """Pixels of images or clips, one a row."""

    labels = None

    def evaluation_pixels(self, indices: list[int]) -> Tensor:
        return self.as_subclass(Tensor)[list(indices)]


@pytest.mark.quick
@pytest.mark.parametrize("shape", [(5, 1, 8, 8), (5, 4, 3, 8, 8)], ids=["images", "clips"])
def test_neighbours_without_held_out_images_are_other_ones_and_of_clips_a_frame_is_drawn(
    shape: tuple[int, ...], tmp_path: Path, neighbours: list[Rows]
) -> None:
    pixels, own = torch.rand(shape), [1, 3]
    network = nn.Sequential(nn.Flatten(), nn.Linear(pixels[0].numel(), 4))
    evaluated: Any = SimpleNamespace(network=network, fed=NetworkInput(8, (0.5,) * shape[-3], (1.0,) * shape[-3]))
    images: Any = pixels[own].as_subclass(Unlabelled), pixels.as_subclass(Unlabelled)
    gallery._draw_neighbours(evaluated, images, [], tmp_path / "neighbours.png", own=own)
    stills = pixels if pixels.ndim == 4 else pixels[:, 2]
    (rows,) = neighbours
    for place, (drawn, _) in zip(own, rows, strict=True):
        found = [[torch.equal(one, still) for still in stills].index(True) for one in drawn]
        assert found[0] == place
        assert len({*found}) == 4, f"image {place} has the neighbours {found[1:]}"


def test_pictures_of_what_is_no_run_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pictures", str(tmp_path)]) == 2
    assert "holds no run; expected a config.yaml in it." in capsys.readouterr().err
    assert main(["pictures", str(tmp_path), "--optim.clip", "1"]) == 2
    assert "--optim.clip does not go with pictures" in capsys.readouterr().err
