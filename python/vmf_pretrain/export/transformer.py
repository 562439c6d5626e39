"""What a vision transformer of timm consists of, so that another library's can be built like it.

Legend: S side of the input in pixels, p side of a patch, N patches, P prefix tokens, F features.
"""

from dataclasses import dataclass
from typing import Any

from timm.layers.layer_scale import LayerScale
from timm.layers.mlp import Mlp
from timm.layers.patch_embed import PatchEmbed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from vmf_pretrain.config.errors import PretrainError

ANY = "--to safetensors takes any network."  # end of an error


@dataclass(frozen=True)
class Shape:
    """Sizes and parts of a vision transformer.

    Attributes:
        name: under which timm has it.
        size: S.
        patch: p.
        channels: of the input.
        width: F.
        depth: number of blocks.
        heads: attention heads of a block.
        hidden: width of the hidden layer of a block.
        epsilon: that layer normalisation adds to the variance.
        class_token: whether there is one.
        registers: tokens beside it.
        class_position: whether the prefix tokens have positions of their own in ``pos_embed``.
        qkv_bias: whether queries, keys and values have biases.
        layer_scale: whether each branch of a block has a scale.
        pool: what makes the feature of all tokens: "token" takes the class token, "avg" the mean of the patches.
    """

    name: str
    size: int
    patch: int
    channels: int
    width: int
    depth: int
    heads: int
    hidden: int
    epsilon: float
    class_token: bool
    registers: int
    class_position: bool
    qkv_bias: bool
    layer_scale: bool
    pool: str

    @property
    def prefix(self) -> int:
        """P."""
        return int(self.class_token) + self.registers


def shape_of(network: nn.Module, form: str) -> Shape:
    """The shape of a vision transformer of images.

    Args:
        network: the one that is exported.
        form: to which it is exported, for the error.

    Raises:
        PretrainError: it is something else.
    """
    embedding: Any = getattr(network, "patch_embed", None)
    if not isinstance(network, VisionTransformer) or not isinstance(embedding, PatchEmbed):
        raise PretrainError(_unfit(network, form, "is no vision transformer of images"))
    vit: Any = network
    first = vit.blocks[0]
    (height, width), (rows, columns) = embedding.img_size, embedding.patch_size
    if height != width or rows != columns:
        raise PretrainError(_unfit(network, form, "has an input or patches that are not square"))
    if vit.global_pool not in ("token", "avg") or vit.pool_include_prefix:
        raise PretrainError(_unfit(network, form, "takes neither the class token nor the mean of the patches"))
    if not all(hasattr(first, part) for part in ("attn", "mlp", "ls1")) or not isinstance(vit.norm, nn.LayerNorm):
        kinds = f"has blocks of the kind {type(first).__name__} and a {type(vit.norm).__name__} as norm"
        raise PretrainError(_unfit(network, form, kinds))
    return Shape(
        name=str(vit.pretrained_cfg["architecture"]),
        size=height,
        patch=rows,
        channels=embedding.proj.in_channels,
        width=vit.embed_dim,
        depth=len(vit.blocks),
        heads=first.attn.num_heads,
        hidden=first.mlp.fc2.in_features,
        epsilon=vit.norm.eps,
        class_token=vit.has_class_token,
        registers=vit.num_reg_tokens,
        class_position=vit.pos_embed.shape[1] > embedding.num_patches,
        qkv_bias=first.attn.qkv.bias is not None,
        layer_scale=isinstance(first.ls1, LayerScale),
        pool=vit.global_pool,
    )


def plain_shape(network: nn.Module, form: str) -> Shape:
    """The same of a transformer that has no part beside those of the published ViT, layer scale and registers.

    Raises:
        PretrainError: a part is of another kind: the names of its tensors may be the same, its features are not.
    """
    shape, vit = shape_of(network, form), _typed(network)
    expected: list[tuple[str, nn.Module, type[nn.Module]]] = [
        ("patch_embed.norm", vit.patch_embed.norm, nn.Identity),
        ("norm_pre", vit.norm_pre, nn.Identity),
        ("norm", vit.norm, nn.LayerNorm),
        ("fc_norm", vit.fc_norm, nn.Identity),
        ("head", vit.head, nn.Identity),
    ]
    for place, block in enumerate(vit.blocks):
        scale = LayerScale if shape.layer_scale else nn.Identity
        parts: list[tuple[str, type[nn.Module]]] = [
            *((name, nn.LayerNorm) for name in ("norm1", "norm2")),
            *((name, scale) for name in ("ls1", "ls2")),
            *((name, nn.Identity) for name in ("attn.q_norm", "attn.k_norm", "attn.norm", "mlp.norm")),
            ("mlp", Mlp),
            ("mlp.act", nn.GELU),
        ]
        expected.append((f"blocks.{place}", block, Block))
        expected += [(f"blocks.{place}.{name}", block.get_submodule(name), kind) for name, kind in parts]
    for name, part, kind in expected:
        if not isinstance(part, kind):
            raise PretrainError(_unfit(network, form, f"has a {type(part).__name__} as {name}"))
    kinds = {
        type(block.attn).__name__ for block in vit.blocks
    }  # similar classes with other arithmetic have other names
    if kinds != {"Attention"}:
        raise PretrainError(_unfit(network, form, f"has attention of the kinds {', '.join(sorted(kinds))}"))
    return shape


def require_fitting(condition: bool, form: str, reason: str) -> None:
    """Raise PretrainError with the reason unless the condition holds."""
    if not condition:
        raise PretrainError(f"this network has no {form} form: {reason}; {ANY}")


def _typed(network: nn.Module) -> Any:
    return network


def _unfit(network: nn.Module, form: str, reason: str) -> str:
    return f"this {type(network).__name__} {reason}, which the {form} form cannot express; {ANY}"
