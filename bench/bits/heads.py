"""Cases of the heads of the library and of its drop-ins: features, gradients of all parameters, states, checkpoints.

Legend: R rows, K prototypes, D bottleneck dim.
"""

from __future__ import annotations

import copy
import itertools
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, weight_norm

from bench.bits.inputs import draw, gradients
from bench.bits.record import Case
from vmf_kernels import (
    DINOHead,
    PrototypeLayer,
    PrototypeLogits,
    TeacherTargets,
    fuse_head,
    multi_crop_weights,
    target_cross_entropy,
)
from vmf_kernels.compat import dino, dinov2, dinov3, ibot, lightly, solo

IN_DIM, COUNT = 20, 257
SIZES: dict[str, Any] = {"hidden_dim": 33, "bottleneck_dim": 24}
IMAGES, TOKENS = 5, 6  # of the two views of a batch; class token and patches
PRECISIONS = ("fp32", "fp64", "autocast")


def cases() -> Iterator[Case]:
    """All of this file."""
    for (name, (covers, make)), precision in itertools.product(HEADS.items(), PRECISIONS):
        yield Case(f"{name}/{precision}", (*covers, "PrototypeLogits"), partial(_train, make, precision))
    yield Case("dinov3.DINOHead/halves", ("dinov3.DINOHead",), _halves)
    yield Case("lightly.DINOProjectionHead/resting", ("lightly.DINOProjectionHead",), _resting)
    for name, load in CHECKPOINTS.items():
        for form in ("mapping", "file"):
            yield Case(f"{name}/{form}", (name,), partial(load, form))


def _plain_head() -> nn.Module:
    return nn.Sequential(nn.Linear(IN_DIM, 24), nn.GELU(), nn.Linear(24, COUNT, bias=False))


def _normed_head(norm: Callable[[nn.Module], nn.Module]) -> nn.Module:
    head = _plain_head()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch would rather have the parametrization
        norm(head[-1])  # type: ignore[index]
    return fuse_head(head)


def _initialised(head: Any) -> nn.Module:
    head.init_weights()
    return head  # type: ignore[no-any-return]


HEADS: dict[str, tuple[tuple[str, ...], Callable[[], nn.Module]]] = {
    "PrototypeLayer": (("PrototypeLayer",), lambda: PrototypeLayer(IN_DIM, COUNT)),
    "PrototypeLayer/frozen": (("PrototypeLayer",), lambda: PrototypeLayer(IN_DIM, COUNT, frozen_norm=True)),
    "DINOHead": (("DINOHead", "dino.DINOHead"), lambda: DINOHead(IN_DIM, COUNT, norm_last_layer=False, **SIZES)),
    "DINOHead/BatchNorm": (("DINOHead",), lambda: DINOHead(IN_DIM, COUNT, use_bn=True, **SIZES)),
    "DINOHead/one layer": (("DINOHead",), lambda: DINOHead(IN_DIM, COUNT, nlayers=1, **SIZES)),
    "fuse_head/plain": (("fuse_head",), lambda: fuse_head(_plain_head())),
    "fuse_head/weight norm": (("fuse_head",), lambda: _normed_head(weight_norm)),
    "fuse_head/parametrized": (("fuse_head",), lambda: _normed_head(parametrizations.weight_norm)),
    "fuse_head/last_layer": (("fuse_head",), lambda: fuse_head(DINOHead(IN_DIM, COUNT, **SIZES))),
    "ibot.iBOTHead": (("ibot.iBOTHead",), lambda: ibot.iBOTHead(IN_DIM, COUNT, patch_out_dim=131, norm="ln", **SIZES)),
    "ibot.iBOTHead/shared": (
        ("ibot.iBOTHead",),
        lambda: ibot.iBOTHead(IN_DIM, COUNT, shared_head=True, norm="bn", act="relu", norm_last_layer=False, **SIZES),
    ),
    "dinov2.DINOHead": (("dinov2.DINOHead",), lambda: dinov2.DINOHead(IN_DIM, COUNT, **SIZES)),
    "dinov2.DINOHead/BatchNorm": (
        ("dinov2.DINOHead",),
        lambda: dinov2.DINOHead(IN_DIM, COUNT, use_bn=True, mlp_bias=False, **SIZES),
    ),
    "dinov2.DINOvMFHead": (("dinov2.DINOvMFHead",), lambda: dinov2.DINOvMFHead(IN_DIM, COUNT, **SIZES)),
    "dinov3.DINOHead": (
        ("dinov3.DINOHead",),
        lambda: _initialised(dinov3.DINOHead(IN_DIM, COUNT, nlayers=2, **SIZES)),
    ),
    "lightly.DINOProjectionHead": (
        ("lightly.DINOProjectionHead",),
        lambda: lightly.DINOProjectionHead(IN_DIM, 33, 24, COUNT, batch_norm=True),
    ),
    "lightly.DINOv2ProjectionHead": (
        ("lightly.DINOv2ProjectionHead",),
        lambda: lightly.DINOv2ProjectionHead(IN_DIM, 33, 24, COUNT),
    ),
    "solo.DINOHead": (("solo.DINOHead",), lambda: solo.DINOHead(IN_DIM, COUNT, **SIZES)),
}


