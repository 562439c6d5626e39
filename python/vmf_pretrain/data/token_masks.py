"""Masks over the tokens of an image or a clip: MAE's random ones, and the blocks of I-JEPA and V-JEPA.

A grid of tokens has its rows and columns last; a block spans all axes before them, such as the whole time of a clip.

Legend: B images of the global batch, N tokens of the grid in raster order, n of them, M blocks, H x W tokens of the plane.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor

from vmf_pretrain.config.blocks import BlocksConfig
from vmf_pretrain.config.errors import PretrainError

Grid = tuple[int, ...]
Sides = tuple[int, int]  # height and width, tokens
Planes = NDArray[np.bool_]  # [..., H, W] whether a token is in a block
Numbers = NDArray[np.float64]  # [..., 2] uniform in [0, 1): where a block lies, down and across

TRIES = 20  # draws of a context before one target fewer is taken out of it, as published
SIZES = 101  # random numbers for which the sizes of blocks are checked before a run


@dataclass(frozen=True)
class RandomMasks:
    """MAE's masks: the same number of tokens of every image stays, any of them as likely as another.

    Attributes:
        grid: tokens along each axis.
        masked: share of the tokens that are masked; the number that stays is rounded down, as published.

    Raises:
        PretrainError: none or all would stay.

    Source: He et al., "Masked autoencoders are scalable vision learners", CVPR 2022, and its published trainer.
    """

    grid: Grid
    masked: float

    def __post_init__(self) -> None:
        tokens = math.prod(self.grid)
        if not 0 < self.count < tokens:
            raise PretrainError(
                f"decoder.masked is {self.masked}, which leaves {self.count} of {tokens} patches; expected some, not all."
            )

    @property
    def count(self) -> int:
        """n, the tokens that stay."""
        return int(math.prod(self.grid) * (1 - self.masked))

    def draw(self, generators: Sequence[Generator]) -> dict[str, Tensor]:
        """``kept`` [B, n] int64, in raster order; a row is a function of its own generator."""
        orders = [torch.rand(math.prod(self.grid), generator=one).argsort() for one in generators]
        return {"kept": torch.stack([order[: self.count].sort().values for order in orders])}


@dataclass(frozen=True)
class MultiBlockMasks:
    """I-JEPA's masks: M blocks to predict, and a large block without them to predict from.

    The blocks of a batch have one size, which the first image's generator draws; so the masks are those of the global batch
    on every rank. Contexts are cut to the shortest of the batch in raster order, which loses their lower part.

    Attributes:
        grid: tokens along each axis.
        blocks: areas, aspects, and where blocks may lie.

    Raises:
        PretrainError: a block could never exceed ``min_keep`` tokens (the published sampler would not end), or lies nowhere.

    Source: Assran et al., "Self-supervised learning from images with a joint-embedding predictive architecture", CVPR 2023,
    and its published multi-block sampler.
    """

    grid: Grid
    blocks: BlocksConfig

    def __post_init__(self) -> None:
        shares = [place / (SIZES - 1) for place in range(SIZES)]
        sides = [*map(self._target_sides, shares), *map(self._context_sides, shares)]
        _require_larger(self.grid, sides, self.blocks.min_keep)

    def draw(self, generators: Sequence[Generator]) -> dict[str, Tensor]:
        """``target.0`` [B, M, n] and ``context.0`` [B, n'] int64, in raster order."""
        target, context = torch.rand(2, generator=generators[0]).tolist()
        wanted = self.blocks.targets
        tries = (wanted + 1) * TRIES
        numbers = _uniform(generators, wanted + tries)
        targets = self._planes(self._target_sides(target), numbers[:, :wanted])
        contexts = self._contexts(self._context_sides(context), numbers[:, wanted:], targets)
        places = _cut(self.grid, targets.reshape(-1, *targets.shape[2:]))
        return {"context.0": _cut(self.grid, contexts), "target.0": places.reshape(len(generators), wanted, -1)}

    def _contexts(self, sides: Sides, numbers: Numbers, targets: Planes) -> Planes:
        """[B, H, W]: the first of the blocks, drawn by [B, tries, 2] numbers, that has enough tokens outside the targets.

        After every TRIES of them, one target fewer is taken out.
        """
        found = self._planes(sides, numbers[:, 0]) & ~targets.any(axis=1)
        depth = math.prod(self.grid[:-2])
        for image in np.flatnonzero(found.sum(axis=(1, 2)) * depth <= self.blocks.min_keep):
            for one in range(1, numbers.shape[1]):
                taken = targets[image, : targets.shape[1] - one // TRIES].any(axis=0)
                found[image] = self._planes(sides, numbers[image, one]) & ~taken
                if found[image].sum() * depth > self.blocks.min_keep:
                    break
        return found

    def _planes(self, sides: Sides, numbers: Numbers) -> Planes:
        return _planes(self.grid, sides, numbers, margin=self._margin)

    def _target_sides(self, share: float) -> Sides:
        """One number for area and aspect, as published."""
        area, aspect = _between(self.blocks.target_area, share), _between(self.blocks.target_aspect, share)
        return _sides(self.grid, area, aspect, margin=self._margin)

    def _context_sides(self, share: float) -> Sides:
        return _sides(self.grid, _between(self.blocks.context_area, share), 1.0, margin=self._margin)

    @property
    def _margin(self) -> int:
        """Rows and columns at the end that no block reaches: published corners are drawn with an exclusive upper end."""
        return 1 if self.blocks.edges == "published" else 0


@dataclass(frozen=True)
class TubeMasks:
    """V-JEPA's masks: blocks through the whole time of a clip are predicted from the rest; many small ones, a few large ones.

    Attributes:
        grid: tokens along each axis.
        blocks: numbers, areas and aspect.

    Source: Bardes et al., "Revisiting feature prediction for learning visual representations from video", TMLR 2024, and its
    published sampler.
    """

    grid: Grid
    blocks: BlocksConfig

    def __post_init__(self) -> None:
        low, high = self.blocks.clip_aspect
        aspects = [_between((low, high), place / (SIZES - 1)) for place in range(SIZES)]
        areas = self.blocks.short_area, self.blocks.long_area
        sides = [_sides(self.grid, area, aspect, margin=0) for area in areas for aspect in aspects]
        _require_larger(self.grid, sides, 0)
        if max(height * width for height, width in sides) == math.prod(self.grid[-2:]):
            raise PretrainError(
                f"blocks of {max(areas)} of the area cover all of {self.grid} tokens; expected smaller ones."
            )

    def draw(self, generators: Sequence[Generator]) -> dict[str, Tensor]:
        """``context.i`` [B, n] and ``target.i`` [B, 1, n'] int64 of masks i = 0 (short), 1 (long), cut to the shortest."""
        masks = (self.blocks.short_count, self.blocks.short_area), (self.blocks.long_count, self.blocks.long_area)
        found: dict[str, Tensor] = {}
        for place, (count, area) in enumerate(masks):
            aspect = _between(self.blocks.clip_aspect, float(torch.rand((), generator=generators[0])))
            covered = self._covered(count, _sides(self.grid, area, aspect, margin=0), generators)
            found[f"context.{place}"] = _cut(self.grid, ~covered)
            found[f"target.{place}"] = _cut(self.grid, covered).unsqueeze(1)
        return found

    def _covered(self, count: int, sides: Sides, generators: Sequence[Generator]) -> Planes:
        """[B, H, W] the union of blocks anywhere; those of an image are drawn again if they leave nothing."""
        blocks = _planes(self.grid, sides, _uniform(generators, count), margin=0)
        covered: Planes = np.logical_or.reduce(blocks, axis=1)
        whole = np.flatnonzero(covered.all(axis=(1, 2)))
        if len(whole):
            covered[whole] = self._covered(count, sides, [generators[image] for image in whole.tolist()])
        return covered


def _sides(grid: Grid, area: float, aspect: float, *, margin: int) -> Sides:
    """Height and width of a block with a share of the plane, at most the plane less ``margin``."""
    height, width = grid[-2:]
    tokens = int(height * width * area)
    wanted = round(math.sqrt(tokens * aspect)), round(math.sqrt(tokens / aspect))
    return min(wanted[0], height - margin), min(wanted[1], width - margin)


def _uniform(generators: Sequence[Generator], count: int) -> Numbers:
    """[B, count, 2] uniform in [0, 1), a row of each generator."""
    return torch.stack([torch.rand(count, 2, generator=one, dtype=torch.float64) for one in generators]).numpy()


def _planes(grid: Grid, sides: Sides, numbers: Numbers, *, margin: int) -> Planes:
    """[..., H, W] blocks at the places that [..., 2] numbers say; none reaches the last ``margin`` rows and columns."""
    inside = []
    for axis, (length, side) in enumerate(zip(grid[-2:], sides, strict=True)):
        start = (numbers[..., axis, None] * (length - side + 1 - margin)).astype(np.int64)
        inside.append((start <= np.arange(length)) & (np.arange(length) < start + side))
    rows, columns = inside
    planes: Planes = rows[..., :, None] & columns[..., None, :]
    return planes


def _cut(grid: Grid, planes: Planes) -> Tensor:
    """[B, n] int64 the first tokens that planes [B, H, W] mark, as many as the plane with the fewest does."""
    axes = len(grid) - 2
    spread = np.broadcast_to(np.expand_dims(planes, tuple(range(1, 1 + axes))), (len(planes), *grid)).reshape(
        len(planes), -1
    )
    first = np.argsort(~spread, axis=1, kind="stable")[:, : spread.sum(axis=1).min()]
    return torch.from_numpy(np.ascontiguousarray(first))


def _between(bounds: tuple[float, float], share: float) -> float:
    return bounds[0] + (bounds[1] - bounds[0]) * share


def _require_larger(grid: Grid, sides: Sequence[Sides], least: int) -> None:
    """Every block has more than ``least`` tokens."""
    height, width = min(sides, key=math.prod)
    tokens = height * width * math.prod(grid[:-2])
    if tokens <= least:
        raise PretrainError(
            f"a block of {height} x {width} of the {' x '.join(map(str, grid))} tokens has {max(tokens, 0)}, but "
            f"blocks.min_keep asks for more than {least}; use more patches, larger areas, or a smaller blocks.min_keep."
        )
