"""Features in one file: those that the network gives, with the names of their images."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from tests.pretrain.evaluation.tasks_at_work import CPU, photos_run, with_splits
from tests.pretrain.tiny import one_sentence
from vmf_pretrain.cli import BAD_INPUT, DONE, main
from vmf_pretrain.data.decode import decode
from vmf_pretrain.evaluation import stored
from vmf_pretrain.evaluation.evaluated import load_evaluated
from vmf_pretrain.evaluation.views import CentreSquare

pytestmark = pytest.mark.quick


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs, of which one is damaged."""
    return with_splits(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    return photos_run(data, tmp_path_factory.mktemp("runs") / "run")


def directly(run: Path, data: Path, names: list[str]) -> dict[str, NDArray[np.float32]]:
    """Every kind of feature by timm's own calls, an image at a time."""
    found = load_evaluated(str(run), device=CPU)
    network, size = found.network, found.fed.size
    assert isinstance(network, VisionTransformer)
    view = CentreSquare(size, round(size * 256 / 224))
    rows: dict[str, list[Tensor]] = {"class": [], "mean_patch": [], "patches": []}
    for name in names:
        inputs = found.fed.of(view(decode((data / name).read_bytes(), None)))[None]
        with torch.no_grad():
            tokens = network.forward_features(inputs)[0]
        patches = tokens[1:].reshape(4, 4, -1)
        rows["class"].append(tokens[0])
        rows["patches"].append(patches)
        rows["mean_patch"].append(patches.mean(dim=(0, 1)))
    return {kind: torch.stack(values).numpy() for kind, values in rows.items()}


@pytest.mark.parametrize("kind", ["class", "mean_patch", "patches"])
def test_npz_holds_the_features_of_every_readable_image(
    kind: str,
    run: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(stored, "CHUNK", 7)  # images of a stored part, so that there are several
    out = tmp_path / "features.npz"
    assert main(["embed", str(run), "--data", str(data), "--out", str(out), "--kind", kind]) == DONE
    with np.load(out, allow_pickle=False) as found:
        names, features, bad = found["names"].tolist(), found["features"], found["bad"].tolist()
    assert bad == ["train/dogs/damaged.png"]
    assert len(names) == 26
    np.testing.assert_allclose(features, directly(run, data, names)[kind], atol=1e-5)
    assert [path.name for path in tmp_path.iterdir()] == ["features.npz"], "parts are left"
    assert "26 images" in capsys.readouterr().out


def test_parquet_holds_the_same_or_says_what_is_missing(
    run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "features.parquet"
    code = main(["embed", str(run), "--data", str(data), "--out", str(out)])
    if importlib.util.find_spec("pyarrow") is None:
        assert code == BAD_INPUT
        assert "needs pyarrow" in capsys.readouterr().err
        return
    table = importlib.import_module("pyarrow.parquet").read_table(out)
    names = table.column("name").to_pylist()
    features = np.array(table.column("features").to_pylist(), dtype=np.float32)
    np.testing.assert_allclose(features, directly(run, data, names)["class"], atol=1e-5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--out", "features.csv"], "ends in .npz"),
        (["--out", "nowhere/features.npz"], "no folder nowhere"),
        (["--out", "features.npz", "--knn.neighbours", "[1]"], "does not go with embed"),
        (["--out", "features.npz", "--data.folder", "elsewhere"], "data.folder is given twice"),
    ],
)
def test_unfit_wishes_are_one_sentence(
    options: list[str], said: str, run: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["embed", str(run), "--data", str(data), *options]) == BAD_INPUT
    error = capsys.readouterr().err
    assert one_sentence(error), error
    assert said in error
