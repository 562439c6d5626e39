"""The optimizer step of DINO, against its published formulas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.pretrain.tiny import batch_of, copied, differing, digits_config, dino_of, loop_on
from vmf_kernels import DINOHead
from vmf_pretrain.config.run import Config
from vmf_pretrain.engine.optim import (
    clip_groups,
    gradients_of,
    parameter_groups,
    set_rates,
)
from vmf_pretrain.methods.method import Place
from vmf_pretrain.methods.table import method_class
from vmf_pretrain.networks.average import update_average

pytestmark = pytest.mark.quick


def network(*, norm_prototypes: bool = False) -> nn.Module:
    """A backbone with every kind of parameter, and a head with batch normalisation."""
    module = nn.Module()
    module.backbone = nn.Sequential(nn.Conv2d(1, 4, 2), nn.LayerNorm(4), nn.Linear(4, 6))
    module.register_parameter("cls_token", nn.Parameter(torch.randn(1, 1, 6)))
    module.head = DINOHead(6, 10, use_bn=True, norm_last_layer=norm_prototypes, hidden_dim=8, bottleneck_dim=5)
    return module


def names_of(module: nn.Module, group: dict[str, object]) -> set[str]:
    names = {parameter: name for name, parameter in module.named_parameters()}
    assert isinstance(group["params"], list)
    return {names[parameter] for parameter in group["params"]}


def published_clip(gradients: list[Tensor], clip: float) -> list[Tensor]:
    """DINO's ``clip_gradients``."""
    clipped = []
    for gradient in gradients:
        coefficient = clip / (gradient.norm(2) + 1e-6)
        clipped.append(gradient * coefficient if coefficient < 1 else gradient.clone())
    return clipped


def test_every_trained_parameter_is_in_one_group() -> None:
    module = network(norm_prototypes=True)
    decayed, plain = (names_of(module, group) for group in parameter_groups(module))
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert not decayed & plain
    assert decayed | plain == trained, f"left out or added: {(decayed | plain) ^ trained}"
    assert "head.last_layer.weight_g" not in trained


def test_biases_and_vectors_are_not_decayed_and_all_else_is() -> None:
    module = network()
    decayed, plain = (names_of(module, group) for group in parameter_groups(module))
    expected = {name for name, value in module.named_parameters() if name.endswith(".bias") or value.ndim == 1}
    assert plain == expected, f"differs in {plain ^ expected}"
    assert {"head.last_layer.weight_g", "head.last_layer.weight_v", "cls_token", "backbone.0.weight"} <= decayed


def test_step_without_gradient_shrinks_what_is_decayed_and_nothing_else() -> None:
    module = network()
    optimizer = torch.optim.AdamW(parameter_groups(module), lr=1.0)
    set_rates(optimizer, learning_rate=0.5, weight_decay=0.2)
    before = {name: value.detach().clone() for name, value in module.named_parameters()}
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    decayed = names_of(module, parameter_groups(module)[0])
    for name, value in module.named_parameters():
        expected = before[name] * (0.9 if name in decayed else 1.0)
        assert torch.allclose(value, expected, rtol=1e-6), f"{name} changed by another factor"


@pytest.mark.parametrize("clip", [0.01, 0.5, 3.0, 1e9])
def test_clipping_equals_the_published_formula_for_each_gradient(clip: float) -> None:
    gradients = [torch.randn(3, 4), 100 * torch.randn(7), torch.zeros(5), 1e-4 * torch.randn(2, 2, 2)]
    total = torch.cat([gradient.flatten() for gradient in gradients]).norm()
    expected = published_clip(gradients, clip)
    returned = clip_groups([[gradient] for gradient in gradients], clip)
    errors = [(got - wanted).abs().max().item() for got, wanted in zip(gradients, expected, strict=True)]
    assert max(errors) <= 1e-6 * max(1.0, min(clip, 100)), f"off by {errors}"
    assert abs(returned / total - 1) < 1e-6, f"norm {returned:.6f} before clipping, expected {total:.6f}"


def test_clip_of_zero_leaves_gradients_as_they_are() -> None:
    gradients = [100 * torch.randn(7)]
    before = gradients[0].clone()
    norm = clip_groups([gradients], 0)
    assert torch.equal(gradients[0], before)
    assert abs(norm / before.norm() - 1) < 1e-6


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("clip", [0.0, 3.0])
def test_norm_tells_of_a_gradient_that_is_not_finite(broken: float, clip: float) -> None:
    gradients = [torch.randn(3), torch.tensor([1.0, broken])]
    norm = clip_groups([[gradient] for gradient in gradients], clip)
    assert not norm.isfinite(), f"norm {norm}"


def test_only_present_gradients_are_collected() -> None:
    module = nn.Linear(3, 2)
    assert gradients_of(module) == []
    module.bias.grad = torch.ones(2)
    assert [[gradient.shape for gradient in group] for group in gradients_of(module)] == [[(2,)]]