def _outputs(head: nn.Module, x: Tensor) -> list[PrototypeLogits]:
    """What the head returns, as matrices of rows."""
    found = head(x)
    return [part.flatten(0, -2) for part in (found if isinstance(found, tuple) else (found,))]


def _train(make: Callable[[], nn.Module], precision: str) -> dict[str, Any]:
    """Two steps of a head whose teacher is a copy."""
    head = make().double() if precision == "fp64" else make()
    teacher, found = copy.deepcopy(head), {"start": dict(head.state_dict())}
    dtype = torch.float64 if precision == "fp64" else torch.float32
    shape = (2 * IMAGES, TOKENS, IN_DIM) if isinstance(head, ibot.iBOTHead) else (2 * IMAGES, IN_DIM)
    for step in range(2):
        x, teacher_x = draw(*shape, dtype=dtype).requires_grad_(), draw(*shape, dtype=dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            outputs = _outputs(head, x)
            with torch.no_grad():
                targets = [TeacherTargets(part, 0.05) for part in _outputs(teacher, teacher_x)]
        weights = multi_crop_weights(2, 2) / IMAGES
        losses = [target_cross_entropy(*pair, weights).loss for pair in zip(outputs, targets, strict=True)]
        trained = {name: parameter for name, parameter in head.named_parameters() if parameter.requires_grad}
        stored = [part.materialize() for part in outputs]
        slopes = gradients(torch.stack(losses).sum() + stored[0].square().mean(), {"x": x, **trained})
        found[f"step {step}"] = {"logits": stored, "losses": losses, **slopes, "state": dict(head.state_dict())}
        with torch.no_grad():
            for name, parameter in trained.items():
                slope = slopes[f"{name}_gradient"]
                parameter.sub_(0.1 * (torch.zeros_like(parameter) if slope is None else slope))
    return found | {"evaluated": [part.materialize() for part in _outputs(head.eval(), draw(*shape, dtype=dtype))]}


def _halves() -> dict[str, Any]:
    head, x = _initialised(dinov3.DINOHead(IN_DIM, COUNT, **SIZES)), draw(7, IN_DIM)
    bottleneck = head(x, no_last_layer=True)
    return {"bottleneck": bottleneck, "logits": head(bottleneck, only_last_layer=True).materialize()}


def _resting() -> dict[str, Any]:
    head = lightly.DINOProjectionHead(IN_DIM, 33, 24, COUNT, freeze_last_layer=1, norm_last_layer=False)
    found = {}
    for epoch in range(2):
        head.zero_grad()
        head(draw(7, IN_DIM)).materialize().square().mean().backward()
        head.cancel_last_layer_gradients(epoch)
        found[f"epoch {epoch}"] = {name: parameter.grad for name, parameter in head.named_parameters()}
    return found


def _under(prefix: str, module: nn.Module) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in module.state_dict().items()}


