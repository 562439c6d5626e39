"""Labels from blocks and the largest cosines equal the published formula on all affinities, ties and edges included."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional

from bench.video_propagation import frames_of, published
from vmf_pretrain.evaluation.video.follow import follow
from vmf_pretrain.evaluation.video.propagate import Propagation
from vmf_pretrain.evaluation.video.protocols import DINO, DINOV3, Protocol
from vmf_pretrain.evaluation.video.reach import Reach, circle, square

pytestmark = pytest.mark.quick

PATCH = 32  # large, so that frames have few


@pytest.mark.parametrize(
    ("height", "width", "settings"),
    [
        (15, 29, Propagation(5, 0.1, square(4))),  # several tiles, the last of a side smaller
        (13, 25, Propagation(5, 0.2, circle(3))),
        (7, 5, DINO.propagation),  # every place is near
        (6, 12, Propagation(5, 0.1, square(0))),  # fewer places in reach than neighbours
        (1, 3, Propagation(50, 0.1, square(12))),  # fewer patches than neighbours
    ],
)
@pytest.mark.parametrize("frames", [1, 3])
def test_labels_equal_the_published_formula(height: int, width: int, settings: Propagation, frames: int) -> None:
    target, sources, labels = frames_of(height, width, objects=2, frames=frames)
    most = Propagation(min(settings.neighbours, frames * height * width), settings.temperature, settings.reach)
    found, expected = settings.labels(target, sources, labels), published(target, sources, labels, most)
    error = float((found - expected).abs().max())
    assert error <= 2e-6, f"{error:.1e} apart"  # of float32 cosines over a temperature of 0.1


def test_all_that_are_as_near_as_the_last_count() -> None:
    """Three equal source frames: of each three equal affinities the fifth largest is the second one."""
    target, sources, labels = frames_of(9, 14, objects=2, frames=3)
    exact = torch.randint(-2, 3, sources.shape[1:], generator=torch.Generator().manual_seed(0)).float() / 64
    sources = exact.expand(3, -1, -1, -1)  # products of these are exact, so that ties are
    target = exact.roll(1, 0)
    found = DINO.propagation.labels(target, sources, labels)
    expected = published(target, sources, labels, DINO.propagation)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    cut = Propagation(6, 0.1, DINO.propagation.reach).labels(target, sources, labels)
    assert float((cut - expected).abs().max()) < 1e-6, "the sixth is as near as the fifth"
    assert float((Propagation(4, 0.1, square(12)).labels(target, sources, labels) - expected).abs().max()) < 1e-6


def test_reach_is_a_square_or_a_circle() -> None:
    shapes: list[tuple[Reach, Callable[[int, int], bool]]] = [
        (square(2), lambda y, x: max(y, x) <= 2),
        (circle(2), lambda y, x: y * y + x * x <= 4),
    ]
    for reach, inside in shapes:
        found = reach.within(slice(1, 3), slice(4, 6), slice(0, 5), slice(2, 9))
        expected = [
            [[inside(abs(y - v), abs(x - u)) for u in range(2, 9)] for v in range(5)] for y in (1, 2) for x in (4, 5)
        ]
        assert found.tolist() == expected


@pytest.mark.parametrize(
    ("protocol", "height", "width", "patch", "expected"),
    [
        (DINO, 480, 854, 16, (480, 832)),
        (DINO, 1920, 1080, 8, (832, 480)),
        (DINO, 480, 480, 16, (480, 448)),
        (DINO, 480, 854, 14, (476, 826)),
        (DINOV3, 480, 854, 16, (960, 1712)),
        (DINOV3, 854, 480, 14, (1722, 966)),
    ],
)
def test_sizes_are_the_published_ones(
    protocol: Protocol, height: int, width: int, patch: int, expected: tuple[int, int]
) -> None:
    assert protocol.size(height, width, patch) == expected


def colours(pixels: torch.Tensor) -> torch.Tensor:
    """[h, w, F] features that tell the colour of a patch."""
    means = functional.avg_pool2d(pixels[None], PATCH)[0].permute(1, 2, 0)
    return torch.cat([means, 1 - means], dim=2) - 0.5


@pytest.mark.parametrize("protocol", [DINO, DINOV3])
def test_objects_are_followed_and_one_that_leaves_is_gone(protocol: Protocol) -> None:
    """A red square moves a sixth of the frame to the right; a blue one leaves after the third frame."""
    frames, masks = [], []
    for time in range(6):
        frame, mask = np.full((120, 160, 3), 128, np.uint8), np.zeros((120, 160), np.uint8)
        areas = [(slice(20, 60), slice(20 + 5 * time, 60 + 5 * time), 0, 1)]
        areas += [(slice(70, 110), slice(100, 140), 2, 2)] if time < 3 else []
        for rows, columns, channel, number in areas:
            frame[rows, columns] = np.eye(3, dtype=np.uint8)[channel] * 255
            mask[rows, columns] = number
        frames.append(torch.from_numpy(frame).permute(2, 0, 1))
        masks.append(mask)
    found = list(follow(frames, masks[0], colours, PATCH, protocol))
    assert (found[0] == masks[0]).all()
    for predicted, mask in zip(found[1:], masks[1:], strict=True):
        assert predicted.dtype == np.uint8
        for number in (1, 2):
            if (mask == number).any():
                union = ((predicted == number) | (mask == number)).sum()
                assert ((predicted == number) & (mask == number)).sum() / union > 0.65
    assert (found[-1] == 2).mean() < 0.03, "what has left covers next to nothing"


@pytest.mark.parametrize("protocol", [DINO, DINOV3])
def test_each_label_is_stretched_before_the_largest_is_taken(protocol: Protocol) -> None:
    """The background is the larger everywhere, but the object's own largest value is on the right."""
    scores = torch.tensor([[[0.9, 0.6]], [[0.1, 0.4]]])
    assert protocol.enlarged(scores, 1, (1, 2)).tolist() == [[0, 1]]
    assert protocol.enlarged(torch.full_like(scores, 0.5), 1, (1, 2)).tolist() == [[0, 0]]


