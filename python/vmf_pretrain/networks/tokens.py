"""A vision transformer that hides patches and returns those that it has computed.

Legend: B images, H x W = N patches of an image, F features.
"""

from typing import Any, NamedTuple

import torch
from timm.models import VisionTransformer
from torch import Tensor, nn

from vmf_pretrain.networks.positions import resized_as_dino


class Hidden(NamedTuple):
    """Which patches a network does not see, when its patches are wanted.

    Attributes:
        mask: [B, H, W] bool, True where a patch is replaced; None for none.
    """

    mask: Tensor | None = None


class TokenTransformer(VisionTransformer):
    """timm's ``VisionTransformer``, with the same parameters, whose patches can be hidden and are returned on request.

    Attributes:
        mask_token: [1, F] what takes the place of a hidden patch's embedding, before its position is added; or None.
    """

    mask_token: nn.Parameter | None
    resizes_as_dino = False  # positions for images of another size; else as timm

    def learn_to_hide(self) -> None:
        """Add the mask token, which starts at 0, as published."""
        self.mask_token = nn.Parameter(torch.zeros(1, self.embed_dim))

    def _pos_embed(self, x: Tensor) -> Tensor:
        """[B, P + H * W, F] embedded patches [B, H, W, F] with their positions, after the prefix tokens."""
        grid, table = tuple(self.patch_embed.grid_size), self.pos_embed
        resizes = self.resizes_as_dino and self.dynamic_img_size and tuple(x.shape[1:3]) != grid
        if table is None or not resizes:
            tokens: Tensor = super()._pos_embed(x)
            return tokens
        placed = 0 if self.no_embed_class else self.num_prefix_tokens  # prefix tokens that have a position
        positions = torch.cat([table[:, :placed], resized_as_dino(table[:, placed:], grid, x.shape[1:3])], dim=1)
        first = [token.expand(len(x), -1, -1) for token in (self.cls_token, self.reg_token) if token is not None]
        patches = x.flatten(1, 2)
        if self.no_embed_class:
            tokens = torch.cat([*first, patches + positions], dim=1)
        else:
            tokens = torch.cat([*first, patches], dim=1) + positions
        placed_tokens: Tensor = self.pos_drop(tokens)
        return placed_tokens

    def forward(self, x: Tensor, *rest: Any, hidden: Hidden | None = None) -> Tensor:
        """Images [B, C, side, side] to features [B, F]; with ``hidden`` to [B, 1 + N, F], the features and the patches.

        Registers are not returned.
        """
        if hidden is None:
            features: Tensor = super().forward(x, *rest)
            return features
        patches = self.patch_embed(x)  # [B, H, W, F] of a network with dynamic_img_size
        if hidden.mask is not None:
            assert self.mask_token is not None
            patches = torch.where(hidden.mask[..., None], self.mask_token.to(patches.dtype), patches)
        tokens = self.norm(self.blocks(self.norm_pre(self.patch_drop(self._pos_embed(patches)))))
        return torch.cat([self.forward_head(tokens)[:, None], tokens[:, self.num_prefix_tokens :]], dim=1)


def return_tokens(backbone: VisionTransformer) -> None:
    """Make a plain ``VisionTransformer`` a ``TokenTransformer``, in place; timm's other kinds stay as they are."""
    if type(backbone) is VisionTransformer:
        backbone.__class__ = TokenTransformer
        backbone.register_parameter("mask_token", None)
