"""What the class token looks at: attention maps of the last block.

Legend: N images, T tokens, P prefix tokens (the class token first), h x w patches.
"""

import torch
from torch import Tensor, nn

import vmf_pretrain.torchvision_import  # noqa: F401 -- before timm, which imports torchvision
from timm.models.vision_transformer import Attention, VisionTransformer  # isort: skip
from vmf_pretrain.errors import PretrainError
from vmf_pretrain.evaluate import device_of, evaluating


@torch.no_grad()
def attention_maps(backbone: nn.Module, images: Tensor) -> Tensor:
    """Attention of the class token to every patch in the last block, after the softmax over all tokens.

    Args:
        backbone: a timm ``VisionTransformer`` with a class token; left in the mode it had.
        images: [N, C, H, W], any size the backbone takes; moved to the backbone's device.

    Returns:
        [N, heads, h, w] float32 on the CPU; a map sums to 1 minus what goes to the prefix tokens.

    Raises:
        PretrainError: the backbone has no class token or no such block.
    """
    blocks = getattr(backbone, "blocks", None)
    attention = getattr(blocks[-1], "attn", None) if blocks else None
    if (
        not isinstance(backbone, VisionTransformer)
        or not isinstance(attention, Attention)
        or not backbone.has_class_token
    ):
        raise PretrainError(
            f"Attention maps need a timm VisionTransformer with a class token but the backbone is a {type(backbone).__name__}."
        )
    inputs: list[Tensor] = []
    hook = attention.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    try:
        with evaluating(backbone):
            backbone(images.to(device_of(backbone)))
            weights_NHT = _class_attention(attention, inputs[0])
    finally:
        hook.remove()
    height, width = backbone.patch_embed.dynamic_feat_size((images.shape[-2], images.shape[-1]))
    patches_NHhw = weights_NHT[:, :, backbone.num_prefix_tokens :].unflatten(2, (height, width))
    return patches_NHhw.float().cpu()


def _class_attention(attention: Attention, tokens: Tensor) -> Tensor:
    """[N, heads, T] attention weights of the first token for the block's input [N, T, width]."""
    qkv = attention.qkv(tokens).unflatten(2, (3, attention.num_heads, -1))
    query, key, _ = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    scores_NHT = attention.q_norm(query[:, :, :1]) * attention.scale @ attention.k_norm(key).transpose(-2, -1)
    return scores_NHT.squeeze(2).softmax(dim=-1)
