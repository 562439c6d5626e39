"""The masked autoencoder: an encoder of the visible patches, and a narrow decoder of all of them.

Legend: B images, C channels, p side of a patch in pixels, N patches, n of them, F features of the encoder.
"""

import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from vmf_pretrain.config.decoder import DecoderConfig
from vmf_pretrain.networks.positions import COLUMN_FIRST, grid_positions
from vmf_pretrain.networks.unit import Unit
from vmf_pretrain.networks.visible import tokens_of

TOKEN_SPREAD = 0.02  # of the class token and the mask token at the start, as published


class Decoder(Unit):
    """Predicts every patch from the tokens of some.

    Args:
        features: F.
        grid: patches along each axis.
        outputs: numbers that are predicted for a patch.
        size: width, depth and heads.

    Source: He et al., "Masked autoencoders are scalable vision learners", CVPR 2022, section 3; names of parameters as in the
    published network without "decoder_".
    """

    pos_embed: Tensor

    def __init__(self, features: int, grid: tuple[int, ...], outputs: int, size: DecoderConfig) -> None:
        super().__init__()
        self.embed = nn.Linear(features, size.width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, size.width))
        patches = grid_positions(grid, size.width, COLUMN_FIRST)
        self.register_buffer("pos_embed", torch.cat([patches.new_zeros(1, size.width), patches]).unsqueeze(0))
        self.blocks = nn.Sequential(*(Block(size.width, size.heads, qkv_bias=True) for _ in range(size.depth)))
        self.norm = nn.LayerNorm(size.width, eps=1e-6)
        self.pred = nn.Linear(size.width, outputs)

    def forward(self, tokens: Tensor, kept: Tensor) -> Tensor:
        """[B, N, outputs] for the tokens [B, 1 + n, F] of the class and of the patches at [B, n]."""
        embedded = self.embed(tokens)
        patches = self.pos_embed.shape[1] - 1
        hidden = self.mask_token.to(embedded.dtype).expand(len(tokens), patches, -1)
        places = kept.unsqueeze(-1).expand(-1, -1, embedded.shape[-1])
        whole = torch.cat([embedded[:, :1], hidden.scatter(1, places, embedded[:, 1:])], dim=1)
        decoded: Tensor = self.pred(self.norm(self.blocks(whole + self.pos_embed)))
        return decoded[:, 1:]


class MaskedAutoencoder(nn.Module):
    """Encoder and decoder.

    Args:
        backbone: a vision transformer with a class token, changed by ``see_some``.
        decoder: of its features.
    """

    def __init__(self, backbone: VisionTransformer, decoder: Decoder) -> None:
        super().__init__()
        self.backbone = backbone
        self.decoder = decoder

    def forward(self, inputs: Tensor, kept: Tensor) -> Tensor:
        """[B, N, outputs] for images of which the encoder sees the patches at [B, n]; registers are not decoded."""
        tokens, prefix = tokens_of(self.backbone, inputs, kept), self.backbone.num_prefix_tokens
        decoded: Tensor = self.decoder(torch.cat([tokens[:, :1], tokens[:, prefix:]], dim=1), kept)
        return decoded


def initialise(network: MaskedAutoencoder) -> None:
    """Xavier's uniform initialisation of every linear layer and of the patch embedding as a matrix; tokens normal; biases 0."""
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    with torch.no_grad():
        nn.init.xavier_uniform_(network.backbone.get_parameter("patch_embed.proj.weight").flatten(1))
        for token in (network.backbone.get_parameter("cls_token"), network.decoder.mask_token):
            token.normal_(0.0, TOKEN_SPREAD)


def patches_of(images: Tensor, side: int) -> Tensor:
    """[B, N, p * p * C] the pixels of each patch, channels last, of images [B, C, H, W]."""
    count, channels, height, width = images.shape
    cut = images.reshape(count, channels, height // side, side, width // side, side)
    return cut.permute(0, 2, 4, 3, 5, 1).reshape(count, -1, side * side * channels)


def images_of(patches: Tensor, grid: tuple[int, ...], side: int) -> Tensor:
    """[B, C, H, W]: the inverse of ``patches_of``."""
    rows, columns = grid
    cut = patches.reshape(len(patches), rows, columns, side, side, -1)
    return cut.permute(0, 5, 1, 3, 2, 4).reshape(len(patches), -1, rows * side, columns * side)


def hidden_from(kept: Tensor, patches: int) -> Tensor:
    """[B, N] bool: whether a patch is not among those at [B, n]."""
    return torch.ones(len(kept), patches, dtype=torch.bool, device=kept.device).scatter(1, kept, False)
