"""Bad images are counted, listed once, and end a run when they are too many; and they are replaced alike everywhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.pretrain.tiny import a_run, batches_over, folder_images, one_sentence, photos_config, two_classes
from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.data.batches import TRIES, ViewBatches

pytestmark = pytest.mark.quick


def with_bad(folder: Path, *names: str) -> ViewBatches:
    two_classes(folder, 10)
    for name in names:
        (folder / name).write_text("these are not pixels")
    config = photos_config(folder, data={"batch_size": 8, "held_out": 0.1}, train={"epochs": 6})
    return batches_over(folder_images(folder, 32, 0.1)[0], config)


def test_another_image_takes_the_place_and_the_rest_of_the_batch_is_as_without(tmp_path: Path) -> None:
    good, bad = with_bad(tmp_path / "good"), with_bad(tmp_path / "bad", "cats/photo_04.png", "dogs/photo_00.png")
    replaced = 0
    for step in range(len(good)):
        one, other = good.batch(step), bad.batch(step)
        rows = [row for row in range(8) if one.indices[row] != other.indices[row]]
        assert sorted({image.name for image in other.bad}) == sorted(
            {good.images.name(one.indices[row]) for row in rows}
        )
        for view, (expected, found) in enumerate(zip(one.views, other.views, strict=True)):
            same = [row for row in range(8) if torch.equal(expected[row], found[row])]
            assert same == [row for row in range(8) if row not in rows], f"step {step}, view {view}"
        replaced += len(rows)
    assert replaced > 4, f"{replaced} places"


def test_replacements_change_with_the_epoch_and_not_with_rank_or_resume(tmp_path: Path) -> None:
    batches = with_bad(tmp_path, "cats/photo_04.png")
    bad = next(i for i in range(len(batches.images)) if batches.images.name(i) == "cats/photo_04.png")
    taken = {}
    for step in range(len(batches)):
        whole = batches.batch(step)
        halves = [batches_over(batches.images, batches.config, rank, 2).batch(step) for rank in (0, 1)]
        assert whole.indices == halves[0].indices + halves[1].indices
        assert whole.bad == halves[0].bad + halves[1].bad
        order = batches.order(step // batches.steps_per_epoch)
        start = step % batches.steps_per_epoch * 8
        wanted = order[start : start + 8].tolist()
        if bad in wanted:
            taken[step // batches.steps_per_epoch] = whole.indices[wanted.index(bad)]
    assert len(set(taken.values())) > 2, taken


def test_nothing_but_bad_images_ends_at_once_with_their_names(tmp_path: Path) -> None:
    names = [f"{kind}/photo_{number:02d}.png" for kind in ("cats", "dogs") for number in range(10)]
    batches = with_bad(tmp_path, *names)
    found = batches[0]
    assert isinstance(found, PretrainError)
    assert one_sentence(str(found)), str(found)
    assert f"{TRIES} images in a row cannot be read" in str(found)
    assert sum(name in str(found) for name in names) > 3


def test_a_run_lists_its_bad_images_and_finishes(tmp_path: Path) -> None:
    folder = two_classes(tmp_path / "photos")
    (folder / "dogs" / "photo_03.png").write_bytes(b"")
    config = photos_config(folder, train={"epochs": 4}, data={"workers": 0, "held_out": 0.01})
    run, _ = a_run(config, tmp_path / "run")
    assert run.train() == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "bad_files.jsonl").read_text().splitlines()]
    assert lines
    assert {line["name"] for line in lines} == {"dogs/photo_03.png"}
