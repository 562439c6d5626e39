"""Checkpoints as runs of the published codebases write them, and the drop-ins' parts that load them.

Each is made by the rules of its format: what the trainer puts into the file, and what its optimizer, schedules and wrappers
leave there.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import omegaconf
import torch
from torch import Tensor, nn

from tests.fuzz.statements.dino import PublishedDINOHead, PublishedDINOLoss
from tests.fuzz.statements.dinov2 import PublishedPatchLoss, PublishedV2Head, PublishedV2Loss
from tests.fuzz.statements.ibot import PublishedIBOTHead, PublishedIBOTLoss
from vmf_kernels.compat import dino, dinov2, ibot, lightly, solo

DIM, K, K2 = 6, 31, 23
SIZES: dict[str, Any] = {"hidden_dim": 16, "bottleneck_dim": 8}
SCHEDULE = (0.04, 0.07, 2, 5)
STATE = dict[str, Tensor]


class Parts(nn.Module):
    """A network under the names its codebase gives the parts."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


def backbone() -> nn.Module:
    return nn.Sequential(nn.Linear(5, DIM), nn.BatchNorm1d(DIM))


def moved(network: nn.Module) -> nn.Module:
    """Every number of it is another than at the start."""
    with torch.no_grad():
        for value in (*network.parameters(), *network.buffers()):
            value.copy_(1 + torch.rand(value.shape) if value.is_floating_point() else torch.tensor(7))
    return network


def trained(student: nn.Module) -> torch.optim.Optimizer:
    """After a step under the published schedules, which hand numpy's numbers to the optimizer's groups."""
    decayed = [p for p in student.parameters() if p.requires_grad and p.ndim > 1]
    others = [p for p in student.parameters() if p.requires_grad and p.ndim <= 1]
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups)
    schedule = np.concatenate(
        (np.linspace(0, 5e-4, 2), 1e-6 + 0.5 * (5e-4 - 1e-6) * (1 + np.cos(np.pi * np.arange(3) / 3)))
    )
    for number, group in enumerate(optimizer.param_groups):
        group["lr"] = schedule[1]
        if number == 0:
            group["weight_decay"] = schedule[2]
    for p in decayed + others:
        optimizer.state[p] = {
            "step": torch.tensor(1.0),
            "exp_avg": torch.rand_like(p),
            "exp_avg_sq": torch.rand_like(p),
        }
    return optimizer


def command_line() -> argparse.Namespace:
    return argparse.Namespace(arch="vit_small", out_dim=K, lr=5e-4, output_dir=Path("."), local_crops_scale=(0.05, 0.4))


def main_dino() -> dict[str, Any]:
    """facebookresearch/dino main_dino.py: the student under DDP, the teacher not."""
    student, teacher = (
        moved(Parts(backbone=backbone(), head=PublishedDINOHead(DIM, K, norm_last_layer=norm, **SIZES)))
        for norm in (False, True)
    )
    return {
        "student": {f"module.{key}": value for key, value in student.state_dict().items()},
        "teacher": teacher.state_dict(),
        "optimizer": trained(student).state_dict(),
        "epoch": 3,
        "args": command_line(),
        "dino_loss": moved(PublishedDINOLoss(K, 4, *SCHEDULE)).state_dict(),
        "fp16_scaler": torch.amp.GradScaler("cpu").state_dict(),
    }


def main_ibot() -> dict[str, Any]:
    """bytedance/ibot main_ibot.py: with BatchNorm both under DDP."""
    student, teacher = (
        moved(Parts(backbone=backbone(), head=PublishedIBOTHead(DIM, K, patch_out_dim=K2, **SIZES))) for _ in range(2)
    )
    return {
        "student": {f"module.{key}": value for key, value in student.state_dict().items()},
        "teacher": {f"module.{key}": value for key, value in teacher.state_dict().items()},
        "optimizer": trained(student).state_dict(),
        "epoch": 3,
        "args": command_line(),
        "ibot_loss": moved(PublishedIBOTLoss(K, K2, 2, 0, 0.04, 0.04, 0.04, 0.07, 2, 5)).state_dict(),
        "fp16_scaler": torch.amp.GradScaler("cpu").state_dict(),
    }


def dinov2_run() -> nn.Module:
    """facebookresearch/dinov2 SSLMetaArch: both networks and the losses are parts of one module."""
    networks = {}
    for name in ("student", "teacher"):
        heads = {f"{part}_head": PublishedV2Head(DIM, k, **SIZES) for part, k in (("dino", K), ("ibot", K2))}
        networks[name] = nn.ModuleDict({"backbone": backbone(), **heads})
    return moved(Parts(dino_loss=PublishedV2Loss(K), ibot_patch_loss=PublishedPatchLoss(K2), **networks))


def dinov2_file() -> dict[str, Any]:
    """Its checkpointer's file where FSDP does not shard."""
    run = dinov2_run()
    return {
        "model": run.state_dict(),
        "optimizer": trained(run.get_submodule("student")).state_dict(),
        "iteration": 1249,
    }


