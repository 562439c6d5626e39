"""Masked views, patch tokens and stochastic depth of a subset."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.pretrain.tiny import digits_config, one_sentence
from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.methods.method import Place
from vmf_pretrain.methods.table import method_class
from vmf_pretrain.networks import ranks
from vmf_pretrain.networks.backbone import build_backbone
from vmf_pretrain.networks.stochastic_depth import SubsetDepth, depths_of, draw_depths
from vmf_pretrain.networks.tokens import Hidden, TokenTransformer

pytestmark = pytest.mark.quick

WHOLE = torch.randn(4, 1, 16, 16, generator=torch.Generator().manual_seed(0))
HALF = torch.eye(4, dtype=torch.bool).expand(4, 4, 4)
UNIFORM = {"drop_path": 0.3, "drop_path_rates": "uniform", "drop_path_of": "subset", "depth": 2, "patch_size": 4}


def backbone_of(**backbone: Any) -> TokenTransformer:
    torch.manual_seed(0)
    config = digits_config(backbone={"patch_size": 4, "depth": 2, **backbone})
    built = build_backbone(config, drop_path=config.backbone.drop_path)
    assert isinstance(built, TokenTransformer)
    return built.double()


@pytest.mark.parametrize("registers", [0, 3])
def test_hidden_patches_are_replaced_before_their_position_and_all_patches_are_returned(registers: int) -> None:
    backbone = backbone_of(registers=registers).eval()
    backbone.learn_to_hide()
    token = torch.randn(1, 16).double()
    backbone.mask_token = nn.Parameter(token)
    views = WHOLE.double()
    seen = backbone(views, hidden=Hidden())
    assert torch.equal(seen[:, 0], backbone(views))
    assert seen.shape == (4, 1 + 16, 16), "registers are not returned"
    patches = nn.functional.conv2d(views, backbone.patch_embed.proj.weight, backbone.patch_embed.proj.bias, stride=4)
    patches = patches.flatten(2).transpose(1, 2)
    patches[HALF.flatten(1)] = token
    assert backbone.cls_token is not None
    assert backbone.pos_embed is not None
    first = [backbone.cls_token.expand(4, -1, -1)]
    if registers:  # positions are those of patches
        assert backbone.reg_token is not None
        tokens = torch.cat([*first, backbone.reg_token.expand(4, -1, -1), patches + backbone.pos_embed], dim=1)
    else:
        tokens = torch.cat([*first, patches], dim=1) + backbone.pos_embed
    tokens = backbone.norm(backbone.blocks(tokens))
    expected = torch.cat([tokens[:, :1], tokens[:, 1 + registers :]], dim=1)
    error = (backbone(views, hidden=Hidden(HALF)) - expected).abs().max().item()
    assert error < 1e-12, f"off by {error:.1e}"


def published_subset(x: Tensor, branch: Any, rate: float) -> Tensor:
    """A residual branch for a random subset of the rows, scaled (facebookresearch/dinov2, layers/block.py)."""
    size = max(int(len(x) * (1 - rate)), 1)
    chosen = torch.randperm(len(x))[:size]
    return x.index_add(0, chosen, branch(x[chosen]), alpha=len(x) / size)


def test_subset_of_the_rows_is_computed_and_scaled_as_published() -> None:
    backbone = backbone_of(**UNIFORM, layer_scale=0.1)
    rows: list[int] = []
    for block in backbone.blocks:
        block.get_submodule("attn").register_forward_hook(lambda _module, _inputs, output: rows.append(len(output)))
    tokens = torch.randn(11, 5, 16).double()
    torch.manual_seed(1)
    found = backbone.blocks(tokens)
    torch.manual_seed(1)
    expected = tokens
    for block in backbone.blocks:
        expected = published_subset(expected, lambda x, block=block: block.ls1(block.attn(block.norm1(x))), 0.3)
        expected = published_subset(expected, lambda x, block=block: block.ls2(block.mlp(block.norm2(x))), 0.3)
    assert rows[:2] == [7, 7], "rows that are dropped are computed"
    assert (found - expected).abs().max() < 1e-12
    assert (found - tokens).abs().max() > 1e-3


def test_ranks_divide_one_subset_among_them(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = backbone_of(**UNIFORM)
    depths = depths_of(backbone)
    assert [type(depth) for depth in depths] == [SubsetDepth] * 4
    torch.manual_seed(2)
    whole = draw_depths(depths, torch.zeros(2 * 8, 1), images=8)
    halves = []
    for rank in (0, 1):
        monkeypatch.setattr(ranks, "count", lambda: 2)
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        torch.manual_seed(2)
        halves.append(draw_depths(depths, torch.zeros(2 * 4, 1), images=4))
    for together, one, other in zip(whole, *halves, strict=True):
        joined = torch.cat([one.view(2, 4), other.view(2, 4)], dim=1).flatten()
        assert torch.equal(joined, together)
        assert (together > 0).sum() == int(16 * 0.7)


def test_rows_of_which_none_is_kept_still_have_a_gradient() -> None:
    """Otherwise a rank of DDP would wait for a gradient that does not come."""
    backbone = backbone_of(**UNIFORM)
    for depth in depths_of(backbone):
        depth.kept = torch.zeros(4).double()
    backbone(WHOLE.double(), hidden=Hidden()).sum().backward()
    lacking = [name for name, value in backbone.named_parameters() if value.grad is None]
    assert not lacking, f"{lacking} have no gradient"


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another kind of backbone": (
        {"backbone": {"name": "deit_tiny_distilled_patch16_224", "width": None, "heads": None}},
        "patches cannot be hidden",
    ),
    "blocks of another kind": (
        {
            "backbone": {
                "name": "vit_small_patch16_18x2_224",
                "depth": 1,
                **{k: UNIFORM[k] for k in ("drop_path", "drop_path_of")},
            }
        },
        "has blocks of the kind",
    ),
    "a part of a shared head": ({"head": {"patch_prototypes": 8}}, "head.patch_prototypes is given"),
    "Sinkhorn-Knopp of dino": ({"method": "dino", "loss": {"centering": "sinkhorn_knopp"}}, "keeps a centre"),
    "norms of a linear layer": ({"head": {"last_layer": "linear", "norm_prototypes": True}}, "no norms to keep"),
    "spreads that do not fit": ({"masks": {"spreads": (0.1,)}}, "must be as many"),
    "masks after the run": ({"masks": {"start_epoch": 2}}, "come to 3"),
}


def built(sections: dict[str, Any]) -> None:
    config = digits_config(**sections)
    method_class(config)(config, Place(0, 5, config.train.epochs))


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_does_not_fit_is_refused_in_one_sentence(case: str) -> None:
    sections, part = REFUSED[case]
    with pytest.raises(PretrainError, match=part) as caught:
        built({"method": "ibot", **sections})
    assert one_sentence(str(caught.value)), caught.value
