"""The drop-in for facebookresearch/dinov2 in its own training step, against the published formulas on stored logits.

Legend: B images, L local crops, M masked patches, K prototypes.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from tests.compat.crops import (
    CENTERINGS,
    IN_DIM,
    LOCAL_CROPS,
    OUTPUTS,
    PROTOTYPES,
    SIZES,
    STEPS,
    TEMPERATURES,
    Batch,
    Parts,
    Record,
    Step,
    error_over_steps,
    make_batch,
    make_heads,
    train,
)
from tests.fuzz.statements.dinov2 import (
    PublishedKoLeoLoss,
    PublishedPatchLoss,
    PublishedV2Head,
    PublishedV2Loss,
)
from tests.measure import relative_error
from tests.steps import BUDGET, DTYPES, SEEN
from vmf_kernels.compat import dinov2

PUBLISHED = Parts(
    PublishedV2Head,
    {"dino_loss": PublishedV2Loss, "ibot_patch_loss": PublishedPatchLoss, "koleo_loss": PublishedKoLeoLoss},
)
LOSSES: dict[str, Callable[..., nn.Module]] = {
    "dino_loss": dinov2.DINOLoss,
    "ibot_patch_loss": dinov2.iBOTPatchLoss,
    "koleo_loss": dinov2.KoLeoLoss,
}
OURS = {"unstored": Parts(dinov2.DINOHead, LOSSES), "stored": Parts(PublishedV2Head, LOSSES)}
HEADS = {"shared": ["dino_head"], "separate": ["dino_head", "ibot_head"]}
GLOBAL_CROPS = 2


def targets_of(
    teacher: nn.ModuleDict, losses: Any, batch: Batch, temperature: float, centering: str
) -> tuple[Any, Any]:
    """The teacher's half of the published step."""
    crops = batch.teacher_cls.chunk(GLOBAL_CROPS)
    cls = torch.cat((crops[1], crops[0]))  # reversed, so that each crop meets the other one of its image
    patches = batch.teacher_patches.flatten(0, 1).index_select(0, batch.mask_indices_list)
    masked = patches.shape[0]
    if "ibot_head" in teacher:
        padded = patches.new_zeros(batch.upperbound, IN_DIM)
        padded[:masked] = patches
        cls_after_head, patches_after_head = teacher["dino_head"](cls), teacher["ibot_head"](padded)[:masked]
    else:
        padded = patches.new_zeros(batch.upperbound + cls.shape[0], IN_DIM)
        padded[: cls.shape[0]], padded[cls.shape[0] : cls.shape[0] + masked] = cls, patches
        after_head = teacher["dino_head"](padded)
        cls_after_head = after_head[: cls.shape[0]]
        patches_after_head = after_head[cls.shape[0] : cls.shape[0] + masked]
    if centering == "centering":
        of_cls = losses["dino_loss"].softmax_center_teacher(cls_after_head, teacher_temp=temperature)
        of_cls = of_cls.view(GLOBAL_CROPS, -1, *cls_after_head.shape[1:])
        losses["dino_loss"].update_center(cls_after_head)
        patches_after_head = patches_after_head.unsqueeze(0)
        of_patches = losses["ibot_patch_loss"].softmax_center_teacher(
            patches_after_head[:, :masked], teacher_temp=temperature
        )
        of_patches = of_patches.squeeze(0)
        losses["ibot_patch_loss"].update_center(patches_after_head[:masked])
        return of_cls, of_patches
    of_cls = losses["dino_loss"].sinkhorn_knopp_teacher(cls_after_head, teacher_temp=temperature)
    of_patches = losses["ibot_patch_loss"].sinkhorn_knopp_teacher(
        patches_after_head, teacher_temp=temperature, n_masked_patches_tensor=batch.n_masked_patches
    )
    return of_cls.view(GLOBAL_CROPS, -1, *cls_after_head.shape[1:]), of_patches


def student_logits(student: nn.ModuleDict, batch: Batch) -> tuple[Any, Any, Any]:
    """Of the local crops, the global ones and the masked patches, as the published step gets them from its heads."""
    patches = batch.student_patches.flatten(0, 1).index_select(0, batch.mask_indices_list)
    masked = patches.shape[0]
    padded = torch.cat([patches, patches.new_zeros(batch.upperbound - masked, IN_DIM)])
    inputs = [batch.student_local.unsqueeze(0), batch.student_cls.unsqueeze(0)]
    if "ibot_head" not in student:
        inputs.append(padded.unsqueeze(0))
    sizes = [x.shape[1] for x in inputs]
    parts = student["dino_head"](torch.cat(inputs, dim=1)).split(sizes, dim=1)
    outputs = [part.reshape([1, -1, *part.shape[2:]]) for part in parts]
    local, global_crops = outputs.pop(0).squeeze(0), outputs.pop(0).squeeze(0)
    rest = student["ibot_head"](padded) if "ibot_head" in student else outputs.pop(0).squeeze(0)
    return local, global_crops, rest[:masked]


