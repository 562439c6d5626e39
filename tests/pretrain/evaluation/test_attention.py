"""Attention maps against the weights that timm's own unfused attention multiplies its values with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vmf_pretrain.with_torchvision  # noqa: F401 -- before timm, which imports torchvision

# isort: split
from timm.layers import Attention
from timm.models.vision_transformer import Block, VisionTransformer

from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.evaluation.attention import attention_maps

pytestmark = pytest.mark.quick

HEADS = 3
MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "registers": {"reg_tokens": 4},
    "dynamic": {"dynamic_img_size": True},
    "padded": {"dynamic_img_size": True, "dynamic_img_pad": True},
    "qk-norm": {"qk_norm": True},
    "no-embedding-of-the-class-token": {"no_embed_class": True, "reg_tokens": 2},
    "stochastic": {"drop_path_rate": 0.5, "attn_drop_rate": 0.5, "proj_drop_rate": 0.5},
}


def attention_of(block: nn.Module) -> Attention:
    """The attention of a block."""
    assert isinstance(block, Block)
    assert isinstance(block.attn, Attention)
    return block.attn


def small_vit(**options: Any) -> VisionTransformer:
    """A vision transformer for 16 x 16 images in patches of 4 with weights large enough for sharp attention."""
    vit = VisionTransformer(
        img_size=16, patch_size=4, in_chans=1, embed_dim=24, depth=2, num_heads=HEADS, num_classes=0, **options
    )
    with torch.no_grad():
        for block in vit.blocks:
            attention = attention_of(block)
            attention.qkv.weight.normal_(std=0.5)
            for norm in (attention.q_norm, attention.k_norm):
                for parameter in norm.parameters():
                    parameter.uniform_(0.5, 2.0)
    return vit


def weights_of_timm(vit: VisionTransformer, images: Tensor) -> Tensor:
    """[N, heads, T, T] what the last block's softmax gives in evaluation mode."""
    attention = attention_of(vit.eval().blocks[-1])
    attention.fused_attn = False  # type: ignore[misc]  # final for TorchScript alone
    seen: list[Tensor] = []
    hook = attention.attn_drop.register_forward_hook(lambda *call: seen.append(call[2]))
    with torch.no_grad():
        vit(images)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("name", MODELS)
def test_maps_equal_the_weights_of_timms_own_attention(name: str) -> None:
    vit, images = small_vit(**MODELS[name]), torch.randn(5, 1, 16, 16)
    maps = attention_maps(vit, images)
    weights = weights_of_timm(vit, images)
    expected = weights[:, :, 0, vit.num_prefix_tokens :].reshape(5, HEADS, 4, 4)
    assert maps.shape == expected.shape, f"shape is {tuple(maps.shape)} instead of {tuple(expected.shape)}"
    error = (maps - expected).abs().max().item()
    assert error < 1e-6, f"maps are off by {error}"
    to_prefix = weights[:, :, 0, : vit.num_prefix_tokens].sum(-1)
    off = (maps.sum((2, 3)) + to_prefix - 1).abs().max().item()
    assert off < 1e-5, f"maps and prefix tokens sum to 1 but for {off}"
    spread = (maps.amax((2, 3)) / maps.amin((2, 3))).min().item()
    assert spread > 1.5, f"attention is so flat ({spread} from least to most) that a wrong map would pass"


@pytest.mark.parametrize(
    ("name", "size", "patches"),
    [("dynamic", (8, 20), (2, 5)), ("dynamic", (32, 16), (8, 4)), ("padded", (9, 14), (3, 4))],
)
def test_rows_and_columns_of_patches_follow_the_image(
    name: str, size: tuple[int, int], patches: tuple[int, int]
) -> None:
    vit, images = small_vit(**MODELS[name]), torch.randn(2, 1, *size)
    maps = attention_maps(vit, images)
    assert tuple(maps.shape) == (2, HEADS, *patches), f"shape is {tuple(maps.shape)}"
    expected = weights_of_timm(vit, images)[:, :, 0, 1:]
    error = (maps.flatten(2) - expected).abs().max().item()
    assert error < 1e-6, f"maps are off by {error}"


def test_the_map_points_at_the_patch_that_is_looked_for() -> None:
    """The class token's key and every query are made to match one bright patch."""
    vit = small_vit()
    images = torch.zeros(1, 1, 16, 16)
    images[0, 0, 8:12, 4:8] = 1.0  # the patch in row 2, column 1
    block = vit.blocks[-1]
    assert isinstance(block, Block)
    assert vit.pos_embed is not None
    with torch.no_grad():
        vit.pos_embed.zero_()
        vit.blocks = nn.Sequential(block)
        attention = attention_of(block)
        attention.qkv.weight[:24].zero_()
        attention.qkv.bias.zero_()
        bright = block.norm1(vit.norm_pre(vit.patch_embed(images)))[0, 9]
        attention.qkv.bias[:24] = 20 * attention.qkv.weight[24:48] @ bright
    maps = attention_maps(vit, images)[0]
    found = [divmod(int(head.argmax()), 4) for head in maps]
    assert found == [(2, 1)] * HEADS, f"heads look at {found}"


def test_modes_hooks_and_random_numbers_are_as_before() -> None:
    vit = small_vit(**MODELS["stochastic"]).train()
    vit.blocks[0].eval()
    modes = [part.training for part in vit.modules()]
    images, random_state = torch.randn(2, 1, 16, 16), torch.get_rng_state()
    maps = attention_maps(vit, images)
    assert [part.training for part in vit.modules()] == modes, "a part changed its mode"
    assert torch.equal(torch.get_rng_state(), random_state), "the global generator moved"
    assert not attention_of(vit.blocks[-1])._forward_pre_hooks, "the hook is still there"
    assert not maps.requires_grad, "maps carry a graph"


def test_the_hook_goes_after_an_error() -> None:
    vit = small_vit().train()
    with pytest.raises((AssertionError, RuntimeError)):
        attention_maps(vit, torch.randn(2, 3, 16, 16))
    assert not attention_of(vit.blocks[-1])._forward_pre_hooks, "the hook is still there"
    assert vit.training, "the backbone stayed in evaluation mode"


@pytest.mark.parametrize(
    ("backbone", "name"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(4, 4)), "Sequential"),
        (small_vit(class_token=False, global_pool="avg"), "VisionTransformer"),
    ],
    ids=["no-transformer", "no-class-token"],
)
def test_a_backbone_without_such_attention_is_refused(backbone: nn.Module, name: str) -> None:
    with pytest.raises(PretrainError, match=f"with a class token.*{name} is not"):
        attention_maps(backbone, torch.randn(1, 1, 16, 16))