def lightning_file(state: STATE, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """lightning's Trainer.save_checkpoint, with the configuration as save_hyperparameters keeps one of omegaconf."""
    return {
        "epoch": 3,
        "global_step": np.int64(40),
        "pytorch-lightning_version": "2.6.6",
        "state_dict": state,
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 4}}}},
        "callbacks": {
            "ModelCheckpoint{'monitor': None}": {"best_model_score": torch.tensor(1.0), "dirpath": Path("x")}
        },
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [{"base_lrs": [np.float64(0.1)], "last_epoch": 4, "lr_lambdas": [None]}],
        "hparams_name": "cfg",
        "hyper_parameters": omegaconf.OmegaConf.create({"optimizer": {"lr": 0.1}, "method": "dino"}),
    }


def lightly_file() -> dict[str, Any]:
    """A module of lightly's example, whose keys are those of its attributes; its heads' are ours (tests of the drop-in)."""
    heads = {name: lightly.DINOProjectionHead(DIM, 16, 8, K) for name in ("student_head", "teacher_head")}
    parts = {"student_backbone": backbone(), "teacher_backbone": backbone(), "criterion": lightly.DINOLoss(K), **heads}
    module = moved(Parts(**parts))
    return lightning_file(module.state_dict(), trained(module.get_submodule("student_head")))


def solo_file() -> dict[str, Any]:
    parts = {"backbone": backbone(), "momentum_backbone": backbone(), "dino_loss_func": solo.DINOLoss(K, *SCHEDULE)}
    heads = {name: solo.DINOHead(DIM, K, hidden_dim=16, bottleneck_dim=8) for name in ("head", "momentum_head")}
    module = moved(Parts(**parts, **heads))
    return lightning_file(module.state_dict(), trained(module.get_submodule("head")))


def dino_parts() -> dict[str, nn.Module]:
    return {"backbone": backbone(), "head": dino.DINOHead(DIM, K, **SIZES), "loss": dino.DINOLoss(K, 4, *SCHEDULE)}


def ibot_parts() -> dict[str, nn.Module]:
    loss = ibot.iBOTLoss(K, K2, 2, 0, 0.04, 0.04, 0.04, 0.07, 2, 5)
    return {"backbone": backbone(), "head": ibot.iBOTHead(DIM, K, patch_out_dim=K2, **SIZES), "loss": loss}


def dinov2_parts() -> dict[str, nn.Module]:
    heads = {"dino_head": dinov2.DINOHead(DIM, K, **SIZES), "ibot_head": dinov2.DINOHead(DIM, K2, **SIZES)}
    losses = {"dino_loss": dinov2.DINOLoss(K), "ibot_patch_loss": dinov2.iBOTPatchLoss(K2)}
    return {"backbone": backbone(), **heads, **losses}


Load = Callable[[Any, str, dict[str, nn.Module]], None]
Place = Callable[[dict[str, Any], str, str], STATE]


def under(state: STATE, prefix: str) -> STATE:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def by_keywords(module: Any) -> Load:
    return lambda given, network, parts: module.load_checkpoint(given, network=network, **parts)


def by_names(module: Any, names: Callable[[str, str], str]) -> Load:
    def load(given: Any, network: str, parts: dict[str, nn.Module]) -> None:
        module.load_checkpoint(given, {names(network, name): part for name, part in parts.items()})

    return load


def in_entries(loss: str) -> Place:
    def place(file: dict[str, Any], network: str, part: str) -> STATE:
        state = {key.removeprefix("module."): value for key, value in file[network].items()}
        return dict(file[loss]) if part == "loss" else under(state, f"{part}.")

    return place


def in_a_run(file: dict[str, Any], network: str, part: str) -> STATE:
    return under(file["model"], f"{part}." if part.endswith("loss") else f"{network}.{part}.")


def in_lightning(names: Callable[[str, str], str]) -> Place:
    return lambda file, network, part: under(file["state_dict"], names(network, part) + ".")


def lightly_name(network: str, part: str) -> str:
    return "criterion" if part == "loss" else f"{network}_{part}"


def solo_name(network: str, part: str) -> str:
    return "dino_loss_func" if part == "loss" else part if network == "student" else f"momentum_{part}"


def lightly_parts() -> dict[str, nn.Module]:
    return {"backbone": backbone(), "head": lightly.DINOProjectionHead(DIM, 16, 8, K), "loss": lightly.DINOLoss(K)}


def solo_parts() -> dict[str, nn.Module]:
    head = solo.DINOHead(DIM, K, hidden_dim=16, bottleneck_dim=8)
    return {"backbone": backbone(), "head": head, "loss": solo.DINOLoss(K, *SCHEDULE)}


FORMATS: dict[str, tuple[Callable[[], dict[str, Any]], Callable[[], dict[str, nn.Module]], Load, Place]] = {
    "dino": (main_dino, dino_parts, by_keywords(dino), in_entries("dino_loss")),
    "ibot": (main_ibot, ibot_parts, by_keywords(ibot), in_entries("ibot_loss")),
    "dinov2": (dinov2_file, dinov2_parts, by_keywords(dinov2), in_a_run),
    "lightly": (lightly_file, lightly_parts, by_names(lightly, lightly_name), in_lightning(lightly_name)),
    "solo": (solo_file, solo_parts, by_names(solo, solo_name), in_lightning(solo_name)),
}
