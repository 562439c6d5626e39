"""A context encoder with a narrow predictor of the features of hidden tokens.

Legend: B images, N tokens of the grid, n of them in a context, M blocks of m tokens, F features of the encoder.
"""

from collections.abc import Sequence

import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.config.predictor import PredictorConfig
from vmf_pretrain.networks.positions import grid_positions
from vmf_pretrain.networks.unit import Unit
from vmf_pretrain.networks.visible import chosen, patch_tokens


class Predictor(Unit):
    """Predicts the features of blocks of tokens, each block by itself, from the features of a context.

    Args:
        features: F.
        grid: tokens along each axis, any number of axes.
        size: width, depth and heads.
        heads: what null heads stand for; None if nothing is known.
        axes: order of the positions' axes, as in ``grid_positions``.
        masks: how many contexts an image has; each has a mask token of its own.

    Raises:
        PretrainError: the width is no multiple of the heads, or how many there are is not known.
    Source: Assran et al., CVPR 2023, and Bardes et al., TMLR 2024; names of parameters as in the published networks without
    "predictor_".
    """

    pos_embed: Tensor

    def __init__(
        self,
        features: int,
        grid: tuple[int, ...],
        size: PredictorConfig,
        *,
        heads: int | None,
        axes: Sequence[int],
        masks: int = 1,
    ) -> None:
        super().__init__()
        heads = heads if size.heads is None else size.heads
        if heads is None:
            raise PretrainError(
                "predictor.heads is null but the backbone's blocks do not say how many they have; give it."
            )
        if size.width % heads:
            raise PretrainError(f"predictor.width is {size.width} but must be a multiple of its {heads} heads.")
        self.embed = nn.Linear(features, size.width)
        self.mask_tokens = nn.ParameterList(torch.zeros(1, 1, size.width) for _ in range(masks))
        self.register_buffer("pos_embed", grid_positions(grid, size.width, axes).unsqueeze(0))
        self.blocks = nn.Sequential(*(Block(size.width, heads, qkv_bias=True) for _ in range(size.depth)))
        self.norm = nn.LayerNorm(size.width, eps=1e-6)
        self.proj = nn.Linear(size.width, features)

    def forward(self, context: Tensor, places: Tensor, blocks: Tensor, mask: int = 0) -> Tensor:
        """[B, M * m, F] features at the places [B, M, m], from the context [B, n, F] at the places [B, n].

        Args:
            context: the encoder's features.
            places: of the context.
            blocks: the places to predict.
            mask: the number of the context.
        """
        images, count, tokens = blocks.shape
        seen = self.embed(context) + chosen(self.pos_embed.expand(images, -1, -1), places)
        seen = seen.repeat_interleave(count, dim=0)
        wanted = chosen(self.pos_embed.expand(images * count, -1, -1), blocks.flatten(0, 1))
        wanted = (wanted + self.mask_tokens[mask]).to(seen.dtype)
        joined = self.norm(self.blocks(torch.cat([seen, wanted], dim=1)))
        predicted: Tensor = self.proj(joined[:, -tokens:])
        return predicted.reshape(images, count * tokens, -1)


class ContextPredictor(nn.Module):
    """The trained network: the backbone sees contexts, the predictor sees its features.

    Args:
        backbone: a vision transformer, changed by ``see_some``.
        predictor: of its features.
    """

    def __init__(self, backbone: VisionTransformer, predictor: Predictor) -> None:
        super().__init__()
        self.backbone = backbone
        self.predictor = predictor

    def forward(self, inputs: Tensor, *masks: Tensor) -> Tensor:
        """[B, sum of M * m, F] for inputs and their masks: for each context in turn its places [B, n] and blocks [B, M, m]."""
        pairs = zip(masks[::2], masks[1::2], strict=True)
        return torch.cat(
            [
                self.predictor(patch_tokens(self.backbone, inputs, places), places, blocks, mask)
                for mask, (places, blocks) in enumerate(pairs)
            ],
            dim=1,
        )
