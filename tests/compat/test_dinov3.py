"""The drop-in for facebookresearch/dinov3 in its own training step, against the published formulas on stored logits.

Legend: B images, M masked patches, K prototypes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from tests.compat.crops import (
    CENTERINGS,
    IMAGES,
    IN_DIM,
    LOCAL_CROPS,
    OUTPUTS,
    PROTOTYPES,
    SIZES,
    STEPS,
    Batch,
    Parts,
    Record,
    error_over_steps,
    make_heads,
    train,
)
from tests.fuzz.statements.dinov2 import PublishedKoLeoLoss, PublishedPatchLoss, PublishedV3Head, PublishedV3Loss
from tests.measure import relative_error
from tests.steps import BUDGET, DTYPES, SEEN
from vmf_kernels import PrototypeLogits
from vmf_kernels.compat import dinov3
from vmf_kernels.unstored.teacher_targets import TeacherTargets

GLOBAL_CROPS = 2
HEADS = ["dino_head", "ibot_head"]
PUBLISHED = Parts(
    PublishedV3Head,
    {"dino_loss": PublishedV3Loss, "ibot_patch_loss": PublishedPatchLoss, "koleo_loss": PublishedKoLeoLoss},
)
LOSSES: dict[str, Callable[..., nn.Module]] = {
    "dino_loss": dinov3.DINOLoss,
    "ibot_patch_loss": dinov3.iBOTPatchLoss,
    "koleo_loss": dinov3.KoLeoLossDistributed,
}
OURS = {"unstored": Parts(dinov3.DINOHead, LOSSES), "stored": Parts(PublishedV3Head, LOSSES)}


def targets_of(teacher: Any, losses: Any, batch: Batch, temperature: float, centering: str) -> tuple[Any, Any]:
    """The teacher's half of the published step; with centres, which the losses offer and the step no longer uses."""
    patches = torch.index_select(batch.teacher_patches.flatten(0, 1), dim=0, index=batch.mask_indices_list)
    masked_patch_after_head = teacher["ibot_head"](patches)
    cls_after_head = teacher["dino_head"](batch.teacher_cls)
    if centering == "sinkhorn_knopp":
        cls_centered = losses["dino_loss"].sinkhorn_knopp_teacher(cls_after_head, teacher_temp=temperature)
        patch_centered = losses["ibot_patch_loss"].sinkhorn_knopp_teacher(
            masked_patch_after_head, teacher_temp=temperature, n_masked_patches_tensor=batch.n_masked_patches
        )
        return cls_centered.unflatten(0, (GLOBAL_CROPS, IMAGES)), patch_centered
    cls_centered = losses["dino_loss"].softmax_center_teacher(cls_after_head, temperature, update_centers=True)
    losses["dino_loss"].update_center(cls_after_head)
    patch_centered = losses["ibot_patch_loss"].softmax_center_teacher(masked_patch_after_head.unsqueeze(0), temperature)
    losses["ibot_patch_loss"].update_center(masked_patch_after_head.unsqueeze(0))
    return cls_centered.unflatten(0, (GLOBAL_CROPS, IMAGES)), patch_centered.squeeze(0)


def published_step(
    student: nn.ModuleDict,
    teacher: nn.ModuleDict,
    losses: nn.ModuleDict,
    batch: Batch,
    temperature: float,
    *,
    centering: str,
    ignore_diagonal: bool = True,
) -> Record:
    """One step as the published meta-architecture takes it."""
    with torch.no_grad():
        cls_centered, patch_centered = targets_of(teacher, losses, batch, temperature, centering)
    buffer = [batch.student_cls, batch.student_local]
    sizes = [x.shape[0] for x in buffer]
    parts = torch.split_with_sizes(student["dino_head"](torch.cat(buffer, dim=0)), sizes, dim=0)
    global_logits = parts[0].unflatten(0, [GLOBAL_CROPS, IMAGES])
    local_logits = parts[1].unflatten(0, [LOCAL_CROPS, IMAGES])
    patches = torch.index_select(batch.student_patches.flatten(0, 1), dim=0, index=batch.mask_indices_list)

    global_terms = GLOBAL_CROPS * (GLOBAL_CROPS - 1) if ignore_diagonal else GLOBAL_CROPS**2
    local_terms = GLOBAL_CROPS * LOCAL_CROPS
    local = losses["dino_loss"](student_logits=local_logits, teacher_probs=cls_centered)
    across = losses["dino_loss"](
        student_logits=global_logits, teacher_probs=cls_centered, ignore_diagonal=ignore_diagonal
    )
    crops = batch.student_cls.unflatten(0, [GLOBAL_CROPS, IMAGES])
    koleo = sum(losses["koleo_loss"](x) for x in crops) / GLOBAL_CROPS
    ibot = losses["ibot_patch_loss"].forward_masked(  # type: ignore[operator]
        student["ibot_head"](patches),
        patch_centered,
        student_masks_flat=batch.masks,
        n_masked_patches=batch.mask_indices_list.shape[0],
        masks_weight=batch.masks_weight,
    )
    total = (local_terms * local + global_terms * across) / (local_terms + global_terms)
    total = total + 0.1 * GLOBAL_CROPS * koleo + ibot
    return {"local": local, "global": across, "koleo": koleo, "ibot": ibot, "total": total}


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ignore_diagonal", [True, False], ids=["off-diagonal", "all"])
@pytest.mark.parametrize("centering", CENTERINGS)
@pytest.mark.parametrize("output", OUTPUTS)
def test_several_steps_equal_the_published_ones(
    output: str, centering: str, ignore_diagonal: bool, dtype: torch.dtype
) -> None:
    step = partial(published_step, centering=centering, ignore_diagonal=ignore_diagonal)
    error, name = error_over_steps(OURS[output], PUBLISHED, step, HEADS, dtype)
    assert error <= BUDGET[dtype], f"{name}: relative error {error:.2e}, budget {BUDGET[dtype]:.0e}"


