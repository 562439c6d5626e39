"""The attention of the class token: attention maps of the last block.

Legend: N images, T tokens, P prefix tokens (the class token first), h x w patches.
"""

from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.evaluation.features import device_of, evaluating
from vmf_pretrain.evaluation.outputs import require_inputs


@torch.no_grad()
def attention_maps(backbone: nn.Module, images: Tensor) -> Tensor:
    """Attention of the class token to every patch in the last block, after the softmax over all tokens.

    Args:
        backbone: a timm ``VisionTransformer`` with a class token; its mode is restored.
        images: [N, C, H, W], any size the backbone takes; moved to the backbone's device.

    Returns:
        [N, heads, h, w] float32 on the CPU; a map sums to 1 minus the attention to the prefix tokens.

    Raises:
        PretrainError: the backbone has no class token, its last block has no plain attention, or its patches do not divide the
            images.
    """
    vit: Any = backbone
    attention: Any = getattr(vit.blocks[-1], "attn", None) if isinstance(vit, VisionTransformer) else None
    # by name: the class has moved between timm's modules, and similar classes with other arithmetic have other names
    if type(attention).__name__ != "Attention" or not vit.has_class_token:
        raise PretrainError(
            "Attention maps need a timm VisionTransformer with a class token and plain attention, "
            f"which this {type(backbone).__name__} is not."
        )
    require_inputs(backbone, tuple(images.shape))
    found: list[Tensor] = []

    def look(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        # here, as a block that is shared out over ranks has its weights together only while it runs
        found.append(_class_attention(attention, arguments[0]))

    hook = attention.register_forward_pre_hook(look)
    try:
        with evaluating(backbone):
            backbone(images.to(device_of(backbone), next(backbone.parameters()).dtype))
    finally:
        hook.remove()
    height, width = vit.patch_embed.dynamic_feat_size((images.shape[-2], images.shape[-1]))
    (weights_NHT,) = found
    patches_NHT = weights_NHT[:, :, vit.num_prefix_tokens :]
    return patches_NHT.reshape(*patches_NHT.shape[:2], height, width).float().cpu()


def _class_attention(attention: Any, tokens: Tensor) -> Tensor:
    """[N, heads, T] attention weights of the first token for the block's input [N, T, width]."""
    rows, count, _ = tokens.shape
    qkv = attention.qkv(tokens).reshape(rows, count, 3, attention.num_heads, -1)
    query, key, _ = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    scores: Tensor = attention.q_norm(query[:, :, :1]) * attention.scale @ attention.k_norm(key).transpose(-2, -1)
    return scores.squeeze(2).softmax(dim=-1)
