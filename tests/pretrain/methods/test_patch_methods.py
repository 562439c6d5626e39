"""iBOT, iBOT-vMF and DINOv2 step by step as published: losses, the gradient of every parameter, teacher and centres.

The formulas are written on stored logits in fp64 (tests/fuzz/statements/ibot.py, dinov2.py), and every patch goes
through the heads, masked or not.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tests.fuzz.statements.dinov2 import PublishedKoLeoLoss, PublishedPatchLoss, PublishedV2Loss
from tests.fuzz.statements.ibot import PublishedIBOTLoss, PublishedIBOTvMFLoss
from tests.fuzz.statements.sinkhorn import published_sinkhorn_knopp
from tests.pretrain.tiny import batch_of, digits_config, loop_on
from vmf_pretrain.config.run import Config
from vmf_pretrain.data.batch import Batch

IMAGES, EPOCHS, STEPS = 12, 4, 3
OWN = {"patches": "own_head", "patch_prototypes": 20, "patch_bottleneck_dim": 8, "patch_hidden_dim": 24}
SINKHORN = {"centering": "sinkhorn_knopp"}
CASES: dict[str, dict[str, Any]] = {
    "ibot": {"method": "ibot", "head": {"norm_prototypes": False}},
    "ibot, own prototypes": {
        "method": "ibot",
        "head": {"patches": "own_prototypes", "patch_prototypes": 20},
        "loss": {"class_weight": 0.5, "patch_weight": 2.0, "patch_center_momentum": 0.5},
        "views": {"local_count": 0},
    },
    "ibot-vmf": {"method": "ibot-vmf", "head": {"patches": "own_prototypes", "patch_prototypes": 20}},
    "dinov2": {"method": "dinov2", "backbone": {"registers": 2, "layer_scale": 0.1}},
    "dinov2, Sinkhorn-Knopp": {"method": "dinov2", "head": OWN, "loss": SINKHORN, "views": {"local_count": 2}},
    "dinov2, no local view": {"method": "dinov2", "head": OWN, "loss": SINKHORN, "views": {"local_count": 0}},
    "dinov2, linear last layer": {"method": "dinov2", "head": {**OWN, "last_layer": "linear"}, "loss": SINKHORN},
}


def config_of(case: str) -> Config:
    chosen = CASES[case]
    return digits_config(
        method=chosen["method"],
        data={"batch_size": IMAGES},
        views={"local_count": 1, **chosen.get("views", {})},
        backbone={"patch_size": 4, "depth": 2, "drop_path": 0.0, **chosen.get("backbone", {})},
        head={"batch_norm": False, **chosen.get("head", {})},
        loss={
            "warmup_teacher_temp": 0.04,
            "teacher_temp": 0.07,
            "warmup_teacher_temp_epochs": 3,
            "warmup_patch_teacher_temp": 0.05,
            "patch_teacher_temp": 0.08,
            "center_start": "zero",
            "koleo_weight": 0.1,
            **chosen.get("loss", {}),
        },
        optim={"clip": 0.0, "freeze_last_layer_epochs": 0, "warmup_epochs": 0, "teacher_momentum": 0.9},
        train={"epochs": EPOCHS, "precision": "fp64"},
    )


def all_tokens(backbone: Any, views: Tensor, mask: Tensor | None, token: Tensor | None) -> tuple[Tensor, Tensor]:
    """Class tokens [C, F] and patches [C, N, F] after the last norm, with masked patches replaced."""
    patches = functional.conv2d(views, backbone.patch_embed.proj.weight, backbone.patch_embed.proj.bias, stride=4)
    patches = patches.flatten(2).transpose(1, 2)
    if mask is not None and token is not None:
        hidden = mask.flatten(1).to(patches.dtype)[..., None]
        patches = patches * (1 - hidden) + token * hidden
    first = backbone.cls_token.expand(len(views), -1, -1)
    if backbone.reg_token is None:
        tokens = torch.cat([first, patches], dim=1) + backbone.pos_embed
    else:
        registers = backbone.reg_token.expand(len(views), -1, -1)
        tokens = torch.cat([first, registers, patches + backbone.pos_embed], dim=1)
    tokens = backbone.norm(backbone.blocks(tokens))
    return tokens[:, 0], tokens[:, -patches.shape[1] :]


def weight_of(layer: Any) -> Tensor:
    """[K, D] prototypes."""
    if "weight_g" not in dict(layer.named_parameters()):
        plain: Tensor = layer.get_parameter("weight")
        return plain
    v = layer.weight_v
    return layer.weight_g * v / v.norm(dim=1, keepdim=True)  # type: ignore[no-any-return]


def stored(head: Any, layer: Any, rows: Tensor) -> Tensor:
    """[..., K] logits."""
    return functional.normalize(head.mlp(rows), dim=-1) @ weight_of(layer).T


class Published:
    """The published step: networks of the same parameters, losses on stored logits."""

    def __init__(self, method: Any, config: Config) -> None:
        self.config = config
        self.student, self.teacher = copy.deepcopy(method.student), copy.deepcopy(method.teacher)
        self.views = config.view_count
        loss, sizes = config.loss, (config.head.prototypes, config.patch_prototypes)
        self.koleo = PublishedKoLeoLoss()
        self.class_loss, self.patch_loss = PublishedV2Loss(sizes[0]).double(), PublishedPatchLoss(sizes[1]).double()
        kind = PublishedIBOTvMFLoss if config.method == "ibot-vmf" else PublishedIBOTLoss
        self.ibot = kind(
            *sizes,
            2,
            config.views.local_count,
            *(loss.warmup_teacher_temp, loss.teacher_temp, loss.warmup_patch_teacher_temp, loss.patch_teacher_temp),
            *(loss.warmup_teacher_temp_epochs, EPOCHS),
            center_momentum2=loss.patch_center_momentum,
            lambda1=loss.class_weight,
            lambda2=loss.patch_weight,
        ).double()

    def layers(self, network: Any) -> tuple[Any, Any, Any, Any]:
        """Head and last layer of class tokens, and of patches."""
        head = network.head
        if network.patch_head is not None:
            return head, head.last_layer, network.patch_head, network.patch_head.last_layer
        return head, head.last_layer, head, head.last_layer if head.last_layer2 is None else head.last_layer2

    def outputs(self, network: Any, views: list[Tensor], mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Class features [V B, F], their logits, and logits [C, N, K] of all patches."""
        first, patches = all_tokens(network.backbone, torch.cat(views[:2]), mask, network.backbone.mask_token)
        features = torch.cat([first, *(network.backbone(view) for view in views[2:])])
        head, layer, patch_head, patch_layer = self.layers(network)
        return features, stored(head, layer, features), stored(patch_head, patch_layer, patches)

    def losses(self, batch: Batch, step: int, epoch: int) -> dict[str, Tensor]:
        mask = batch.masks["mask"].transpose(0, 1).flatten(0, 1)
        views = [view.double() for view in batch.views]
        with torch.no_grad():
            _, taught, taught_patches = self.outputs(self.teacher, views[:2], None)
        features, learnt, patches = self.outputs(self.student, views, mask)
        rules = self.by_ibot if self.config.method.startswith("ibot") else self.by_dinov2
        class_loss, patch_loss = rules(taught, taught_patches, learnt, patches, mask, step, epoch)
        koleo = sum(self.koleo(crop) for crop in features.chunk(self.views)[:2])
        total = class_loss + patch_loss + self.config.loss.koleo_weight * koleo
        return {"class_loss": class_loss, "patch_loss": patch_loss, "koleo": koleo, "total": total}

    def by_ibot(
        self,
        taught: Tensor,
        taught_patches: Tensor,
        learnt: Tensor,
        patches: Tensor,
        mask: Tensor,
        step: int,
        epoch: int,
    ) -> tuple[Tensor, Tensor]:
        if isinstance(self.ibot, PublishedIBOTvMFLoss):
            norms = [
                tuple(weight_of(layer).norm(dim=1) for layer in self.layers(network)[1::2])
                for network in (self.student, self.teacher)
            ]
            self.ibot.set_norms(norms[0], norms[1], self.config.head.bottleneck_dim)
        local = learnt[2 * IMAGES :] if self.views > 2 else None
        output = learnt[: 2 * IMAGES], patches
        found = self.ibot(output, (taught, taught_patches), local, list(mask.chunk(2)), epoch)
        return found["cls"], found["patch"]

    def by_dinov2(
        self,
        taught: Tensor,
        taught_patches: Tensor,
        learnt: Tensor,
        patches: Tensor,
        mask: Tensor,
        step: int,
        epoch: int,
    ) -> tuple[Tensor, Tensor]:
        """The teacher's views change places, so that each meets the student's other one; local views meet both."""
        loss, local = self.config.loss, self.views - 2
        warm_up = loss.warmup_teacher_temp_epochs * self.steps_per_epoch
        ramp = np.linspace(loss.warmup_teacher_temp, loss.teacher_temp, warm_up)
        tau = float(ramp[step]) if step < warm_up else loss.teacher_temp
        one, other = taught.chunk(2)
        crossed, hidden = torch.cat([other, one]), mask.flatten(1)
        masked = taught_patches[hidden]
        if loss.centering == "sinkhorn_knopp":
            targets, patch_targets = (published_sinkhorn_knopp(rows / tau) for rows in (crossed, masked))
        else:
            targets = self.class_loss.softmax_center_teacher(crossed, tau)
            patch_targets = self.patch_loss.softmax_center_teacher(masked[None], tau)[0]
            self.class_loss.update_center(crossed)
            self.patch_loss.update_center(masked[None])
        divisor = 2 + max(2 * local, 1)
        class_loss = 2 * self.class_loss([learnt[: 2 * IMAGES]], [targets]) / divisor
        if local:
            class_loss = class_loss + self.class_loss(learnt[2 * IMAGES :].chunk(local), targets.chunk(2)) / divisor
        return class_loss, self.patch_loss.forward_masked(patches[hidden], patch_targets, hidden)

    steps_per_epoch = 1

    @torch.no_grad()
    def follow(self, student: Any, step: int) -> None:
        momentum = 1 - (1 - 0.9) * (math.cos(math.pi * step / (EPOCHS * self.steps_per_epoch)) + 1) / 2
        trained = dict(student.named_parameters())
        for name, value in self.teacher.named_parameters():
            value.copy_(momentum * value + (1 - momentum) * trained[name])

    def centers(self) -> dict[str, Tensor]:
        """The centres after all batches."""
        if self.config.loss.centering == "sinkhorn_knopp":
            return {}
        if self.config.method.startswith("ibot"):
            return {"center": self.ibot.center, "center2": self.ibot.center2}
        for loss in (self.class_loss, self.patch_loss):  # what waits for the next batch
            loss.softmax_center_teacher(torch.zeros_like(loss.center), 1.0)
        return {"center": self.class_loss.center, "center2": self.patch_loss.center}


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / max(1.0, float(other.abs().max())))


