"""On a GPU: the loss modules against the same modules on the CPU, in fp64 on the dense reference.

The budget is that of the other accuracy tests: twice the error of stored logits in the same dtype, and what one rounding of
the products makes of it where those happen to be lucky.

Legend: G / L global / local crops, B images, N patches, K prototypes, D bottleneck dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from tests.measure import relative_error
from vmf_kernels import (
    DINOLoss,
    DINOvMFLoss,
    IBOTLoss,
    IBOTvMFLoss,
    KoLeoLoss,
    PrototypeKoLeoLoss,
    PrototypeLogits,
    Prototypes,
)

CPU = torch.device("cpu")
BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
GLOBAL, LOCAL = 2, 2
TEMPERATURES = (0.05, 0.05, 0, 1)  # constant, for one epoch
DENSE_ERRORS = 2.0  # how often the error of stored logits a result may be off
LUCK = {BF16: 4e-3, FP32: 5e-6}  # relative, in norm: a rounding of the products' operands, at logits of some 20

Leaves = dict[str, Tensor]
Sizes = tuple[int, int, int, int]  # B, N, K, D
Outcome = dict[str, Tensor]  # the loss, gradients by leaf, and the centres it leaves behind


class Case(NamedTuple):
    """A loss module and how it is called."""

    module: Callable[..., nn.Module]  # of K and keywords of the stream
    options: dict[str, Any]
    kind: str  # of the prototypes
    has_patches: bool
    plain: str | None = None  # the case whose stored logits set the budget; those of vMF losses lack the normaliser


def dino(module: type[DINOLoss]) -> Callable[..., nn.Module]:
    return lambda count, **options: module(count, GLOBAL + LOCAL, *TEMPERATURES, **options)


def ibot(module: type[IBOTLoss]) -> Callable[..., nn.Module]:
    sizes = (GLOBAL, LOCAL, *TEMPERATURES[:2], *TEMPERATURES)
    return lambda count, **options: module(count, count, *sizes, **options)


SINKHORN = {"centering": "sinkhorn_knopp"}
CASES = {
    "DINO, Sinkhorn": Case(dino(DINOLoss), SINKHORN, "weight_norm", False),
    "DINO-vMF, Sinkhorn": Case(dino(DINOvMFLoss), SINKHORN, "weight_norm", False, "DINO, Sinkhorn"),
    "iBOT": Case(ibot(IBOTLoss), {}, "weight_norm", True),
    "iBOT, Sinkhorn": Case(ibot(IBOTLoss), SINKHORN, "linear", True),
    "iBOT-vMF": Case(ibot(IBOTvMFLoss), {}, "weight_norm", True, "iBOT"),
}


def make_leaves(sizes: Sizes, *, patches: bool, magnitudes: bool) -> Leaves:
    """Features and prototypes of both networks, fp64 on the CPU; views of an image lie together, teachers near students."""
    images, count, prototypes, dim = sizes

    def unit(*shape: int) -> Tensor:
        return nn.functional.normalize(torch.randn(*shape, dim, dtype=FP64), dim=-1)

    of_image, direction = unit(1, images), unit(prototypes)
    leaves = {
        "global": nn.functional.normalize(of_image + 0.5 * unit(GLOBAL, images), dim=-1).flatten(0, 1),
        "local": nn.functional.normalize(of_image + 0.7 * unit(LOCAL, images), dim=-1).flatten(0, 1),
        "teacher": nn.functional.normalize(of_image + 0.3 * unit(GLOBAL, images), dim=-1).flatten(0, 1),
        "weight": direction,
        "teacher_weight": nn.functional.normalize(direction + 0.2 * unit(prototypes), dim=-1),
    }
    if patches:
        leaves["patches"] = unit(GLOBAL * images, count)
        noise = 0.5 * unit(GLOBAL * images, count)
        leaves["teacher_patches"] = nn.functional.normalize(leaves["patches"] + noise, dim=-1)
    if magnitudes:
        leaves["magnitude"] = 0.7 + 0.6 * torch.rand(prototypes, 1, dtype=FP64)
        leaves["teacher_magnitude"] = 0.7 + 0.6 * torch.rand(prototypes, 1, dtype=FP64)
    return leaves


def outcome(case: Case, leaves: Leaves, masks: list[Tensor], *, backend: str, stored: bool = False) -> Outcome:
    """What one call leaves behind, on the device and in the dtype of the leaves."""
    mine = {name: leaf.detach().requires_grad_(not name.startswith("teacher")) for name, leaf in leaves.items()}

    def logits(rows: str, side: str = "") -> Any:
        magnitude = mine.get(f"{side}magnitude")
        unstored = PrototypeLogits(mine[rows], Prototypes(mine[f"{side}weight"], magnitude, case.kind))
        return unstored.materialize() if stored else unstored

    module = case.module(mine["weight"].shape[0], backend=backend, **case.options).to(mine["weight"].device)
    if mine["weight"].dtype == FP64:
        module = module.double()
    if case.has_patches:
        student = logits("global"), logits("patches")
        teacher = logits("teacher", "teacher_"), logits("teacher_patches", "teacher_")
        loss = module(student, teacher, logits("local"), masks, 0)["loss"]
    else:
        mine["crops"] = torch.cat([mine["global"], mine["local"]])
        loss = module(logits("crops"), logits("teacher", "teacher_"), 0)
    wanted = [name for name, leaf in mine.items() if leaf.requires_grad and leaf.is_leaf]
    gradients = torch.autograd.grad(loss, [mine[name] for name in wanted])
    centres = {name: value for name, value in module.state_dict().items() if value.is_floating_point()}
    return {"loss": loss.detach(), **dict(zip(wanted, gradients, strict=True)), **centres}


def errors(actual: Outcome, truth: Outcome) -> dict[str, float]:
    assert actual.keys() == truth.keys(), f"got {sorted(actual)}, expected {sorted(truth)}"
    return {name: relative_error(actual[name].cpu(), truth[name]) for name in truth}


def check_loss(
    name: str, sizes: Sizes, dtype: torch.dtype, device: torch.device, backend: str = "auto", *, warmer: float = 1.0
) -> None:
    """``warmer`` is for negative controls: it scales the student's features that the backend sees."""
    case = CASES[name]
    exact = make_leaves(sizes, patches=case.has_patches, magnitudes=case.kind == "weight_norm")
    masks = [torch.rand(sizes[0], sizes[1]) < 0.4 for _ in range(GLOBAL)]
    rounded = {key: leaf.to(dtype) for key, leaf in exact.items()}
    widened = {key: leaf.double() for key, leaf in rounded.items()}
    on_device = {key: leaf.to(device) for key, leaf in rounded.items()}
    seen = on_device | {"global": on_device["global"] * warmer}
    truth = outcome(case, widened, masks, backend="reference")
    got = errors(outcome(case, seen, masks, backend=backend), truth)
    plain = case if case.plain is None else CASES[case.plain]
    plain_truth = outcome(plain, widened, masks, backend="reference")
    stored = errors(outcome(plain, on_device, masks, backend="auto", stored=True), plain_truth)
    for quantity, error in got.items():
        allowed = DENSE_ERRORS * stored[quantity] + LUCK[dtype]
        assert error <= allowed, f"{quantity}: relative error {error:.1e}, budget {allowed:.1e}"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_losses_match_the_fp64_reference(name: str, dtype: torch.dtype, device: torch.device) -> None:
    check_loss(name, (8, 49, 4099, 256), dtype, device)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_other_logits_fail_the_budget(name: str, device: torch.device) -> None:
    """Negative control."""
    with pytest.raises(AssertionError, match=r"relative error .*, budget"):
        check_loss(name, (8, 49, 1000, 64), FP32, device, warmer=1.01)


