"""A vision transformer that sees some of the patches of an image.

Legend: B images, P prefix tokens, N patches, n of them, D embedding dimension.
"""

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn


class Visible(nn.Module):
    """Takes the place of timm's ``patch_drop``, between the positions and the first block: keeps the prefix and some patches.

    Args:
        prefix: P.

    Attributes:
        kept: [B, n] int64 places of the patches that the next images show, or None for all.
    """

    def __init__(self, prefix: int) -> None:
        super().__init__()
        self.prefix = prefix
        self.kept: Tensor | None = None

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, P + N, D] to [B, P + n, D]."""
        if self.kept is None:
            return tokens
        seen = chosen(tokens[:, self.prefix :], self.kept)
        return torch.cat([tokens[:, : self.prefix], seen], dim=1)


def see_some(backbone: VisionTransformer) -> None:
    """Let ``tokens_of`` choose what a vision transformer sees; what it computes of all patches stays the same."""
    setattr(backbone, "patch_drop", Visible(backbone.num_prefix_tokens))  # noqa: B010 -- typed as timm's own


def tokens_of(backbone: VisionTransformer, inputs: Tensor, kept: Tensor | None = None) -> Tensor:
    """[B, P + n, D] tokens after the last norm.

    Args:
        backbone: changed by ``see_some``.
        inputs: [B, ...] network inputs.
        kept: [B, n] int64 places of the patches that the transformer sees, or None for all N.
    """
    gate = backbone.patch_drop
    assert isinstance(gate, Visible)
    gate.kept = kept
    try:
        tokens: Tensor = backbone.forward_features(inputs)
    finally:
        gate.kept = None
    return tokens


def patch_tokens(backbone: VisionTransformer, inputs: Tensor, kept: Tensor | None = None) -> Tensor:
    """[B, n, D] the same without the prefix."""
    return tokens_of(backbone, inputs, kept)[:, backbone.num_prefix_tokens :]


def chosen(tokens: Tensor, places: Tensor) -> Tensor:
    """[B, n, D] the tokens [B, N, D] at the places [B, n]."""
    return tokens.gather(1, places.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