@pytest.mark.parametrize("case", list(CASES))
def test_three_steps_are_the_published_ones(case: str) -> None:
    config = config_of(case)
    loop, batches = loop_on(config, 2 * IMAGES)
    method: Any = loop.method
    published = Published(method, config)
    published.steps_per_epoch = batches.steps_per_epoch
    for step in range(STEPS):
        published.student.load_state_dict(method.student.state_dict())
        batch = batch_of(batches, step)
        assert batch.masks["mask"].any()
        expected = published.losses(batch, step, loop.place(step).epoch)
        published.student.zero_grad()
        expected["total"].backward()
        (taken,) = loop.step(step, batch)
        for name, value in expected.items():
            error = abs(taken.numbers[name] - value.item())
            assert error < 1e-10, f"step {step}: {name} is off by {error:.1e}"
        gradients = {name: value.grad for name, value in method.student.named_parameters() if value.requires_grad}
        for name, value in published.student.named_parameters():
            if name in gradients:
                assert apart(gradients[name], value.grad) < 1e-8, f"step {step}: the gradient of {name} is another one"
        published.follow(method.student, step)
    teacher = dict(published.teacher.named_parameters())
    for name, value in method.teacher.named_parameters():
        assert apart(value, teacher[name]) < 1e-12, f"the teacher's {name} is off"
    for name, value in published.centers().items():
        found = method.loss.center if name == "center" else method.loss.center2
        assert apart(found, value) < 1e-12, f"{name} is off"


@pytest.mark.quick
def test_the_shortest_with_sinkhorn_is_of_the_inner_loop() -> None:
    test_three_steps_are_the_published_ones("dinov2, no local view")


def test_nothing_is_masked_before_the_first_epoch_of_masks() -> None:
    config = digits_config(
        method="ibot",
        data={"batch_size": IMAGES},
        backbone={"patch_size": 4},
        masks={"start_epoch": 1, "ratios": (0.5,), "spreads": (0.0,)},
        train={"epochs": 2},
        loss={"warmup_teacher_temp_epochs": 1},
    )
    loop, batches = loop_on(config, IMAGES)
    losses = [loop.step(step, batch_of(batches, step))[0].numbers["patch_loss"] for step in range(2)]
    assert losses[0] == 0
    assert losses[1] > 0
