"""Backbones: timm's vision transformers, of any width, depth and input size."""

from typing import Any

import timm
from torch import nn

from vmf_pretrain.config.backbone import BackboneConfig
from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.config.run import Config
from vmf_pretrain.data.network_input import network_input
from vmf_pretrain.networks.checkpointing import checkpoint_block
from vmf_pretrain.networks.stochastic_depth import own_stochastic_depth


def build_backbone(config: Config, *, drop_path: float = 0.0) -> timm.models.VisionTransformer:
    """A vision transformer for the network input of a configuration; it returns [B, F] features without a classifier.

    Args:
        config: its ``backbone`` section, and the input's size and channels.
        drop_path: rate of stochastic depth of the last block; that of the first is 0.

    Raises:
        PretrainError: timm does not know the name, or it is not a vision transformer of the configured shape.
    """
    chosen, fed = config.backbone, network_input(config)
    options: dict[str, Any] = {"embed_dim": chosen.width, "depth": chosen.depth, "num_heads": chosen.heads}
    try:
        backbone = timm.create_model(
            chosen.name,
            img_size=fed.size,
            patch_size=chosen.patch_size,
            in_chans=fed.channels,
            num_classes=0,
            drop_path_rate=drop_path,
            dynamic_img_size=True,
            **{name: value for name, value in options.items() if value is not None},
        )
    except (RuntimeError, TypeError, AssertionError, ValueError) as error:
        raise PretrainError(_unfit(chosen, " ".join(str(error).split()))) from None
    if not isinstance(backbone, timm.models.VisionTransformer):
        raise PretrainError(_unfit(chosen, f"it is a {type(backbone).__name__}"))
    own_stochastic_depth(backbone)
    if config.train.activation_checkpointing:
        for block in backbone.blocks:
            checkpoint_block(block)
    return backbone


def xavier(network: nn.Module) -> None:
    """Xavier's uniform initialisation of every linear layer except the prototypes."""
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)


def _unfit(chosen: BackboneConfig, reason: str) -> str:
    return f"backbone.name {chosen.name} cannot be built as a vision transformer of that shape: {reason}."