def published_step(
    student: nn.ModuleDict,
    teacher: nn.ModuleDict,
    losses: nn.ModuleDict,
    batch: Batch,
    temperature: float,
    *,
    centering: str,
    reverse: bool = False,
) -> Record:
    """One step as the published meta-architecture takes it; ``reverse`` undoes its reversal of the crops."""
    with torch.no_grad():
        of_cls, of_patches = targets_of(teacher, losses, batch, temperature, centering)
    local, global_crops, patches = student_logits(student, batch)
    terms = 2 + 2 * LOCAL_CROPS
    record: Record = {}
    record["local"] = (
        losses["dino_loss"](student_output_list=local.chunk(LOCAL_CROPS), teacher_out_softmaxed_centered_list=of_cls)
        / terms
    )
    teacher_rows = torch.cat([of_cls[1], of_cls[0]]) if reverse else of_cls.flatten(0, 1)
    record["global"] = (
        losses["dino_loss"](student_output_list=[global_crops], teacher_out_softmaxed_centered_list=[teacher_rows])
        * 2
        / terms
    )
    record["koleo"] = 0.1 * sum(losses["koleo_loss"](p) for p in batch.student_cls.chunk(2))
    record["ibot"] = (
        losses["ibot_patch_loss"].forward_masked(  # type: ignore[operator]
            patches,
            of_patches,
            student_masks_flat=batch.masks,
            n_masked_patches=batch.mask_indices_list.shape[0],
            masks_weight=batch.masks_weight,
        )
        * 2
        * (1.0 / GLOBAL_CROPS)
    )
    record["total"] = torch.stack(list(record.values())).sum()
    return record


def trained(parts: Parts, dtype: torch.dtype = torch.float64) -> tuple[nn.ModuleDict, nn.ModuleDict]:
    """The student and the losses after training with centres."""
    networks, losses = make_heads(parts.head, HEADS["shared"], dtype), parts.make_losses(dtype)
    train(networks, losses, partial(published_step, centering="centering"), dtype)
    return networks[0], losses


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("centering", CENTERINGS)
@pytest.mark.parametrize("output", OUTPUTS)
def test_several_steps_equal_the_published_ones(output: str, centering: str, heads: str, dtype: torch.dtype) -> None:
    step = partial(published_step, centering=centering)
    error, name = error_over_steps(OURS[output], PUBLISHED, step, HEADS[heads], dtype)
    assert error <= BUDGET[dtype], f"{name}: relative error {error:.2e}, budget {BUDGET[dtype]:.0e}"


@pytest.mark.parametrize("slip", ["pairs", "center", "iterations"])
def test_a_slip_shows(slip: str) -> None:
    """Negative control: the crops paired with themselves, a centre that stays, one iteration fewer."""
    step = partial(published_step, centering="sinkhorn_knopp" if slip == "iterations" else "centering")

    class Slipped(dinov2.DINOLoss):
        def update_center(self, teacher_output: Any) -> None:
            if slip != "center":
                super().update_center(teacher_output)

        def sinkhorn_knopp_teacher(self, teacher_output: Any, teacher_temp: Any, n_iterations: int = 2) -> Any:
            return super().sinkhorn_knopp_teacher(teacher_output, teacher_temp, n_iterations)

    ours = Parts(dinov2.DINOHead, LOSSES | {"dino_loss": Slipped})
    expected = record_of(PUBLISHED, step)
    got = record_of(ours, partial(step, reverse=True) if slip == "pairs" else step)
    error = relative_error(got[f"step {STEPS - 1} total"], expected[f"step {STEPS - 1} total"])
    assert error > SEEN * BUDGET[torch.float64], f"relative difference {error:.2e}"


def record_of(parts: Parts, step: Step) -> Record:
    """Training in fp64 from the same numbers, whichever the head."""
    networks = make_heads(dinov2.DINOHead, HEADS["shared"], torch.float64)
    twins = make_heads(parts.head, HEADS["shared"], torch.float64)
    for network, twin in zip(networks, twins, strict=True):
        twin.load_state_dict(network.state_dict())
    return train(twins, parts.make_losses(torch.float64), step, torch.float64)


def state_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def test_state_dicts_have_the_published_keys_and_shapes() -> None:
    ours, published = OURS["unstored"].make_losses(torch.float32), PUBLISHED.make_losses(torch.float32)
    assert state_of(ours) == state_of(published)
    assert state_of(ours) == {"dino_loss.center": (1, PROTOTYPES), "ibot_patch_loss.center": (1, 1, PROTOTYPES)}
    assert {name for name, _ in ours.named_buffers()} == set(state_of(ours)), "the centre is no buffer of that name"
    for options in ({}, {"nlayers": 1}, {"use_bn": True}, {"mlp_bias": False}):
        sizes = SIZES | options
        heads = dinov2.DINOHead(IN_DIM, PROTOTYPES, **sizes), PublishedV2Head(IN_DIM, PROTOTYPES, **sizes)
        assert state_of(heads[0]) == state_of(heads[1])
    assert {"mlp.0.weight", "last_layer.weight_g", "last_layer.weight_v"} <= set(state_of(heads[0]))


