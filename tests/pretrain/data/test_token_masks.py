"""Masks over tokens: those of the published samplers for the same random numbers, with the distributions measured there."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from tests.pretrain.tiny import batch_of, digits_config, one_sentence, some_digits
from vmf_pretrain.config.blocks import BlocksConfig
from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.data.batches import ViewBatches
from vmf_pretrain.data.plan import MaskSampler, Plan
from vmf_pretrain.data.token_masks import MultiBlockMasks, RandomMasks, TubeMasks

pytestmark = pytest.mark.quick

IJEPA, FIXED = BlocksConfig(), BlocksConfig(edges="fixed")
GRID = (14, 14)


def generators(images: int, seed: int = 0) -> list[Generator]:
    return [Generator().manual_seed(1000 * seed + image) for image in range(images)]


def marked(places: Tensor, tokens: int) -> Tensor:
    """[B, N] bool for places [B, ...]."""
    flat = places.flatten(1)
    return torch.zeros(len(flat), tokens, dtype=torch.bool).scatter(1, flat, True)


# Written from the description of I-JEPA's sampler, one image at a time, with sets of (row, column)

Cells = set[tuple[int, int]]


def published_sides(share: float, area: tuple[float, float], aspect: tuple[float, float], side: int) -> tuple[int, int]:
    tokens = int(side * side * (area[0] + share * (area[1] - area[0])))
    ratio = aspect[0] + share * (aspect[1] - aspect[0])
    height, width = round(math.sqrt(tokens * ratio)), round(math.sqrt(tokens / ratio))
    while height >= side:
        height -= 1
    while width >= side:
        width -= 1
    return height, width


def published_block(sides: tuple[int, int], numbers: list[float], side: int) -> Cells:
    """The upper end of the corner is exclusive."""
    top, left = (int(share * (side - length)) for share, length in zip(numbers, sides, strict=True))
    return {(row, column) for row in range(top, top + sides[0]) for column in range(left, left + sides[1])}


def published_image(sides: list[tuple[int, int]], numbers: list[list[float]], side: int) -> tuple[list[Cells], Cells]:
    blocks = (published_block(sides[0], pair, side) for pair in numbers[:4])
    targets, context = list(blocks), set[tuple[int, int]]()
    for failures, pair in enumerate(numbers[4:]):
        left = max(len(targets) - failures // 20, 0)
        context = published_block(sides[1], pair, side).difference(*targets[:left])
        if len(context) > 10:
            break
    return targets, context


def test_blocks_are_those_of_the_published_sampler_for_the_same_numbers() -> None:
    """A grid of 7 x 7 fails often enough for targets to be given up."""
    for side in (14, 7):
        blocks = IJEPA if side == 14 else BlocksConfig(target_area=(0.3, 0.4), min_keep=10)
        drawn = MultiBlockMasks((side, side), blocks).draw(generators(64))
        streams = generators(64)
        shares = torch.rand(2, generator=streams[0]).tolist()
        sides = [
            published_sides(shares[0], blocks.target_area, (0.75, 1.5), side),
            published_sides(shares[1], (0.85, 1.0), (1.0, 1.0), side),
        ]
        numbers = [torch.rand(104, 2, generator=stream, dtype=torch.float64).tolist() for stream in streams]
        expected = [published_image(sides, pairs, side) for pairs in numbers]
        shortest = min(len(context) for _, context in expected)
        for image, (targets, context) in enumerate(expected):
            places = [sorted(row * side + column for row, column in cells) for cells in (*targets, context)]
            assert drawn["target.0"][image].tolist() == places[:4], f"targets of image {image}"
            assert drawn["context.0"][image].tolist() == places[4][:shortest], f"context of image {image}"
        overlapping = sum(bool(context & set[tuple[int, int]]().union(*targets)) for targets, context in expected)
        assert (overlapping > 0) == (side == 7), f"{overlapping} contexts gave up targets at {side} x {side}"


# grid, batch -> shares of the tokens that contexts keep, as measured on the published sampler; the middle of many batches
CONTEXTS: dict[str, tuple[Callable[[], MaskSampler], int, dict[str, tuple[float, float]]]] = {
    "I-JEPA 14 x 14, before the cut": (lambda: MultiBlockMasks((14, 14), IJEPA), 1, {"context.0": (0.40, 0.44)}),
    "I-JEPA 14 x 14, 128 images": (lambda: MultiBlockMasks((14, 14), IJEPA), 128, {"context.0": (0.23, 0.29)}),
    "I-JEPA 16 x 16, 128 images": (lambda: MultiBlockMasks((16, 16), IJEPA), 128, {"context.0": (0.24, 0.30)}),
    "V-JEPA, 24 clips": (
        lambda: TubeMasks((8, 14, 14), BlocksConfig()),
        24,
        {"context.0": (0.22, 0.25), "context.1": (0.045, 0.07)},
    ),
}


@pytest.mark.parametrize("name", list(CONTEXTS))
def test_contexts_keep_the_measured_share(name: str) -> None:
    make, images, expected = CONTEXTS[name]
    sampler: Any = make()
    batches = 600 if images == 1 else 30
    drawn = [sampler.draw(generators(images, seed)) for seed in range(batches)]
    for mask, (low, high) in expected.items():
        share = sum(each[mask].shape[1] for each in drawn) / batches / math.prod(sampler.grid)
        assert low < share < high, f"{mask} keeps {share:.3f}, expected {low} to {high}"


def test_published_blocks_leave_the_last_row_and_column_out_and_fixed_ones_cover_all() -> None:
    reached = {}
    for blocks in (IJEPA, FIXED):
        drawn = [MultiBlockMasks(GRID, blocks).draw(generators(64, seed)) for seed in range(20)]
        hit = sum(marked(each[name], 196).sum(0) for each in drawn for name in each)
        assert isinstance(hit, Tensor)
        reached[blocks.edges] = hit.view(14, 14) > 0
    published, fixed = reached["published"], reached["fixed"]
    assert published[:13, :13].all()
    assert not published[13].any()
    assert not published[:, 13].any()
    assert fixed.all()


def test_contexts_hold_no_target_and_targets_have_one_size() -> None:
    for sampler in (MultiBlockMasks(GRID, IJEPA), TubeMasks((4, 8, 8), BlocksConfig())):
        drawn = sampler.draw(generators(32))
        for place in range(len(drawn) // 2):
            context, target = (
                marked(drawn[f"{name}.{place}"], math.prod(sampler.grid)) for name in ("context", "target")
            )
            assert not (context & target).any()
            assert context.any(1).all()


def test_blocks_of_clips_last_through_all_frames_and_may_touch_every_edge() -> None:
    sampler = TubeMasks((4, 14, 14), BlocksConfig())
    drawn = [sampler.draw(generators(1, seed)) for seed in range(60)]  # of one clip, nothing is cut
    for name in ("target.0", "target.1"):
        planes = torch.stack([marked(each[name], 4 * 196).view(4, 196) for each in drawn])
        assert torch.equal(planes, planes[:, :1].expand_as(planes)), name
        assert planes.any(dim=(0, 1)).all(), f"{name} never reaches some tokens"


def test_random_masks_keep_a_quarter_anywhere_alike() -> None:
    rows, tokens = 4000, 196
    drawn = RandomMasks(GRID, 0.75).draw(generators(rows))["kept"]
    kept = marked(drawn, tokens)
    assert drawn.shape == (rows, 49)
    assert kept.sum(1).eq(49).all(), "a patch is kept twice"
    # the count of a place is binomial with a deviation of 27.4; of 196 places, none is 4.5 of them off
    worst = (kept.sum(0) - rows * 0.25).abs().max().item()
    assert worst < 4.5 * math.sqrt(rows * 0.25 * 0.75), f"a place is {worst} off"


def test_mask_of_an_image_is_a_function_of_its_generator() -> None:
    sampler = RandomMasks(GRID, 0.75)
    whole, alone = sampler.draw(generators(4))["kept"], sampler.draw(generators(4)[2:3])["kept"]
    assert torch.equal(whole[2], alone[0])


def test_ranks_cut_contexts_to_the_shortest_of_the_global_batch() -> None:
    config = digits_config(method="ijepa", backbone={"patch_size": 1}, data={"batch_size": 32})
    plan = Plan(1, 0, MultiBlockMasks(config.token_grid, config.blocks))
    whole, *halves = (
        batch_of(ViewBatches(some_digits(64), config, plan, rank, ranks), 0) for rank, ranks in ((0, 1), (0, 2), (1, 2))
    )
    for name, mask in whole.masks.items():
        assert torch.equal(torch.cat([half.masks[name] for half in halves]), mask), name


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: MultiBlockMasks((4, 4), IJEPA), "of the 4 x 4 tokens has"),
        (lambda: TubeMasks((2, 2, 2), BlocksConfig()), "blocks.min_keep asks for more than 0"),
        (lambda: TubeMasks((2, 8, 8), BlocksConfig(long_area=1.0, clip_aspect=(1.0, 1.0))), "cover all of"),
        (lambda: RandomMasks((1, 2), 0.75), "leaves 0 of 2 patches"),
    ],
)
def test_grid_that_blocks_cannot_fill_is_refused(make: Callable[[], MaskSampler], said: str) -> None:
    with pytest.raises(PretrainError, match=said) as caught:
        make()
    assert one_sentence(str(caught.value)), str(caught.value)
