"""Tokens of clips: each covers a few frames of a square of pixels.

Legend: B clips, T frames, C channels, N tokens, D embedding dimension.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn


class TubeletEmbed(nn.Module):
    """Takes the place of timm's ``PatchEmbed`` in a vision transformer of clips.

    Args:
        img_size: side of a frame, pixels.
        patch_size: side of a token's square, pixels.
        in_chans: C.
        embed_dim: D.
        frames: T.
        tubelet: frames that a token covers.
        bias: whether the projection has a bias.
        options: what timm passes besides and images alone need.
    """

    def __init__(
        self,
        img_size: int,
        patch_size: int,
        in_chans: int,
        embed_dim: int,
        *,
        frames: int,
        tubelet: int,
        bias: bool = True,
        **options: Any,
    ) -> None:
        super().__init__()
        side = img_size // patch_size
        self.grid_size = (frames // tubelet, side, side)
        self.num_patches = frames // tubelet * side * side
        self.proj = nn.Conv3d(in_chans, embed_dim, (tubelet, patch_size, patch_size), (tubelet, patch_size, patch_size))

    def forward(self, clips: Tensor) -> Tensor:
        """[B, N, D] tokens, in order of time, then rows, then columns, of clips [B, T, C, H, W]."""
        projected: Tensor = self.proj(clips.transpose(1, 2))
        return projected.flatten(2).transpose(1, 2)


def tubelets(frames: int, tubelet: int) -> Callable[..., TubeletEmbed]:
    """What makes the embedding, as timm's ``embed_layer`` wants it."""
    return partial(TubeletEmbed, frames=frames, tubelet=tubelet)