@pytest.mark.parametrize("clip", [0.05, 1e9])
def test_clipping_of_modules_is_torchs_own_of_each(clip: float) -> None:
    """As DINOv2 clips backbone and heads, each by itself."""
    modules = [nn.ModuleDict({"backbone": nn.Linear(3, 2), "head": nn.Sequential(nn.Linear(2, 2))}) for _ in range(2)]
    trained = nn.ModuleDict({"student": modules[0]})
    modules[1].load_state_dict(modules[0].state_dict())
    for ours, theirs in zip(modules[0].parameters(), modules[1].parameters(), strict=True):
        ours.grad = torch.randn_like(ours)
        theirs.grad = ours.grad.clone()
    groups = gradients_of(trained, "module")
    assert [len(group) for group in groups] == [2, 2], "backbone and head"
    clip_groups(groups, clip)
    for part in modules[1].values():
        nn.utils.clip_grad_norm_(part.parameters(), clip)
    pairs = zip(modules[0].parameters(), modules[1].parameters(), strict=True)
    error = max((ours.grad - theirs.grad).abs().max().item() for ours, theirs in pairs)  # type: ignore[operator]
    assert error < 1e-7, f"off by {error:.1e}"


DEPTH = 3
# part of a name: factors on the learning rate that DINOv2's rule gives with 0.9 a layer and 0.2 for the patch embedding
PUBLISHED_RATES = {
    "student.backbone.patch_embed.proj.weight": 0.2 * 0.9**4,
    "student.backbone.patch_embed.proj.bias": 0.2 * 0.9**4,
    "student.backbone.pos_embed": 0.9**4,
    "student.backbone.cls_token": 0.9**4,
    "student.backbone.reg_token": 0.9**4,
    "student.backbone.mask_token": 0.9**4,
    "student.backbone.blocks.0.attn.qkv.weight": 0.9**3,
    "student.backbone.blocks.1.norm2.bias": 0.9**2,
    "student.backbone.blocks.2.mlp.fc2.weight": 0.9,
    "student.backbone.norm.weight": 1.0,
    "student.head.mlp.0.weight": 1.0,
    "student.head.last_layer.weight_v": 1.0,
}
DINOV2 = {"layer_decay": 0.9, "patch_embed_rate": 0.2, "freeze_last_layer_by": "rate", "freeze_last_layer_epochs": 1}


def dinov2_config() -> Config:
    return digits_config(
        method="dinov2",
        backbone={"depth": DEPTH, "registers": 1},
        loss={"koleo_weight": 0.0},
        optim={**DINOV2, "warmup_epochs": 0},
        data={"batch_size": 32},
    )


def test_rates_of_layers_are_the_published_ones() -> None:
    method = method_class(dinov2_config())(dinov2_config(), Place(0, 5, 2))
    groups = parameter_groups(method, layer_decay=0.9, patch_embed_rate=0.2, last_layer_apart=True)
    names = {parameter: name for name, parameter in method.named_parameters()}
    rates = {names[one]: group["rate"] for group in groups for one in group["params"]}  # type: ignore[attr-defined]
    assert rates.keys() == {name for name, one in method.named_parameters() if one.requires_grad}
    assert {name: rates[name] for name in PUBLISHED_RATES} == pytest.approx(PUBLISHED_RATES)
    apart = {names[one] for group in groups if group["last_layer"] for one in group["params"]}  # type: ignore[attr-defined]
    assert apart == {"student.head.last_layer.weight_g", "student.head.last_layer.weight_v"}


def test_last_layer_at_a_rate_of_0_rests_and_its_moments_go_on() -> None:
    training, batches = loop_on(dinov2_config(), 64)
    last_layer = dino_of(training).student.head.last_layer
    before, elsewhere = copied(last_layer.state_dict()), copied(dino_of(training).student.backbone.state_dict())
    for step in range(batches.steps_per_epoch):
        training.step(step, batch_of(batches, step))
    assert differing(copied(last_layer.state_dict()), before) == []
    assert differing(copied(dino_of(training).student.backbone.state_dict()), elsewhere), "nothing was trained"
    moments = training.optimizer.state[last_layer.weight_v]
    assert moments["step"] == batches.steps_per_epoch
    assert moments["exp_avg"].abs().max() > 0
    step = batches.steps_per_epoch
    training.step(step, batch_of(batches, step))
    assert set(differing(copied(last_layer.state_dict()), before)) == set(before), "they never moved"


@pytest.mark.parametrize("momentum", [0.0, 0.9, 1.0])
def test_average_of_a_resting_student_follows_its_closed_form(momentum: float) -> None:
    start, goal = [torch.randn(4, 3), torch.randn(2)], [torch.randn(4, 3), torch.randn(2)]
    average = [value.clone() for value in start]
    for _ in range(6):
        update_average(average, goal, 1.0 - momentum)
    share = momentum**6
    expected = [share * one + (1 - share) * other for one, other in zip(start, goal, strict=True)]
    error = max((got - wanted).abs().max().item() for got, wanted in zip(average, expected, strict=True))
    assert error <= 1e-6, f"off by {error:.1e}"
