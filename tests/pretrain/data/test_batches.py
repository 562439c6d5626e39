"""Batches are pure functions of the step: views and order follow from (seed, epoch, index, view) and nothing else."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.pretrain.tiny import (
    batch_of,
    changed,
    digits_config,
    one_sentence,
    photos_config,
    save_photos,
    some_digits,
    two_classes,
)
from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.data.batches import ViewBatches, load_from
from vmf_pretrain.data.images import folder_images

KINDS = ["digits", "folder"]


def batches_of(kind: str, folder: Path, **sections: Any) -> ViewBatches:
    """Batches of 4 of 10 images, two local views each, over 3 epochs."""
    chosen: dict[str, Any] = {"train": {"epochs": 3}, "views": {"local_count": 2}, **sections}
    data = {"batch_size": 4, **chosen.pop("data", {})}
    if kind == "digits":
        return ViewBatches(some_digits(10), digits_config(**chosen, data=data))
    if not any(folder.iterdir()):
        save_photos(folder, 10)
    config = changed(photos_config(folder, **chosen), data=data)
    return ViewBatches(folder_images(folder, 32, 0.1)[0], config)


def loaded(batches: ViewBatches, step: int) -> list[list[Tensor]]:
    got = list(load_from(batches, step))
    assert all(isinstance(views, list) for views in got), got
    return [views for views in got if isinstance(views, list)]


@pytest.mark.quick
@pytest.mark.parametrize("kind", KINDS)
def test_views_have_their_sizes_and_channels_the_global_ones_first(kind: str, tmp_path: Path) -> None:
    batches = batches_of(kind, tmp_path)
    channels, large, small = (1, 16, 8) if kind == "digits" else (3, 32, 16)
    shapes = [tuple(view.shape) for view in batch_of(batches, 0)]
    assert shapes == [(4, channels, large, large)] * 2 + [(4, channels, small, small)] * 2


@pytest.mark.quick
@pytest.mark.parametrize("kind", KINDS)
def test_row_is_the_same_whatever_the_batch_around_it(kind: str, tmp_path: Path) -> None:
    batches = batches_of(kind, tmp_path)
    together, alone, other = batches.views(1, [3, 7, 2, 5, 9]), batches.views(1, [7]), batches.views(1, [8, 7])
    for view in range(4):
        assert torch.equal(together[view][1], alone[view][0]), f"view {view} changes with the size of the batch"
        assert torch.equal(alone[view][0], other[view][1]), f"view {view} changes with its place in the batch"


@pytest.mark.quick
@pytest.mark.parametrize("kind", KINDS)
def test_another_seed_epoch_index_or_view_gives_another_view(kind: str, tmp_path: Path) -> None:
    batches, reseeded = batches_of(kind, tmp_path), batches_of(kind, tmp_path, seed=1)
    first = batches.views(0, [3])
    others = {
        "seed": reseeded.views(0, [3])[0],
        "epoch": batches.views(1, [3])[0],
        "index": batches.views(0, [4])[0],
        "view": first[1],
    }
    same = [name for name, view in others.items() if torch.allclose(view, first[0], atol=1e-3)]
    assert not same, f"no difference for another {same}"
    assert not torch.allclose(first[2], first[3], atol=1e-3), "both local views are the same"


@pytest.mark.quick
@pytest.mark.parametrize("kind", KINDS)
def test_batches_leave_the_global_generator_alone_and_do_not_read_it(kind: str, tmp_path: Path) -> None:
    batches = batches_of(kind, tmp_path)
    torch.manual_seed(1)
    first, before = batch_of(batches, 3), torch.get_rng_state()
    torch.manual_seed(2)
    again = batch_of(batches, 3)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), before), "a batch drew from the global generator"
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


@pytest.mark.quick
def test_order_is_a_permutation_that_changes_with_epoch_and_seed() -> None:
    orders = {
        (seed, epoch): ViewBatches(some_digits(50), digits_config(seed=seed, data={"batch_size": 8})).order(epoch)
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert all(sorted(order.tolist()) == list(range(50)) for order in orders.values())
    assert len({tuple(order.tolist()) for order in orders.values()}) == 4, "two of four orders are the same"


@pytest.mark.quick
def test_epoch_shows_no_image_twice_and_holds_whole_batches_only(tmp_path: Path) -> None:
    batches = batches_of("digits", tmp_path)
    assert (batches.steps_per_epoch, len(batches)) == (2, 6)
    for epoch in range(3):
        taken = batches.order(epoch)[:8].tolist()
        expected = [batches.views(epoch, taken[:4]), batches.views(epoch, taken[4:])]
        for place in range(2):
            got = batch_of(batches, 2 * epoch + place)
            assert all(torch.equal(one, other) for one, other in zip(got, expected[place], strict=True))


@pytest.mark.parametrize("step", [0, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_loader_gives_the_same_batches_with_and_without_workers_from_any_step(
    kind: str, step: int, tmp_path: Path
) -> None:
    alone = loaded(batches_of(kind, tmp_path, data={"workers": 0}), step)
    helped = loaded(batches_of(kind, tmp_path, data={"workers": 2}), step)
    expected = [batch_of(batches_of(kind, tmp_path), place) for place in range(step, 6)]
    assert len(alone) == len(helped) == 6 - step
    for name, got in (("0 workers", alone), ("2 workers", helped)):
        wrong = [
            step + place
            for place in range(6 - step)
            if not all(torch.equal(one, other) for one, other in zip(got[place], expected[place], strict=True))
        ]
        assert not wrong, f"{name}: batches {wrong} differ"


@pytest.mark.quick
def test_workers_outlive_the_signals_that_a_terminal_sends_them(tmp_path: Path) -> None:
    batches = batches_of("digits", tmp_path, data={"workers": 2}, train={"epochs": 10})
    others = set(multiprocessing.active_children())
    iterator = iter(load_from(batches, 0))
    before = [next(iterator) for _ in range(3)]  # by now both are past their start
    workers = set(multiprocessing.active_children()) - others
    for worker, number in itertools.product(workers, (signal.SIGINT, signal.SIGTERM)):
        os.kill(int(str(worker.pid)), number)
    assert len(workers) == 2
    assert len(before) + len(list(iterator)) == 20


@pytest.mark.quick
def test_finished_run_has_no_batch_left(tmp_path: Path) -> None:
    assert loaded(batches_of("digits", tmp_path), 6) == []


@pytest.mark.quick
@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_image_arrives_as_one_sentence(workers: int, tmp_path: Path) -> None:
    two_classes(tmp_path / "photos")
    broken = tmp_path / "photos" / "cats" / "notes.jpg"
    broken.write_text("these are not pixels")
    images, _ = folder_images(tmp_path / "photos", 32, 0.01)
    batches = ViewBatches(images, photos_config(tmp_path / "photos", data={"workers": workers}))
    errors = [got for got in load_from(batches, 0) if isinstance(got, PretrainError)]
    assert len(errors) == 1, f"{len(errors)} batches tell of the image"
    assert one_sentence(str(errors[0])), str(errors[0])
    assert str(broken) in str(errors[0])


@pytest.mark.quick
def test_batch_larger_than_the_data_is_refused() -> None:
    with pytest.raises(PretrainError, match=r"data\.batch_size is 11 but there are 10 training images") as caught:
        ViewBatches(some_digits(10), digits_config(data={"batch_size": 11}))
    assert one_sentence(str(caught.value)), str(caught.value)