def paired_rows(count: int, dim: int) -> Tensor:
    """[count, D] fp64 in pairs: whose neighbour is whose does not hang on a rounding."""
    one = torch.randn(count // 2, dim, dtype=FP64)
    return torch.stack([one, one + 0.2 * torch.randn_like(one)], dim=1).flatten(0, 1)


KOLEO = {
    "KoLeo": lambda rows: KoLeoLoss()(rows),
    "KoLeo of two crops": lambda rows: KoLeoLoss(crops=2)(rows),
    "KoLeo of prototypes": lambda rows: PrototypeKoLeoLoss()(rows),
}


def check_koleo(name: str, rows: int, dtype: torch.dtype, device: torch.device, budget: float, dim: int = 256) -> None:
    """In fp32 whatever the dtype; its products as torch multiplies fp32."""
    features = paired_rows(rows, dim).to(dtype)
    exact, mine = features.double().requires_grad_(), features.to(device, copy=True).requires_grad_()
    truth, loss = KOLEO[name](exact), KOLEO[name](mine)
    (expected,), (gradient,) = torch.autograd.grad(truth, exact), torch.autograd.grad(loss, mine)
    error = max(relative_error(loss.cpu(), truth), relative_error(gradient.cpu(), expected))
    assert error <= budget, f"{name}: relative error {error:.1e}, budget {budget:.1e}"


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "budget"), [(FP32, 1e-5), (BF16, 4e-3)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", KOLEO)
def test_koleo_matches_the_fp64_formula(name: str, dtype: torch.dtype, budget: float, device: torch.device) -> None:
    check_koleo(name, 1000, dtype, device, budget)


@pytest.mark.gpu
def test_another_neighbour_fails_koleo_s_budget(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control."""
    monkeypatch.setitem(KOLEO, "KoLeo", lambda rows: KoLeoLoss(topk=2 if rows.is_cuda else 1)(rows))
    with pytest.raises(AssertionError, match=r"relative error .*, budget"):
        check_koleo("KoLeo", 100, FP32, device, 1e-5)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
def test_dry_run_at_toy_size() -> None:
    sizes = (2, 4, 40, 64)
    check_loss("iBOT, Sinkhorn", sizes, FP32, CPU, "triton")
    check_loss("DINO-vMF, Sinkhorn", sizes, BF16, CPU, "triton")
    with pytest.raises(AssertionError, match=r"relative error .*, budget"):
        check_loss("iBOT-vMF", sizes, FP32, CPU, "triton", warmer=1.01)
    for name in KOLEO:
        check_koleo(name, 20, FP32, CPU, 1e-5, dim=24)
        check_koleo(name, 20, BF16, CPU, 4e-3, dim=24)