def test_a_checkpoint_goes_to_the_published_modules_and_back() -> None:
    student, losses = trained(OURS["unstored"])
    twin = nn.ModuleDict({"dino_head": PublishedV2Head(IN_DIM, PROTOTYPES, **SIZES)}).double()
    twin_losses = PUBLISHED.make_losses(torch.float64)
    twin.load_state_dict(student.state_dict())
    twin_losses.load_state_dict(losses.state_dict())
    again = dinov2.DINOHead(IN_DIM, PROTOTYPES, **SIZES).double()
    again.load_state_dict(twin["dino_head"].state_dict())
    x = torch.randn(7, IN_DIM, dtype=torch.float64)
    expected = twin["dino_head"](x)
    for head in (student["dino_head"], again):
        error = relative_error(head(x).materialize(), expected)
        assert error <= 1e-12, f"relative error {error:.2e}"
    other = OURS["unstored"].make_losses(torch.float64)
    other.load_state_dict(twin_losses.state_dict())
    for name, center in losses.named_buffers():
        assert center.abs().max() > 0, "the centre has not moved"
        assert torch.equal(dict(other.named_buffers())[name], center)


@pytest.mark.parametrize("parts", [OURS["unstored"], PUBLISHED], ids=["ours", "published"])
def test_a_run_resumed_from_its_state_goes_on_as_if_uninterrupted(parts: Parts) -> None:
    """The published state lacks the update that waits, and so the resumed run parts from the other: the control."""
    step = partial(published_step, centering="centering")
    networks, losses = make_heads(parts.head, HEADS["shared"], torch.float64), parts.make_losses(torch.float64)
    for i in range(2):
        step(*networks, losses, make_batch(i, torch.float64), TEMPERATURES[i])
    resumed = parts.make_losses(torch.float64)
    resumed.load_state_dict(copy.deepcopy(losses.state_dict()))
    totals = [step(*networks, each, make_batch(2, torch.float64), 0.05)["total"] for each in (losses, resumed)]
    error = relative_error(totals[1], totals[0])
    if parts is PUBLISHED:
        assert error > SEEN * BUDGET[torch.float64], "the control no longer loses an update"
    else:
        assert error == 0.0, f"relative error {error:.2e}"


def parameters_of(function: Any) -> list[tuple[str, Any]]:
    return [
        (p.name, p.default)
        for p in inspect.signature(function).parameters.values()
        if p.name != "self" and p.kind == p.POSITIONAL_OR_KEYWORD
    ]


def test_signatures_are_the_published_ones() -> None:
    """Spelt out: a slip shared with the published formulas of these tests would pass a comparison with those."""
    none = inspect.Parameter.empty
    temps = [("student_temp", 0.1), ("center_momentum", 0.9)]
    head = [("use_bn", False), ("nlayers", 3), ("hidden_dim", 2048), ("bottleneck_dim", 256), ("mlp_bias", True)]
    masked = [
        ("student_patch_tokens_masked", none),
        ("teacher_patch_tokens_masked", none),
        ("student_masks_flat", none),
    ]
    expected = {
        dinov2.DINOHead.__init__: [("in_dim", none), ("out_dim", none), *head],
        dinov2.DINOLoss.__init__: [("out_dim", none), *temps],
        dinov2.DINOLoss.forward: [("student_output_list", none), ("teacher_out_softmaxed_centered_list", none)],
        dinov2.DINOLoss.softmax_center_teacher: [("teacher_output", none), ("teacher_temp", none)],
        dinov2.DINOLoss.sinkhorn_knopp_teacher: [("teacher_output", none), ("teacher_temp", none), ("n_iterations", 3)],
        dinov2.DINOLoss.update_center: [("teacher_output", none)],
        dinov2.DINOLoss.reduce_center_update: [("teacher_output", none)],
        dinov2.DINOLoss.apply_center_update: [],
        dinov2.iBOTPatchLoss.__init__: [("patch_out_dim", none), *temps],
        dinov2.iBOTPatchLoss.softmax_center_teacher: [("teacher_patch_tokens", none), ("teacher_temp", none)],
        dinov2.iBOTPatchLoss.sinkhorn_knopp_teacher: [
            *(("teacher_output", none), ("teacher_temp", none), ("n_masked_patches_tensor", none), ("n_iterations", 3)),
        ],
        dinov2.iBOTPatchLoss.forward: [
            *(("student_patch_tokens", none), ("teacher_patch_tokens", none), ("student_masks_flat", none)),
        ],
        dinov2.iBOTPatchLoss.forward_masked: [*masked, ("n_masked_patches", None), ("masks_weight", None)],
        dinov2.KoLeoLoss.__init__: [],
        dinov2.KoLeoLoss.forward: [("student_output", none), ("eps", 1e-8)],
    }
    for function, parameters in expected.items():
        got = [] if function is nn.Module.__init__ else parameters_of(function)
        assert got == parameters, function.__qualname__
