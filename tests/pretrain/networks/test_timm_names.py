"""Any of timm's vision transformers trains, or is refused in a sentence."""

from __future__ import annotations

from typing import Any

import pytest

from tests.pretrain.methods.masked_runs import masked_config
from tests.pretrain.tiny import batch_of, changed, digits_config, loop_on, one_sentence
from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.networks.backbone import build_backbone

pytestmark = pytest.mark.quick

TOY = {"patch_size": 4, "width": 24, "depth": 1, "heads": 2}
CLASS = "Token pooling needs the class token"
HEADS = "predictor.heads is null"
# what a method's refusal says; dino, ibot and mae train where there is none
NAMES: dict[str, dict[str, str]] = {
    "vit_tiny_patch16_224": {},
    "deit3_small_patch16_224": {},  # LayerScale, no position for the class token
    "vit_small_patch14_reg4_dinov2": {},  # registers
    "vit_giant_patch14_reg4_dinov2": {},  # SwiGLU
    "vit_base_patch16_clip_224": {},  # a norm before the blocks, no bias in the patch embedding
    "vit_intern300m_patch14_448": {},
    "vit_base_patch16_224_miil": {},  # no bias in its attention
    "vit_wee_patch16_reg1_gap_256": {"mae": CLASS},  # the mean of patches
    "vit_base_patch16_siglip_224": {"mae": CLASS},  # pooled by attention
    "vit_base_patch16_rpn_224": {"mae": CLASS},  # norms after the branches
    "vit_small_patch16_18x2_224": {"ijepa": HEADS},  # parallel branches
    "test_vit4": {"mae": CLASS},
}


def one_step(method: str, name: str) -> None:
    base = masked_config(method) if method in ("mae", "ijepa") else digits_config(optim={"freeze_last_layer_epochs": 0})
    config = changed(base, method=method, data={"batch_size": 4}, backbone={"name": name, "drop_path": 0.1, **TOY})
    loop, batches = loop_on(config, 8)
    (taken,) = loop.step(0, batch_of(batches, 0))
    assert taken.counts.not_finite == 0
    trained = loop.method.trained.named_parameters()
    still = [key for key, value in trained if value.requires_grad and value.grad is None]
    assert not still, f"{still} have no gradient"


@pytest.mark.parametrize("name", list(NAMES))
def test_one_step_of_each_method_or_a_sentence(name: str) -> None:
    for method in {"dino": 0, "ibot": 0, "mae": 0, **NAMES[name]}:
        refusal = NAMES[name].get(method)
        if refusal is None:
            one_step(method, name)
            continue
        with pytest.raises(PretrainError, match=refusal) as caught:
            one_step(method, name)
        assert one_sentence(str(caught.value)), caught.value


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "convolutions before the patches": (
        {"name": "vit_tiny_r_s16_p8_224"},
        "makes 1 x 1 tokens of an input of 4 x 4 patches",
    ),
    "no vision transformer": ({"name": "vit_small_plus_patch16_dinov3"}, "it is a Eva"),
    "an assertion without a text": ({"name": "vit_base_mci_224"}, "timm says no more"),
    "uniform rates of parallel branches": (
        {"name": "vit_small_patch16_18x2_224", "drop_path_rates": "uniform"},
        "expected rising",
    ),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_cannot_be_built_is_refused_in_one_sentence(case: str) -> None:
    backbone, part = REFUSED[case]
    with pytest.raises(PretrainError, match=part) as caught:
        build_backbone(digits_config(backbone={**TOY, **backbone}), drop_path=0.1)
    assert one_sentence(str(caught.value)), caught.value
    assert ".." not in str(caught.value)


def test_sizes_that_patches_do_not_divide_are_refused() -> None:
    with pytest.raises(
        PretrainError, match=r"views.global_size is 16 but must be a multiple of backbone.patch_size, 14"
    ):
        digits_config(backbone={"name": "vit_small_patch14_dinov2", "patch_size": 14})
