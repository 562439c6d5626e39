"""The network of a published file of weights, told from the names and shapes of its tensors."""

import math
from collections.abc import Mapping
from typing import Any

import timm
from torch import Tensor, nn

from vmf_pretrain.networks.published_names import UnfitWeightsError
from vmf_pretrain.networks.tokens import TokenTransformer, return_tokens

# timm's networks of the widths that are published: the number of heads is in no tensor's shape
WIDTHS = {
    192: "vit_tiny_patch16_224",
    384: "vit_small_patch16_224",
    768: "vit_base_patch16_224",
    1024: "vit_large_patch16_224",
    1280: "vit_huge_patch14_224",
    1408: "vit_giant_patch14_224",
    1536: "vit_giant_patch14_dinov2",
}
COLOURS = 3
NEEDED = ("patch_embed.proj.weight", "pos_embed")


def published_network(tensors: Mapping[str, Tensor]) -> tuple[TokenTransformer, str]:
    """A vision transformer without a classifier that has a place for the tensors, not filled yet, and timm's name of its kind.

    Its feature is the class token, or the mean of the patches where there is none. Positions for images of another size are
    resized as the sources do it.

    Args:
        tensors: of a backbone, by our names.

    Raises:
        UnfitWeightsError: it is no network of colour images, or of a width that is not published.
    """
    width, patch, side = _sides(tensors)
    classed = "cls_token" in tensors
    network = timm.create_model(
        WIDTHS[width],
        img_size=side * patch,
        patch_size=patch,
        num_classes=0,
        class_token=classed,
        global_pool="token" if classed else "avg",
        fc_norm=False,
        dynamic_img_size=True,
        **_parts(tensors),
    )
    return _resizing(network), WIDTHS[width]


def _sides(tensors: Mapping[str, Tensor]) -> tuple[int, int, int]:
    """Width, side of a patch in pixels, and side of the grid of positions in patches."""
    missing = [name for name in NEEDED if name not in tensors]
    if missing:
        raise UnfitWeightsError(f"it lacks {' and '.join(missing)}")
    width, channels, *kernel = tensors["patch_embed.proj.weight"].shape
    if len(kernel) != 2 or kernel[0] != kernel[1]:
        raise UnfitWeightsError(f"its patches are of {' x '.join(map(str, kernel))}; expected squares of images")
    if channels != COLOURS:
        raise UnfitWeightsError(f"its images have {channels} channel(s); expected {COLOURS}, whose scale is known")
    if width not in WIDTHS:
        known = ", ".join(map(str, WIDTHS))
        raise UnfitWeightsError(f"its width is {width}, but the number of heads is known of {known} alone")
    patches = tensors["pos_embed"].shape[1] - ("cls_token" in tensors)
    side = math.isqrt(patches)
    if side**2 != patches:
        raise UnfitWeightsError(f"its {patches} positions of patches form no square")
    return width, kernel[0], side


def _parts(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of timm's networks by which tokens and blocks there are, and what is in them."""
    registers = {"reg_tokens": tensors["reg_token"].shape[1], "no_embed_class": True} if "reg_token" in tensors else {}
    return {
        **registers,
        "depth": len({name.split(".")[1] for name in tensors if name.startswith("blocks.")}),
        "qkv_bias": "blocks.0.attn.qkv.bias" in tensors,
        "init_values": 1.0 if "blocks.0.ls1.gamma" in tensors else None,  # a value that the weights replace
    }


def _resizing(network: nn.Module) -> TokenTransformer:
    assert isinstance(network, timm.models.VisionTransformer)
    return_tokens(network)
    assert isinstance(network, TokenTransformer)
    network.resizes_as_dino = True
    return network
