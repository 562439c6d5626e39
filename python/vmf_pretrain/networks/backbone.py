"""Backbones: timm's vision transformers, of any width, depth and input size."""

from typing import Any

import timm
from timm.layers.drop import DropPath
from timm.models.vision_transformer import Block
from torch import nn

from vmf_pretrain.config.backbone import BackboneConfig
from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.config.run import Config
from vmf_pretrain.data.network_input import network_input
from vmf_pretrain.networks.checkpointing import checkpoint_block
from vmf_pretrain.networks.stochastic_depth import StochasticDepth, SubsetBlock, SubsetDepth, own_stochastic_depth
from vmf_pretrain.networks.tokens import TokenTransformer, return_tokens

TOKEN_SPREAD = 0.02  # of DINO's class token at the start
EMBEDDING = ("patch_embed", "pos_embed", "cls_token", "reg_token", "mask_token")  # what is before the first block


def build_backbone(config: Config, *, drop_path: float = 0.0, **by_method: Any) -> timm.models.VisionTransformer:
    """A vision transformer for the network input of a configuration; it returns [B, F] features without a classifier.

    Args:
        config: its ``backbone`` section, and the input's size and channels.
        drop_path: rate of stochastic depth, of the last block or of all (``backbone.drop_path_rates``).
        by_method: arguments of timm's ``VisionTransformer`` that are no settings, such as ``class_token``.

    Raises:
        PretrainError: timm does not know the name, or it is not a vision transformer of the configured shape.
    """
    chosen, fed = config.backbone, network_input(config)
    options: dict[str, Any] = {
        "embed_dim": chosen.width,
        "depth": chosen.depth,
        "num_heads": chosen.heads,
        "init_values": chosen.layer_scale,
        # as timm's own networks with registers: positions are those of patches, and the class token has its own in itself
        **({"reg_tokens": chosen.registers, "no_embed_class": True} if chosen.registers else {}),
    }
    try:
        built = timm.create_model(
            chosen.name,
            img_size=fed.size,
            patch_size=chosen.patch_size,
            in_chans=fed.channels,
            num_classes=0,
            drop_path_rate=drop_path,
            **{"dynamic_img_size": True, **by_method},
            **{name: value for name, value in options.items() if value is not None},
        )
    except (RuntimeError, TypeError, AssertionError, ValueError) as error:
        raise PretrainError(_unfit(chosen, " ".join(str(error).split()))) from None
    backbone = _fitting(built, config)
    return_tokens(backbone)
    _as_dino(backbone, chosen)
    _drop_paths(backbone, chosen, drop_path)
    if config.train.activation_checkpointing:
        for block in backbone.blocks:
            checkpoint_block(block)
    return backbone


def _fitting(backbone: Any, config: Config) -> timm.models.VisionTransformer:
    """The same, if it is a vision transformer with a token for each patch."""
    chosen = config.backbone
    if not isinstance(backbone, timm.models.VisionTransformer):
        raise PretrainError(_unfit(chosen, f"it is a {type(backbone).__name__}"))
    grid = tuple(backbone.patch_embed.grid_size)
    if grid != config.token_grid:  # a network of convolutions comes before its patches
        wanted = " x ".join(map(str, config.token_grid))
        raise PretrainError(
            _unfit(chosen, f"it makes {' x '.join(map(str, grid))} tokens of an input of {wanted} patches")
        )
    return backbone


def _as_dino(backbone: timm.models.VisionTransformer, chosen: BackboneConfig) -> None:
    """What DINO's networks have otherwise than timm's, where the configuration says so."""
    if chosen.initialisation == "dino" and backbone.cls_token is not None:
        nn.init.trunc_normal_(backbone.cls_token, 0.0, TOKEN_SPREAD)
    if chosen.resize_positions == "dino":
        if not isinstance(backbone, TokenTransformer):
            raise PretrainError(
                f"backbone.resize_positions is dino but {chosen.name} is a {type(backbone).__name__}; expected timm."
            )
        backbone.resizes_as_dino = True


def _drop_paths(backbone: timm.models.VisionTransformer, chosen: BackboneConfig, rate: float) -> None:
    """Our stochastic depth in place of timm's, of the kind and with the rates of the configuration."""
    if rate > 0 and chosen.drop_path_rates == "uniform":
        for block in backbone.blocks:
            if not hasattr(block, "drop_path1"):
                raise PretrainError(
                    f"backbone.drop_path_rates is uniform but {chosen.name} has blocks of the kind {type(block).__name__}; "
                    "expected rising."
                )
            block.drop_path1, block.drop_path2 = DropPath(rate), DropPath(rate)
    if chosen.drop_path_of == "row" or rate == 0:
        own_stochastic_depth(backbone, StochasticDepth)
        return
    own_stochastic_depth(backbone, SubsetDepth)
    for block in backbone.blocks:
        if type(block) is not Block:
            raise PretrainError(
                f"backbone.drop_path_of is subset but {chosen.name} has blocks of the kind {type(block).__name__}; "
                "expected row."
            )
        block.__class__ = SubsetBlock


def layers_above(module: nn.Module) -> dict[str, int]:
    """For each parameter of a vision transformer within a module, how many layers lie between it and the last norm.

    That is 1 for the last of D blocks, and D + 1 for the embedding of patches, positions and tokens.
    """
    found: dict[str, int] = {}
    for above, part in module.named_modules():
        if isinstance(part, timm.models.VisionTransformer):
            for name, _ in part.named_parameters():
                first, *rest = name.split(".")
                depth = len(part.blocks)
                count = depth - int(rest[0]) if first == "blocks" else (depth + 1 if first in EMBEDDING else 0)
                found[f"{above}.{name}" if above else name] = count
    return found


def xavier(network: nn.Module) -> None:
    """Xavier's uniform initialisation of every linear layer except the prototypes."""
    for module in network.modules():
        if isinstance(module, nn.Linear) and not hasattr(module, "prototypes"):
            nn.init.xavier_uniform_(module.weight)


def _unfit(chosen: BackboneConfig, reason: str) -> str:
    said = reason.rstrip(".") or "timm says no more"  # of an assertion without a text
    return f"backbone.name {chosen.name} cannot be built as a vision transformer of that shape: {said}."


def heads_of(backbone: timm.models.VisionTransformer) -> int | None:
    """Attention heads of a block; None if its kind does not say."""
    block = backbone.blocks[0]
    heads = getattr(getattr(block, "attn", block), "num_heads", None)
    return None if heads is None else int(heads)