@pytest.mark.quick
def test_the_diagonal_shows() -> None:
    """Negative control: pairs of a crop with itself, which one side leaves out, make another run."""
    records = []
    for ignore in (True, False):
        step = partial(published_step, centering="sinkhorn_knopp", ignore_diagonal=ignore)
        networks = make_heads(dinov3.DINOHead, HEADS, torch.float64)
        records.append(train(networks, OURS["unstored"].make_losses(torch.float64), step, torch.float64))
    name = f"step {STEPS - 1} total"
    error = relative_error(records[0][name], records[1][name])
    assert error > SEEN * BUDGET[torch.float64], f"relative difference {error:.2e}"


def state_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


@pytest.mark.quick
def test_state_dicts_have_the_published_keys_and_shapes() -> None:
    ours, published = OURS["unstored"].make_losses(torch.float32), PUBLISHED.make_losses(torch.float32)
    assert state_of(ours) == state_of(published)
    assert state_of(ours) == {"dino_loss.center": (1, PROTOTYPES), "ibot_patch_loss.center": (1, 1, PROTOTYPES)}
    heads = dinov3.DINOHead(IN_DIM, PROTOTYPES, **SIZES), PublishedV3Head(IN_DIM, PROTOTYPES, **SIZES)
    assert state_of(heads[0]) == state_of(heads[1])
    assert {"mlp.0.weight", "last_layer.weight"} <= set(state_of(heads[0]))


@pytest.mark.quick
def test_a_checkpoint_goes_to_the_published_modules_and_back() -> None:
    networks, losses = make_heads(dinov3.DINOHead, HEADS, torch.float64), OURS["unstored"].make_losses(torch.float64)
    train(networks, losses, partial(published_step, centering="centering"), torch.float64)
    twin, twin_losses = PublishedV3Head(IN_DIM, PROTOTYPES, **SIZES).double(), PUBLISHED.make_losses(torch.float64)
    twin.load_state_dict(networks[0]["dino_head"].state_dict())
    twin_losses.load_state_dict(losses.state_dict())
    # the losses here were never initialised: loading is enough
    again, again_losses = dinov3.DINOHead(IN_DIM, PROTOTYPES, **SIZES).double(), dinov3.DINOLoss(PROTOTYPES).double()
    again.load_state_dict(twin.state_dict())
    again_losses.load_state_dict(twin_losses["dino_loss"].state_dict())
    x = torch.randn(7, IN_DIM, dtype=torch.float64)
    assert relative_error(again(x).materialize(), twin(x)) <= 1e-12
    assert losses["dino_loss"].center.abs().max() > 0, "the centre has not moved"  # type: ignore[operator]
    assert torch.equal(again_losses.center, losses["dino_loss"].center)  # type: ignore[arg-type]
    targets = again_losses.softmax_center_teacher(again(x), 0.04)
    assert targets.materialize().isfinite().all()  # type: ignore[union-attr]


@pytest.mark.quick
def test_the_head_s_halves_make_the_whole() -> None:
    head, twin = dinov3.DINOHead(IN_DIM, PROTOTYPES, **SIZES), PublishedV3Head(IN_DIM, PROTOTYPES, **SIZES)
    twin.load_state_dict(head.state_dict())
    x = torch.randn(2, 3, IN_DIM)
    bottleneck = head(x, no_last_layer=True)
    assert relative_error(bottleneck, twin(x, no_last_layer=True)) <= 1e-6
    logits = head(bottleneck, only_last_layer=True)
    assert isinstance(logits, PrototypeLogits)
    assert relative_error(logits.materialize(), twin(bottleneck, only_last_layer=True)) <= 1e-6
    assert torch.equal(logits.materialize(), head(x).materialize())
    assert torch.equal(head(x, True, True), x)