def test_sources_are_the_first_frame_and_the_last_few() -> None:
    """Frame n is n of 255 everywhere, and so is the label that its patches are given."""
    seen: list[tuple[list[int], list[int]]] = []

    class Recorded:
        def labels(self, target: torch.Tensor, sources: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            seen.append((numbers(sources[:, 0, 0, 0]), numbers(labels[:, 0, 0, 1])))
            return torch.stack([1 - target[..., 0], target[..., 0]], dim=2)

    def numbers(values: torch.Tensor) -> list[int]:
        return (255 * values).round().int().tolist()

    def level(pixels: torch.Tensor) -> torch.Tensor:
        shade = functional.avg_pool2d(pixels[:1], PATCH).permute(1, 2, 0)
        return torch.cat([shade, (1 - shade**2).sqrt()], dim=2)  # of length 1

    protocol = replace(DINO, propagation=Recorded(), earlier=2)  # type: ignore[arg-type]
    frames = [torch.full((3, 64, 80), number, dtype=torch.uint8) for number in range(6)]
    mask = np.zeros((64, 80), np.uint8)
    mask[:32] = 1
    list(follow(frames, mask, level, PATCH, protocol))
    expected = [[0], [0, 1], [0, 1, 2], [0, 2, 3], [0, 3, 4]]
    assert [shades for shades, _ in seen] == expected
    assert [labels for _, labels in seen] == [[255, *later] for _, *later in expected], "soft labels, not the largest"


def test_a_frame_without_objects_stays_so() -> None:
    frames = [torch.randint(0, 256, (3, 64, 80), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))] * 3
    for mask in follow(frames, np.zeros((64, 80), np.uint8), colours, PATCH, DINO):
        assert not mask.any()


def test_a_frame_of_another_size_is_refused() -> None:
    frames = [torch.zeros(3, 64, 80, dtype=torch.uint8), torch.zeros(3, 64, 96, dtype=torch.uint8)]
    with pytest.raises(ValueError, match=r"a frame has \(64, 96\) pixels; expected \(64, 80\)"):
        list(follow(frames, np.zeros((64, 80), np.uint8), colours, PATCH, DINO))