def _loaded(
    load: Callable[..., None], checkpoint: dict[str, Any], form: str, filled: dict[str, Any], **options: Any
) -> dict[str, Any]:
    """States of the modules ``filled`` after ``load`` has read the checkpoint."""
    if form == "mapping":
        load(checkpoint, **options)
    else:
        with tempfile.TemporaryDirectory() as folder:
            torch.save(checkpoint, Path(folder) / "checkpoint.pth")
            load(Path(folder) / "checkpoint.pth", **options)
    return {name: dict(module.state_dict()) for name, module in filled.items()}


def _load_dino(form: str) -> dict[str, Any]:
    heads = [DINOHead(IN_DIM, COUNT, **SIZES) for _ in range(2)]
    losses = [dino.DINOLoss(COUNT, 5, 0.04, 0.07, 2, 6) for _ in range(2)]
    losses[0].center = draw(1, COUNT)
    saved = {"teacher": _under("module.head.", heads[0]), "dino_loss": losses[0].state_dict(), "epoch": 3}
    modules = {"head": heads[1], "loss": losses[1]}
    return _loaded(dino.load_checkpoint, saved, form, modules, **modules)


def _load_ibot(form: str) -> dict[str, Any]:
    heads = [ibot.iBOTHead(IN_DIM, COUNT, patch_out_dim=131, **SIZES) for _ in range(2)]
    losses = [ibot.iBOTLoss(COUNT, 131, 2, 3, 0.04, 0.07, 0.04, 0.07, 2, 6) for _ in range(2)]
    losses[0].center, losses[0].center2 = draw(1, COUNT), draw(1, 1, 131)
    saved = {"student": _under("_orig_mod.head.", heads[0]), "ibot_loss": losses[0].state_dict()}
    modules = {"head": heads[1], "loss": losses[1]}
    return _loaded(ibot.load_checkpoint, saved, form, modules, network="student", **modules)


def _load_dinov2(form: str) -> dict[str, Any]:
    heads = [dinov2.DINOHead(IN_DIM, COUNT, **SIZES) for _ in range(4)]
    losses = [dinov2.DINOLoss(COUNT), dinov2.DINOLoss(COUNT)]
    losses[0].center = draw(1, COUNT)
    whole = {**_under("teacher.dino_head.", heads[0]), **_under("teacher.ibot_head.", heads[1])}
    saved = {"model": {**whole, **_under("dino_loss.", losses[0])}, "iteration": 7}
    modules = {"dino_head": heads[2], "ibot_head": heads[3], "dino_loss": losses[1]}
    return _loaded(dinov2.load_checkpoint, saved, form, modules, **modules)


def _load_lightly(form: str) -> dict[str, Any]:
    heads = [lightly.DINOProjectionHead(IN_DIM, 33, 24, COUNT) for _ in range(2)]
    losses = [lightly.DINOLoss(COUNT), lightly.DINOLoss(COUNT)]
    losses[0].center = draw(1, 1, COUNT)
    saved = {"state_dict": {**_under("teacher_head.", heads[0]), **_under("criterion.", losses[0])}}
    modules = {"teacher_head": heads[1], "criterion": losses[1]}
    return _loaded(lightly.load_checkpoint, saved, form, modules, modules=modules)


def _load_solo(form: str) -> dict[str, Any]:
    heads = [solo.DINOHead(IN_DIM, COUNT, **SIZES) for _ in range(2)]
    losses = [solo.DINOLoss(COUNT, 0.04, 0.07, 2, 6) for _ in range(2)]
    losses[0].center = draw(1, COUNT)
    saved = {"state_dict": {**_under("head.", heads[0]), **_under("dino_loss_func.", losses[0])}}
    modules = {"head": heads[1], "dino_loss_func": losses[1]}
    return _loaded(solo.load_checkpoint, saved, form, modules, modules=modules)


CHECKPOINTS: dict[str, Callable[[str], dict[str, Any]]] = {
    "dino.load_checkpoint": _load_dino,
    "ibot.load_checkpoint": _load_ibot,
    "dinov2.load_checkpoint": _load_dinov2,
    "lightly.load_checkpoint": _load_lightly,
    "solo.load_checkpoint": _load_solo,
}