@pytest.mark.parametrize("output", OUTPUTS)
def test_sinkhorn_as_a_module_compiles(output: str) -> None:
    head = dinov3.DINOHead(IN_DIM, PROTOTYPES, **SIZES)
    rows = head(torch.randn(9, IN_DIM))
    logits = rows if output == "unstored" else rows.materialize().detach()
    plain, compiled = dinov3.SinkhornKnoppTeacher(), dinov3.iBOTPatchLoss(PROTOTYPES).sinkhorn_knopp_teacher
    torch.compiler.reset()
    compiled.compile(backend="eager")
    results = [module(logits, 0.05, n_masked_patches_tensor=torch.tensor([9])) for module in (plain, compiled)]
    values = [each.materialize() if isinstance(each, TeacherTargets) else each for each in results]
    assert relative_error(values[1], values[0]) <= 1e-6


def parameters_of(function: Any) -> list[tuple[str, Any]]:
    return [
        (p.name, p.default)
        for p in inspect.signature(function).parameters.values()
        if p.name != "self" and p.kind == p.POSITIONAL_OR_KEYWORD
    ]


@pytest.mark.quick
def test_signatures_are_the_published_ones() -> None:
    """Spelt out: a slip shared with the published formulas of these tests would pass a comparison with those."""
    none = inspect.Parameter.empty
    temps = [("student_temp", 0.1), ("center_momentum", 0.9)]
    sizes = [("use_bn", False), ("nlayers", 3), ("hidden_dim", 2048), ("bottleneck_dim", 256), ("mlp_bias", True)]
    masked = [
        ("student_patch_tokens_masked", none),
        ("teacher_patch_tokens_masked", none),
        ("student_masks_flat", none),
    ]
    plan = [("teacher_output", none), ("teacher_temp", none), ("n_masked_patches_tensor", none), ("n_iterations", 3)]
    expected: dict[Any, list[tuple[str, Any]]] = {
        dinov3.DINOHead.__init__: [("in_dim", none), ("out_dim", none), *sizes],
        dinov3.DINOHead.forward: [("x", none), ("no_last_layer", False), ("only_last_layer", False)],
        dinov3.DINOLoss.__init__: [("out_dim", none), *temps],
        dinov3.DINOLoss.forward: [("student_logits", none), ("teacher_probs", none), ("ignore_diagonal", False)],
        dinov3.DINOLoss.softmax_center_teacher: [*plan[:2], ("update_centers", True)],
        dinov3.DINOLoss.sinkhorn_knopp_teacher: [*plan[:2], plan[3]],
        dinov3.DINOLoss.update_center: [("teacher_output", none)],
        dinov3.iBOTPatchLoss.__init__: [("patch_out_dim", none), *temps],
        dinov3.iBOTPatchLoss.softmax_center_teacher: [
            *(("teacher_patch_tokens", none), ("teacher_temp", none), ("update_centers", True)),
        ],
        dinov3.SinkhornKnoppTeacher.forward: plan,
        dinov3.iBOTPatchLoss.forward: [
            *(("student_patch_tokens", none), ("teacher_patch_tokens", none), ("student_masks_flat", none)),
        ],
        dinov3.iBOTPatchLoss.forward_masked: [*masked, ("n_masked_patches", None), ("masks_weight", None)],
        dinov3.KoLeoLoss.forward: [("student_output", none), ("eps", 1e-8)],
        dinov3.KoLeoLossDistributed.__init__: [("topk", 1), ("loss_group_size", None)],
        dinov3.KoLeoLossDistributed.forward: [("student_output", none), ("eps", 1e-8)],
        dinov3.DINOHead.init_weights: [],
        dinov3.DINOLoss.init_weights: [],
        dinov3.iBOTPatchLoss.init_weights: [],
    }
    for function, parameters in expected.items():
        assert parameters_of(function) == parameters, function.__qualname__


@pytest.mark.quick
def test_a_model_built_without_memory_starts_by_init_weights() -> None:
    """As the published training builds it: on the meta device, everything NaN until initialised."""
    with torch.device("meta"):
        modules = nn.ModuleList(
            [
                dinov3.DINOHead(IN_DIM, PROTOTYPES, **SIZES),
                dinov3.DINOLoss(PROTOTYPES),
                dinov3.iBOTPatchLoss(PROTOTYPES),
            ]
        )
    modules.to_empty(device="cpu")
    for tensor in modules.state_dict().values():
        tensor.fill_(torch.nan)
    head, loss, patch_loss = modules
    for module in modules:
        module.init_weights()  # type: ignore[operator]
    logits = head(torch.randn(6, IN_DIM))
    for each in (loss, patch_loss):
        each.update_center(logits)  # type: ignore[operator]
        assert each.softmax_center_teacher(logits, 0.05).materialize().isfinite().all()  # type: ignore[operator]
    targets = loss.sinkhorn_knopp_teacher(logits, 0.05).unflatten(0, (2, 3))  # type: ignore[operator]
    assert loss(logits.unflatten(0, (2, 3)), targets).isfinite()
