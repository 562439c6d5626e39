"""Tasks that show what a network looks at: attention, components of patches, prototypes, neighbours."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.metrics import jaccard_score
from sklearn.neighbors import NearestNeighbors

from tests.pretrain.evaluation.tasks_at_work import digits_run, photos_run, run_of
from tests.pretrain.tiny import batch_of, config_in, loop_on, numbers_of, photos_config, save_photos
from vmf_pretrain.cli import BAD_INPUT, DONE, main
from vmf_pretrain.config.tasks.attention import AttentionTask
from vmf_pretrain.config.tasks.data import DataTask
from vmf_pretrain.config.tasks.pca import PcaTask
from vmf_pretrain.data.network_input import network_input
from vmf_pretrain.evaluation.attended import enlarged, most_attended, overlap
from vmf_pretrain.evaluation.components import coloured
from vmf_pretrain.evaluation.evaluated import load_evaluated
from vmf_pretrain.evaluation.given import Given
from vmf_pretrain.evaluation.outputs import DTYPES
from vmf_pretrain.evaluation.prototypes import nearest_rows, report_head
from vmf_pretrain.evaluation.task import Subject
from vmf_pretrain.evaluation.tasks import attention
from vmf_pretrain.evaluation.tasks.attention import Attention
from vmf_pretrain.evaluation.tasks.pca import Pca
from vmf_pretrain.evaluation.tasks.video import patch_features
from vmf_pretrain.methods.method import Place
from vmf_pretrain.storage.checkpoint import save_checkpoint
from vmf_pretrain.storage.tensor_file import read_tensors
from vmf_pretrain.storage.weights import FACTS, Weights, save_weights

pytestmark = pytest.mark.quick

PHOTOS = 9
FEW = (
    "attention.shown",
    "pca.shown",
    "prototypes.shown",
    "prototypes.nearest",
    "neighbours.queries",
    "neighbours.nearest",
    "neighbours.pairs",
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs; the first file is damaged, the last one a copy of the second."""
    folder = tmp_path_factory.mktemp("data") / "photos"
    first, *_ = save_photos(folder, PHOTOS - 1)
    shutil.copy(first, folder / "z_copy.png")
    (folder / "a_damaged.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    return photos_run(data, tmp_path_factory.mktemp("runs") / "run")


def evaluated(run: Path, tasks: str, out: Path, *options: str) -> dict[str, Path]:
    """The folder of each task's result."""
    assert main(["eval", str(run), "--task", tasks, "--out", str(out), *options]) == DONE
    return {name: next(out.glob(f"{name}-*")) for name in tasks.split(",")}


def evaluated_subject(run: Path, data: Path, folder: Path) -> Subject:
    """A run and photographs for a task that is run by itself."""
    network = load_evaluated(str(run), device=torch.device("cpu"))
    given = Given(DataTask(folder=str(data)), None, network.fed.size)
    return Subject(network, given, {"all": given.all}, {}, folder)


def figures_in(folder: Path) -> dict[str, float]:
    return {figure["name"]: figure["value"] for figure in json.loads((folder / "result.json").read_text())["figures"]}


def rows_in(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "rows.csv").read_text().splitlines()))


@pytest.mark.parametrize("mass", [0.6, 0.95, 1.0])
def test_most_attended_patches_are_those_of_the_published_rule(mass: float) -> None:
    maps = torch.rand(20, 5, 7, generator=torch.Generator().manual_seed(1)).double()
    kept = most_attended(maps, mass)
    for one, mask in zip(maps, kept, strict=True):
        order = one.flatten().sort()
        shares = (order.values / order.values.sum()).cumsum(0)
        expected = torch.zeros(35, dtype=torch.bool)
        expected[order.indices[shares > 1 - mass]] = True
        assert torch.equal(mask.flatten(), expected)
        assert float(one[mask].sum()) >= mass * float(one.sum()) * (1 - 1e-12)
        least = float(one[mask].min())
        assert float(one[mask].sum()) - least < mass * float(one.sum()), "a patch more than needed"


def test_equal_attention_takes_as_many_patches_as_the_share_says() -> None:
    kept = most_attended(torch.full((2, 5), 0.1), 0.6)
    assert int(kept.sum()) == 6


def test_overlap_is_the_jaccard_index() -> None:
    masks = torch.rand(6, 8, 9, generator=torch.Generator().manual_seed(2)) > 0.5
    given = torch.rand(8, 9, generator=torch.Generator().manual_seed(3)) > 0.7
    expected = [jaccard_score(given.flatten(), mask.flatten()) for mask in masks]
    np.testing.assert_allclose(overlap(masks, given), expected, atol=1e-12)
    empty = torch.zeros(8, 9, dtype=torch.bool)
    assert overlap(torch.stack([empty, ~empty]), empty).tolist() == [1.0, 0.0]


def test_enlarged_masks_have_a_rectangle_for_each_patch() -> None:
    mask = torch.tensor([[True, False], [False, True]])
    assert torch.equal(enlarged(mask, (4, 6)), mask.repeat_interleave(2, 0).repeat_interleave(3, 1))


