"""Masks of global views: which patches the student does not see. iBOT's and DINOv2's samplers; both hide blocks.

Legend: B images of the global batch, G global views, H x W patches of a view.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor

MASK = "mask"  # the name of the masks in a batch: [B, G, H, W] bool, True where a patch is hidden
LEAST_ASPECT = 0.3  # height over width of a block; the largest is its inverse
TRIES = 10  # blocks drawn before a mask stays as it is
LEAST_BLOCK = 4  # patches of DINOv2's smallest block
UNIFORMS = 64  # random numbers drawn at a time

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class RatioMasks:
    """iBOT's sampler: each view draws a share of hidden patches, whatever the other views draw.

    Args:
        grid: H and W.
        views: G.
        ratios: means of the share; a view takes one of them with equal probability.
        spreads: largest distance of the share from each mean.
        blocks: whether blocks are hidden, or else as many patches at random places.

    Source: Zhou et al., "iBOT: image BERT pre-training with online tokenizer", ICLR 2022, section 4.1 and appendix; repository
    bytedance/ibot, loader.py, whose blocks are those of Bao et al., "BEiT", ICLR 2022, algorithm 1.
    """

    grid: tuple[int, int]
    views: int
    ratios: Sequence[float]
    spreads: Sequence[float]
    blocks: bool = True

    def draw(self, generators: Sequence[Generator]) -> dict[str, Tensor]:
        """Masks [B, G, H, W] of a batch; row b depends on its own generator only."""
        drawn = [[self._of_view(numbers) for _ in range(self.views)] for numbers in map(Uniforms, generators)]
        return {MASK: torch.from_numpy(np.array(drawn))}

    def _of_view(self, numbers: "Uniforms") -> Mask:
        height, width = self.grid
        shares = [
            numbers.between(middle - spread, middle + spread)
            for middle, spread in zip(self.ratios, self.spreads, strict=True)
        ]
        wanted = shares[numbers.below(len(shares))] * height * width
        if not self.blocks:
            return _scattered(numbers, self.grid, int(wanted))
        least = (min(height, width) // 3) ** 2
        return hide_blocks(numbers, self.grid, wanted, least=least, most=math.inf)


@dataclass(frozen=True)
class SpreadMasks:
    """DINOv2's sampler: a fixed share of a batch's global views is masked, and their shares are spread over a range.

    The masked views divide the range into as many equal steps, draw their share each in a step of its own, and are then
    dealt out at random over the batch. So every batch has nearly the same number of hidden patches.

    Args:
        grid: H and W.
        views: G.
        masked: share of the views of a batch that are masked.
        shares: the range of the share of hidden patches in a masked view.

    Source: Oquab et al., "DINOv2", TMLR 2024; repository facebookresearch/dinov2, dinov2/data/collate.py and masking.py. There
    each rank deals out its own views; here the global batch's are, so that a run does not depend on the number of ranks.
    """

    grid: tuple[int, int]
    views: int
    masked: float
    shares: tuple[float, float]

    def draw(self, generators: Sequence[Generator]) -> dict[str, Tensor]:
        """Masks [B, G, H, W] of a batch; who is masked, and how much, is drawn from the first image's generator."""
        count = len(generators) * self.views
        bounds = self._bounds(len(generators))
        place = torch.randperm(count, generator=generators[0]).tolist()
        drawn = [
            [self._of_view(numbers, bounds, place[image * self.views + view]) for view in range(self.views)]
            for image, numbers in enumerate(map(Uniforms, generators))
        ]
        return {MASK: torch.from_numpy(np.array(drawn))}

    def most_hidden(self, images: int) -> int:
        """The number of hidden patches that no batch of so many images exceeds."""
        return sum(int(math.prod(self.grid) * bound) for bound in self._bounds(images)[1:])

    def _bounds(self, images: int) -> list[float]:
        """The ends of the masked views' steps."""
        steps = int(images * self.views * self.masked)
        return [float(bound) for bound in np.linspace(*self.shares, steps + 1)]

    def _of_view(self, numbers: "Uniforms", bounds: list[float], place: int) -> Mask:
        height, width = self.grid
        if place >= len(bounds) - 1:
            return np.zeros(self.grid, dtype=bool)
        wanted = int(height * width * numbers.between(bounds[place], bounds[place + 1]))
        return hide_blocks(numbers, self.grid, wanted, least=LEAST_BLOCK, most=height // 2 * width)


def hide_blocks(numbers: "Uniforms", grid: tuple[int, int], wanted: float, *, least: float, most: float) -> Mask:
    """[H, W] a mask grown block by block up to ``wanted`` patches; it may stop short, and never exceeds that.

    A block has an area between ``least`` and what is still wanted (at most ``most``; the two may be in either order), an
    aspect ratio whose logarithm is uniform, and is narrower and lower than the grid. It is taken if it adds a patch, and not
    more than are wanted. After TRIES blocks in a row that do not fit, the mask stays as it is.
    """
    mask, hidden = np.zeros(grid, dtype=bool), 0
    while hidden < wanted:
        room = min(wanted - hidden, most)
        added = next((new for new in (_hide_one(numbers, mask, least, room) for _ in range(TRIES)) if new), 0)
        if not added:
            break
        hidden += added
    return mask


def _hide_one(numbers: "Uniforms", mask: Mask, least: float, room: float) -> int:
    """Draw a block and hide it if it fits; the number of patches that it adds."""
    area = numbers.between(least, room)
    aspect = math.exp(numbers.between(math.log(LEAST_ASPECT), -math.log(LEAST_ASPECT)))
    height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    rows, columns = mask.shape
    if height >= rows or width >= columns:
        return 0
    top, left = numbers.below(rows - height + 1), numbers.below(columns - width + 1)
    block = mask[top : top + height, left : left + width]
    added = height * width - int(np.count_nonzero(block))
    if not 0 < added <= room:
        return 0
    block[:] = True
    return added


def _scattered(numbers: "Uniforms", grid: tuple[int, int], count: int) -> Mask:
    """[H, W] a mask of ``count`` patches at random places."""
    keys = np.array([numbers.next() for _ in range(math.prod(grid))])
    mask = np.zeros(math.prod(grid), dtype=bool)
    mask[np.argsort(keys, kind="stable")[:count]] = True
    return mask.reshape(grid)


class Uniforms:
    """Random numbers of one generator, drawn many at a time: a call for each would take most of the loader's time."""

    def __init__(self, generator: Generator) -> None:
        self._generator = generator
        self._left: list[float] = []

    def next(self) -> float:
        """The next number in [0, 1)."""
        if not self._left:
            self._left = torch.rand(UNIFORMS, dtype=torch.float64, generator=self._generator).tolist()
        return self._left.pop()

    def between(self, one: float, other: float) -> float:
        """A number between two, in either order."""
        return one + (other - one) * self.next()

    def below(self, count: int) -> int:
        """A whole number in [0, count)."""
        return int(self.next() * count)
