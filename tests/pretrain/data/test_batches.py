"""Batches are pure functions of the step: views and order follow from (seed, epoch, index, view) and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from tests.pretrain.tiny import (
    batches_over,
    changed,
    digits_config,
    folder_images,
    one_sentence,
    photos_config,
    save_photos,
    some_digits,
)
from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.data.batches import ViewBatches
from vmf_pretrain.data.loader import load_from
from vmf_pretrain.data.plan import Plan

KINDS = ["digits", "folder"]


def batches_of(kind: str, folder: Path, **sections: Any) -> ViewBatches:
    """Batches of 4 of 10 images, two local views each, over 3 epochs."""
    chosen: dict[str, Any] = {"train": {"epochs": 3}, "views": {"local_count": 2}, **sections}
    data = {"batch_size": 4, **chosen.pop("data", {})}
    if kind == "digits":
        return batches_over(some_digits(10), digits_config(**chosen, data=data))
    if not any(folder.iterdir()):
        save_photos(folder, 10)
    config = changed(photos_config(folder, **chosen), data=data)
    return batches_over(folder_images(folder, 32, 0.1)[0], config)


def views_of(batches: ViewBatches, step: int) -> list[Tensor]:
    return batches.batch(step).views


def loaded(batches: ViewBatches, step: int) -> list[list[Tensor]]:
    return [batch.views for batch in load_from(batches, step)]


@pytest.mark.quick
@pytest.mark.parametrize("kind", KINDS)
def test_views_have_their_sizes_and_channels_the_global_ones_first(kind: str, tmp_path: Path) -> None:
    batches = batches_of(kind, tmp_path)
    channels, large, small = (1, 16, 8) if kind == "digits" else (3, 32, 16)
    shapes = [tuple(view.shape) for view in views_of(batches, 0)]
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
    first, before = views_of(batches, 3), torch.get_rng_state()
    torch.manual_seed(2)
    again = views_of(batches, 3)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), before), "a batch drew from the global generator"
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


@pytest.mark.quick
def test_order_is_a_permutation_that_changes_with_epoch_and_seed() -> None:
    orders = {
        (seed, epoch): batches_over(some_digits(50), digits_config(seed=seed, data={"batch_size": 8})).order(epoch)
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
            got = views_of(batches, 2 * epoch + place)
            assert all(torch.equal(one, other) for one, other in zip(got, expected[place], strict=True))


@pytest.mark.parametrize("step", [0, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_loader_gives_the_same_batches_with_and_without_workers_from_any_step(
    kind: str, step: int, tmp_path: Path
) -> None:
    alone = loaded(batches_of(kind, tmp_path, data={"workers": 0}), step)
    helped = loaded(batches_of(kind, tmp_path, data={"workers": 2}), step)
    expected = [views_of(batches_of(kind, tmp_path), place) for place in range(step, 6)]
    assert len(alone) == len(helped) == 6 - step
    for name, got in (("0 workers", alone), ("2 workers", helped)):
        wrong = [
            step + place
            for place in range(6 - step)
            if not all(torch.equal(one, other) for one, other in zip(got[place], expected[place], strict=True))
        ]
        assert not wrong, f"{name}: batches {wrong} differ"


@pytest.mark.quick
def test_finished_run_has_no_batch_left(tmp_path: Path) -> None:
    assert loaded(batches_of("digits", tmp_path), 6) == []


@pytest.mark.quick
def test_batch_larger_than_the_data_is_refused() -> None:
    with pytest.raises(PretrainError, match=r"data\.batch_size is 11 but there are 10 training images") as caught:
        batches_over(some_digits(10), digits_config(data={"batch_size": 11}))
    assert one_sentence(str(caught.value)), str(caught.value)


@pytest.mark.quick
def test_batch_that_ranks_cannot_share_is_refused() -> None:
    with pytest.raises(PretrainError, match=r"data\.batch_size is 8 but must be a multiple of the 3 ranks") as caught:
        batches_over(some_digits(10), digits_config(data={"batch_size": 8}), 0, 3)
    assert one_sentence(str(caught.value)), str(caught.value)


@dataclass(frozen=True)
class BlockMasks:
    """One number for each image, and how many images it was drawn for."""

    def draw(self, generators: Sequence[Generator]) -> dict[str, Tensor]:
        drawn = torch.stack([torch.rand(5, generator=generator) for generator in generators])
        return {"mask": drawn > 0.5, "together": torch.full((len(generators),), len(generators))}


@pytest.mark.quick
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_ranks_read_the_parts_of_the_batch_that_one_would_read(kind: str, ranks: int, tmp_path: Path) -> None:
    alone = replace(batches_of(kind, tmp_path), plan=Plan(2, 1, BlockMasks()))
    for step in (0, 3):
        whole, parts = alone.batch(step), [replace(alone, rank=rank, ranks=ranks).batch(step) for rank in range(ranks)]
        assert [index for part in parts for index in part.indices] == whole.indices
        for view in range(3):
            assert torch.equal(torch.cat([part.views[view] for part in parts]), whole.views[view]), f"view {view}"
        assert torch.equal(torch.cat([part.masks["mask"] for part in parts]), whole.masks["mask"])
        assert whole.masks["together"].tolist() == [4] * 4, "masks are of the global batch"
        assert all(part.masks["together"].tolist() == [4] * (4 // ranks) for part in parts)


@pytest.mark.quick
def test_a_mask_changes_with_seed_epoch_and_image_and_not_with_the_views(tmp_path: Path) -> None:
    batches = replace(batches_of("digits", tmp_path), plan=Plan(2, 1, BlockMasks()))
    others = [replace(batches, config=changed(batches.config, seed=1)).batch(0), batches.batch(2)]
    first = batches.batch(0).masks["mask"]
    assert all(not torch.equal(first, other.masks["mask"]) for other in others)
    assert torch.equal(replace(batches, plan=Plan(1, 0, BlockMasks())).batch(0).masks["mask"], first)


@pytest.mark.quick
def test_a_plan_of_one_view_gives_one_global_view(tmp_path: Path) -> None:
    batches = batches_of("folder", tmp_path)
    (view,) = replace(batches, plan=Plan(1, 0)).batch(0).views
    assert torch.equal(view, batches.batch(0).views[0])
