"""Views of bundled images: each has one affine map, a gain and noise. A whole batch is computed at once.

Legend: B images, S side of the canvas, s side of a view.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from vmf_pretrain.config.views import DigitViewConfig
from vmf_pretrain.data.randomness import VIEW, generator_for

# Uniform numbers per view: zoom, rotation, horizontal place, vertical place, gain.
UNIFORM_DRAWS = 5


def ink_middles(images_BSS: Tensor) -> Tensor:
    """[B, 2] centre of mass of each image's ink, (x, y) in pixels from the middle of the canvas."""
    side = images_BSS.shape[-1]
    places = torch.arange(side, dtype=images_BSS.dtype) - (side - 1) / 2
    ink = images_BSS.sum(dim=(1, 2)).clamp(min=torch.finfo(images_BSS.dtype).tiny)
    x_B = (images_BSS.sum(dim=1) * places).sum(dim=1) / ink
    y_B = (images_BSS.sum(dim=2) * places).sum(dim=1) / ink
    return torch.stack([x_B, y_B], dim=1)


def draw(
    seed: int, epoch: int, indices: list[int], view: int, side: int, *, use: int = VIEW
) -> tuple[Tensor, Tensor, Tensor]:
    """The random numbers of one view of each image.

    Returns:
        [B, UNIFORM_DRAWS] in [-1, 1), [B, side, side] standard normal, and [B] in [0, 1) for the flip.
    """
    uniform = torch.empty(len(indices), UNIFORM_DRAWS)
    normal = torch.empty(len(indices), side * side)
    flip = torch.empty(len(indices), 1)
    for row, index in enumerate(indices):
        generator = generator_for(seed, use, epoch, index, view)
        torch.rand(UNIFORM_DRAWS, generator=generator, out=uniform[row])
        torch.randn(side * side, generator=generator, out=normal[row])
        torch.rand(1, generator=generator, out=flip[row])
    return uniform * 2 - 1, normal.view(-1, side, side), flip.squeeze(1)


@dataclass(frozen=True, eq=False)
class Placed:
    """Images on canvases.

    Attributes:
        canvases: [B, S, S] ink in [0, 1].
        middles: [B, 2] what a view is turned about, (x, y) in pixels from the middle of the canvas.
        extent: side of an image before it was put on its canvas, pixels.
    """

    canvases: Tensor
    middles: Tensor
    extent: int


def affine_views(
    placed: Placed, uniform: Tensor, config: DigitViewConfig, side: int, *, flipped: Tensor | None = None
) -> Tensor:
    """[B, side, side] views: the image magnified, turned and perhaps mirrored about its own middle.

    A view as large as the canvas is global: the image is put anywhere it fits. A smaller view is local: it shows a part.

    Args:
        placed: B images.
        uniform: [B, UNIFORM_DRAWS] in [-1, 1].
        config: what the numbers mean.
        side: of the views, pixels.
        flipped: [B] bool, which views are mirrored; None mirrors none.
    """
    images_BSS, middles_B2 = placed.canvases, placed.middles
    canvas = images_BSS.shape[-1]
    low, high = config.global_zoom if side == canvas else config.local_zoom
    zoom_B = low * (high / low) ** ((uniform[:, 0] + 1) / 2)
    angle_B = torch.deg2rad(config.rotation * uniform[:, 1])
    reach = (canvas - placed.extent) / 2 if side == canvas else config.local_shift
    shift_B2 = uniform[:, 2:4] * reach
    # grid_sample needs the map from the view's to the canvas's coordinates, both scaled to [-1, 1].
    cos_B, sin_B = angle_B.cos() / zoom_B, angle_B.sin() / zoom_B
    linear_B22 = torch.stack([cos_B, -sin_B, sin_B, cos_B], dim=1).view(-1, 2, 2)
    if flipped is not None:
        linear_B22[flipped, 0] *= -1
    offset_B2 = middles_B2 - (linear_B22 @ shift_B2.unsqueeze(2)).squeeze(2)
    theta_B23 = torch.cat([linear_B22 * (side / canvas), offset_B2.unsqueeze(2) * (2 / canvas)], dim=2)
    grid = affine_grid(theta_B23, [len(images_BSS), 1, side, side], align_corners=False)
    return grid_sample(images_BSS.unsqueeze(1), grid, align_corners=False).squeeze(1)


def placed_view(
    placed: Placed, *, seed: int, epoch: int, indices: list[int], view: int, side: int, config: DigitViewConfig
) -> Tensor:
    """[B, 1, side, side] view number ``view`` of the images; row b is a pure function of (seed, epoch, indices[b], view)."""
    uniform, normal, flip = draw(seed, epoch, indices, view, side)
    views_Bss = affine_views(placed, uniform, config, side, flipped=flip < config.flip)
    gain_B11 = (1 + config.gain * uniform[:, 4]).view(-1, 1, 1)
    return (views_Bss * gain_B11 + config.noise * normal).unsqueeze(1)
