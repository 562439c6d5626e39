"""An evaluation: features once for all tasks, damaged images counted, nothing done twice, and goes on after a kill."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.on_ranks import start_ranks
from tests.pretrain.evaluation.tasks_at_work import Count, Patches, Whole, digits_run, photos_run, suite_on, with_splits
from tests.pretrain.tiny import photos_config, save_photos
from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.config.tasks.data import DataTask
from vmf_pretrain.evaluation import extract, stored
from vmf_pretrain.evaluation.extract import Wanted
from vmf_pretrain.evaluation.given import Given
from vmf_pretrain.evaluation.outputs import Kinds, outputs
from vmf_pretrain.evaluation.stored import Features, rows_at
from vmf_pretrain.evaluation.tasks.knn import Knn

pytestmark = pytest.mark.quick


def watched_passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images each forward pass has."""
    passes: list[int] = []

    def watched(network: torch.nn.Module, inputs: Tensor, kinds: Kinds) -> dict[str, Tensor]:
        passes.append(len(inputs))
        return outputs(network, inputs, kinds)

    monkeypatch.setattr(extract, "outputs", watched)
    return passes


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The same, in files of four images."""
    monkeypatch.setattr(stored, "CHUNK", 4)
    return watched_passes(monkeypatch)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_splits(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return photos_run(data, tmp_path_factory.mktemp("runs") / "run")


def test_features_are_computed_once_and_a_damaged_image_is_counted(
    run: Path, data: Path, tmp_path: Path, seen: list[int]
) -> None:
    suite, said, _ = suite_on(run, data, tmp_path)
    results = suite.run([Count(), Patches(), Knn()])
    # 18 + 8 readable images at the network's size, and again in k-NN's view
    assert sum(seen) == 2 * 26, f"{sum(seen)} images went through the network"
    assert results["count"].figures[0].value == 18
    named = json.loads(next(tmp_path.glob("count-*/result.json")).read_text())
    assert list(named["bad_images"]["train"]) == ["dogs/damaged.png"]
    assert any("1 of train" in line for line in said)
    rows = list(csv.DictReader(next(tmp_path.glob("knn-*/rows.csv")).read_text().splitlines()))
    assert [row["class"] for row in rows if row["class"] == "emus"] == ["emus"] * 2
    assert {row["rank, k 10"] for row in rows if row["class"] == "emus"} == {""}, "a class without training images"


def test_what_has_finished_is_not_run_again(run: Path, data: Path, tmp_path: Path, seen: list[int]) -> None:
    suite_on(run, data, tmp_path)[0].run([Patches()])
    seen.clear()
    before = Patches.runs
    suite, _, found = suite_on(run, data, tmp_path)
    again = suite.run([Patches(), Count()])
    assert found == ["patches before", "count"]
    assert Patches.runs == before
    assert seen == [], "Count's features were there, among those of Patches"
    assert again["patches"].figures == again["count"].figures
    other, _, found = suite_on(run, data, tmp_path, dtype="bfloat16")
    other.run([Patches()])
    assert found == ["patches"], "another precision is another result"
    assert seen


def test_evaluation_goes_on_with_the_files_that_are_missing_or_cut_short(
    run: Path, data: Path, tmp_path: Path, seen: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[Tensor] = []
    monkeypatch.setattr(Count, "run", _keeping(kept))
    suite_on(run, data, tmp_path)[0].run([Count()])
    files = sorted(tmp_path.glob("features/*/*.safetensors"))
    assert len(files) == 5 + 2
    files[0].unlink()
    files[3].write_bytes(files[3].read_bytes()[:-8])
    next(tmp_path.glob("count-*/result.json")).unlink()
    seen.clear()
    suite_on(run, data, tmp_path)[0].run([Count()])
    assert 0 < sum(seen) <= 8, f"{sum(seen)} images went through the network again"
    assert torch.equal(kept[0], kept[1])


def _keeping(kept: list[Tensor]):  # type: ignore[no-untyped-def]
    real = Count.run

    def run(self, subject, settings):  # type: ignore[no-untyped-def]
        kept.append(subject.features["train"].whole())
        return real(self, subject, settings)

    return run


def on_a_rank(rank: int, folder: str, run: str, data: str) -> None:
    torch.set_num_threads(1)
    stored.CHUNK = 4
    passes = watched_passes(pytest.MonkeyPatch())
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    suite, said, found = suite_on(Path(run), Path(data), Path(folder, "out"))
    results = suite.run([Count(), Patches()])
    torch.distributed.barrier()
    shown = {"passes": sum(passes), "found": found, "results": sorted(results), "said": said}
    Path(folder, f"{rank}.json").write_text(json.dumps(shown))
    torch.distributed.destroy_process_group()


@pytest.mark.thorough
def test_two_ranks_share_the_images_and_the_first_one_does_the_tasks(run: Path, data: Path, tmp_path: Path) -> None:
    start_ranks(on_a_rank, (str(tmp_path), str(run), str(data)), 2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first["passes"] + second["passes"] == 26
    assert min(first["passes"], second["passes"]) >= 8, f"{first['passes']} and {second['passes']} images"
    assert (first["found"], second["found"], second["results"]) == (["count", "patches"], [], [])
    assert any("1 of train" in line for line in first["said"])


def test_task_that_cannot_be_done_stops_no_other_one(run: Path, tmp_path: Path) -> None:
    save_photos(tmp_path / "photos", 5)
    suite, said, found = suite_on(run, tmp_path / "photos", tmp_path / "out")

    class Unlabelled(Count):
        name = "patches"

        def images(self, given, settings):  # type: ignore[no-untyped-def]
            return {"train": given.all, "test": given.splits.test}

    suite.run([Knn(), Unlabelled()])
    assert found == ["patches"]
    assert "has no classes" in suite.failures["knn"]
    assert said[0] == f"knn: {suite.failures['knn']}"


def test_task_that_wants_too_much_of_the_same_images_stops_no_other_one(run: Path, data: Path, tmp_path: Path) -> None:
    class Deep(Patches):
        kinds = Kinds(3)

    suite, _, found = suite_on(run, data, tmp_path)
    suite.run([Count(), Deep()])
    assert found == ["count"]
    assert "of a network of 2" in suite.failures["patches"]


def test_images_of_a_run_without_classes_are_there_for_tasks_that_need_none(tmp_path: Path) -> None:
    save_photos(tmp_path / "photos", 5)
    given = Given(DataTask(max_images=4), photos_config(tmp_path / "photos"), 32)
    assert len(given.all) == 4
    with pytest.raises(PretrainError, match="have no classes"):
        _ = given.labelled


def test_rows_are_picked_across_parts() -> None:
    rows, places = torch.arange(20).reshape(10, 2), torch.tensor([0, 3, 4, 9])
    parts = list(rows_at(torch.split(rows, 4), places))
    assert torch.equal(torch.cat(parts), rows[places])
    assert len(parts) == 3


def test_run_s_own_data_and_split_are_the_default(tmp_path: Path) -> None:
    suite, _, _ = suite_on(digits_run(tmp_path / "run"), None, tmp_path / "out", batch_size=256)
    result = suite.run([Knn()])["knn"]
    assert (result.facts["train_images"], result.facts["test_images"]) == (1297, 500)
    (top,) = [figure for figure in result.figures if figure.name == "top-1, k 20"]
    assert top.low is not None
    assert top.high is not None
    assert top.low < top.value < top.high


def test_patches_of_images_of_several_sizes_come_back(
    run: Path, data: Path, tmp_path: Path, seen: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: list[tuple[int, ...]] = []

    def run_(self, subject, settings):  # type: ignore[no-untyped-def]
        features: Features = subject.features["test"]
        means = features.whole("mean_patch")
        patches = list(features.patches())
        shapes.extend(tuple(one.shape) for one in patches)
        assert torch.allclose(torch.stack([one.mean(dim=(0, 1)) for one in patches]), means, atol=1e-6)
        return Count.run(self, subject, settings)

    wanted = Wanted(Whole(), Patches.kinds)
    monkeypatch.setattr(Patches, "run", run_)
    monkeypatch.setattr(Patches, "wants", lambda self, settings, fed: dict.fromkeys(("train", "test"), wanted))
    suite_on(run, data, tmp_path)[0].run([Patches()])
    assert sorted(set(shapes)) == [(6, 6, 16), (7, 12, 16)]
    assert len(shapes) == 8