def test_colours_are_principal_components() -> None:
    rows = torch.randn(50, 8, generator=torch.Generator().manual_seed(4)) * torch.arange(1, 9)
    colours, share = coloured(rows)
    oracle = PCA(3, svd_solver="full").fit(rows.double().numpy())
    assert abs(share - oracle.explained_variance_ratio_.sum()) < 1e-9
    values = oracle.transform(rows.double().numpy())
    inside = (colours > 0) & (colours < 1)
    for axis in range(3):
        some = inside[:, axis].numpy()
        correlation = np.corrcoef(values[some, axis], colours[some, axis].numpy())[0, 1]
        assert abs(abs(correlation) - 1) < 1e-6, "colours are linear in the component"
    assert torch.equal(coloured(rows.flip(0))[0].flip(0).round(decimals=5), colours.round(decimals=5))


@pytest.mark.parametrize(("rows", "share"), [(torch.ones(4, 8), 0.0), (torch.ones(1, 8), 0.0), (torch.eye(2), 1.0)])
def test_components_without_spread_are_gray(rows: torch.Tensor, share: float) -> None:
    colours, found = coloured(rows)
    assert colours.shape == (len(rows), 3)
    assert found == pytest.approx(share)
    assert bool(((colours >= 0) & (colours <= 1)).all())
    assert colours[:, 2].tolist() == [0.5] * len(rows)


def test_pictures_and_figures_of_a_run(run: Path, data: Path, tmp_path: Path) -> None:
    few = [f"--{name}=2" for name in FEW]  # drawing takes longer than all else here
    found = evaluated(run, "attention,pca,prototypes,neighbours", tmp_path, "--data", str(data), *few)
    pictures = sorted(path.name for path in tmp_path.glob("*/*.png") if path.name != "figures.png")
    assert pictures == ["attention.png", "neighbours.png", "pairs.png", "pca.png", "prototypes.png"]
    for path in tmp_path.glob("*/*.png"):
        with Image.open(path) as image:
            image.verify()
    assert 0 < figures_in(found["attention"])["attention on patches"] < 100
    assert 0 < figures_in(found["pca"])["variance in 3 components"] <= 100
    usage = [float(row["usage"]) for row in rows_in(found["prototypes"])]
    assert len(usage) == config_in(run).head.prototypes
    assert sum(usage) == pytest.approx(1, abs=1e-5)
    assert "none is used" in " ".join(json.loads((found["prototypes"] / "result.json").read_text())["notes"])
    _neighbours_are_right(found["neighbours"], tmp_path)


def _neighbours_are_right(folder: Path, out: Path) -> None:
    """Against scikit-learn's search on the stored features."""
    (stored,) = [path for path in out.glob("features/*/000000.safetensors") if "class" in read_tensors(path)[0]][-1:]
    features = read_tensors(stored)[0]["class"][:, -1].double().numpy()
    search = NearestNeighbors(n_neighbors=2, metric="cosine", algorithm="brute").fit(features)
    distances = np.sort(search.kneighbors()[0][:, :1], axis=1)[:, 0]
    rows = rows_in(folder)
    np.testing.assert_allclose([float(row["cosine"]) for row in rows], 1 - distances, atol=1e-6)
    nearest = {row["image"]: row["nearest"] for row in rows}
    assert nearest["z_copy.png"] == "photo_00.png"
    assert nearest["photo_00.png"] == "z_copy.png"
    assert not [name for name, other in nearest.items() if name == other], "an image is no neighbour of itself"
    near = 100 * np.mean([float(row["cosine"]) >= 0.99 for row in rows])
    assert figures_in(folder)["images with a near-duplicate, cosine 0.99"] == pytest.approx(near)


def test_masks_are_compared_as_the_images_are_cut(
    run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--data", str(data), "--attention.shown=1"]
    masks = tmp_path / "masks"
    masks.mkdir()
    for place, whole in enumerate((255, 255, 0)):
        Image.new("L", (48, 48), whole).save(masks / f"photo_{place:02d}.png")
    found = evaluated(run, "attention", tmp_path / "out", *options, "--attention.masks", str(masks))
    rows = rows_in(found["attention"])
    assert [row["image"] for row in rows] == ["photo_00.png", "photo_01.png"], "an empty mask is left out"
    for row in rows:  # of a mask of everything, the overlap is the share of patches that are kept
        patches = 16 * float(row["mean of heads"])
        assert patches == pytest.approx(round(patches))
        assert float(row["best head"]) == max(float(row[name]) for name in row if name.startswith("head "))
    said = json.loads((found["attention"] / "result.json").read_text())
    assert len(said["depends"]["masks"]) == 3
    assert any("empty mask" in note for note in said["notes"])
    nothing = tmp_path / "nothing"
    save_photos(nothing, 1)
    (nothing / "photo_00.png").rename(nothing / "other.png")
    options += ["--attention.masks", str(nothing), "--out", str(tmp_path / "none")]
    assert main(["eval", str(run), "--task", "attention", *options]) == BAD_INPUT
    assert "no image has a mask" in capsys.readouterr().out


def test_mask_that_cannot_be_read_is_counted(
    run: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    masks = tmp_path / "masks"
    save_photos(masks, 2)
    refused = {masks / "photo_01.png"}

    def guarded(path: Path) -> bytes:
        if path in refused:
            raise PermissionError(13, "Permission denied")  # by hand, as root may read everything
        return path.read_bytes()

    monkeypatch.setattr(attention, "read_plain", guarded)
    options = ["--data", str(data), "--attention.shown=1", "--attention.masks", str(masks)]
    found = evaluated(run, "attention", tmp_path / "out", *options)
    said = json.loads((found["attention"] / "result.json").read_text())
    assert [row["image"] for row in rows_in(found["attention"])] == ["photo_00.png"]
    assert any("1 images are left out: each cannot be read" in note for note in said["notes"])
    assert said["depends"]["masks"]["photo_01"] is None, "it is looked at again once it can be read"
    refused.add(masks / "photo_00.png")
    assert main(["eval", str(run), "--task", "attention", *options, "--out", str(tmp_path / "none")]) == BAD_INPUT
    assert "2 cannot be read" in " ".join(capsys.readouterr().out.split())


def test_forward_passes_of_tasks_are_in_the_precision_that_is_asked_for(run: Path, data: Path, tmp_path: Path) -> None:
    subject = evaluated_subject(run, data, tmp_path)
    half = replace(subject, dtype=torch.bfloat16)
    few: dict[str, tuple[Any, Any]] = {
        "attention": (Attention(), AttentionTask(shown=2)),
        "pca": (Pca(), PcaTask(shown=2)),
    }
    for name, (task, settings) in few.items():
        exact, rounded = (task.run(some, settings).figures[0].value for some in (subject, half))
        assert exact != rounded, f"{name} is computed in float32 whatever is asked for"
        assert rounded == pytest.approx(exact, rel=0.02)
    photograph = torch.rand(3, 32, 32)
    exact, rounded = (patch_features(subject.evaluated, dtype)[0](photograph) for dtype in DTYPES.values())
    assert rounded.dtype == torch.float32
    assert torch.equal(rounded, rounded.bfloat16().float())
    assert 0 < float((exact - rounded).abs().max()) < 0.1


def test_head_is_that_of_the_runs_checkpoint_with_its_centre(data: Path, tmp_path: Path) -> None:
    run = digits_run(tmp_path / "run")
    config = config_in(run)
    loop, batches = loop_on(config, 64)
    numbers_of(loop, 0, batch_of(batches, 0))  # the first batch sets the centre
    method: Any = loop.method
    last = run / "weights" / "last.safetensors"
    facts = json.loads(read_tensors(last)[1][FACTS])
    save_weights(Weights(last, method.exported.state_dict(), network_input(config), facts))
    save_checkpoint(run / "checkpoints", facts["step"], loop.tensors(), {}, keep=1)
    found = evaluated(run, "prototypes", tmp_path / "out", "--data.max_images", "40")
    features = read_tensors(next((tmp_path / "out").glob("features/*/000000.safetensors")))[0]["class"][:, -1]
    assignment = method.assignment(Place(5 * config.train.epochs - 1, 5, config.train.epochs))
    report = report_head(assignment, features, threshold=0.025)
    figures = figures_in(found["prototypes"])
    assert assignment.bias is not None
    without = report_head(replace(assignment, bias=None), features, threshold=0.025)
    assert abs(without.usage_entropy - report.usage_entropy) > 1e-3, "the test needs a centre that matters"
    assert figures["entropy of their usage"] == pytest.approx(report.usage_entropy, abs=1e-5)
    assert figures["mutual information of images and prototypes"] == pytest.approx(report.mutual_information, abs=1e-5)
    assert figures["used, of 32"] == report.prototypes_used
    cosines, places = nearest_rows(assignment, features, torch.tensor([3, 1]), 5)
    with torch.no_grad():
        logits = assignment.head.eval()(features)
        unit = torch.nn.functional.normalize
        every = unit(logits.prototypes.effective_weight()[[3, 1]], dim=1) @ unit(logits.features, dim=1).T
    torch.testing.assert_close(cosines, every.topk(5).values, atol=1e-6, rtol=0)
    assert torch.equal(every.gather(1, places), every.topk(5).values)


def test_network_without_prototypes_or_class_token_says_so(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of(photos_config(data, method="ijepa", predictor={"depth": 1}), tmp_path / "run")
    options = ["--data", str(data), "--out", str(tmp_path / "out"), "--pca.shown=1"]
    assert main(["eval", str(run), "--task", "prototypes,attention,pca", *options]) == BAD_INPUT
    said = " ".join(capsys.readouterr().out.split())
    assert "has no prototypes" in said
    assert "class token" in said
    assert (next((tmp_path / "out").glob("pca-*")) / "pca.png").is_file(), "the others are done"
