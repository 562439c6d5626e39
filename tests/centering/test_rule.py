"""Any object that fits the protocol is a centring rule of every loss, and what does not fit is named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vmf_kernels import (
    CenteringRule,
    DINOLoss,
    DINOvMFLoss,
    IBOTLoss,
    IBOTPatchLoss,
    IBOTvMFLoss,
    IBOTvMFPatchLoss,
    PrototypeLogits,
    SinkhornKnopp,
    linear_prototypes,
    multi_crop_weights,
    target_cross_entropy,
)
from vmf_kernels.centering.logit import LogitCenter
from vmf_kernels.centering.probability import ProbabilityCenter
from vmf_kernels.compat import dino, ibot, lightly, solo
from vmf_kernels.unstored.teacher_targets import TeacherTargets

PROTOTYPES, DIM, IMAGES, PATCHES = 33, 8, 3, 5
TAU = 0.05
SCHEDULE = (TAU, TAU, 0, 1)  # warm-up temperature, temperature, epochs of warm-up, epochs


class Ramp:
    """A rule that shares nothing with the library's: a fixed bias, and a record of what it was asked."""

    prototype_group = None
    over_probabilities = False

    def __init__(self) -> None:
        self.calls: list[str] = []

    def begin(self, teacher: Any, temperature: Any, bias: Any = None) -> None:
        self.calls.append("begin")

    def target_bias(self, teacher: Any, temperature: Any, bias: Any = None) -> Tensor:
        self.calls.append("target_bias")
        return torch.linspace(0, 2, teacher.shape[-1])

    def accumulate(self, teacher: Any, temperature: Any, bias: Any = None) -> None:
        self.calls.append("accumulate")

    def apply_pending(self) -> None:
        self.calls.append("apply_pending")


def some_logits(rows: int, seed: int, *more: int) -> PrototypeLogits:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(PROTOTYPES, DIM, generator=torch.Generator().manual_seed(9))
    return PrototypeLogits(torch.randn(rows, *more, DIM, generator=generator), linear_prototypes(weight))


def of_crops(loss: nn.Module, *rest: Any) -> Tensor:
    value: Tensor = loss(some_logits(2 * IMAGES, 0), some_logits(2 * IMAGES, 1), *rest)
    return value


def of_patches(loss: nn.Module) -> Tensor:
    mask = torch.zeros(IMAGES, PATCHES, dtype=torch.bool)
    mask[:, :2] = True
    value: Tensor = loss(some_logits(IMAGES, 2, PATCHES), some_logits(IMAGES, 3, PATCHES), mask, TAU)
    return value


def of_both(loss: nn.Module) -> Tensor:
    masks = [torch.ones(IMAGES, PATCHES, dtype=torch.bool)] * 2
    pairs = [(some_logits(2 * IMAGES, seed), some_logits(2 * IMAGES, seed + 2, PATCHES)) for seed in (0, 1)]
    value: Tensor = loss(*pairs, None, masks, 0)["cls"]
    return value


def of_views(loss: nn.Module) -> Tensor:
    teacher, student = (list(some_logits(2 * IMAGES, seed).split(IMAGES)) for seed in (1, 0))
    value: Tensor = loss(teacher, student)
    return value


def of_masked(loss: nn.Module) -> Tensor:
    mask = torch.ones(IMAGES, 1, PATCHES, dtype=torch.bool)
    value: Tensor = loss(some_logits(IMAGES * PATCHES, 3), some_logits(IMAGES * PATCHES, 2), mask)
    return value


CROPS = (PROTOTYPES, 2, *SCHEDULE)
BOTH = (PROTOTYPES, PROTOTYPES, 2, 0, TAU, TAU, TAU, TAU, 0, 1)
LOSSES: dict[str, tuple[Callable[[Any], nn.Module], Callable[[nn.Module], Tensor]]] = {
    "DINOLoss": (lambda r: DINOLoss(*CROPS, centering=r), lambda loss: of_crops(loss, 0)),
    "DINOvMFLoss": (lambda r: DINOvMFLoss(*CROPS, centering=r), lambda loss: of_crops(loss, 0)),
    "dino.DINOLoss": (lambda r: dino.DINOLoss(*CROPS, centering=r), lambda loss: of_crops(loss, 0)),
    "solo.DINOLoss": (lambda r: solo.DINOLoss(PROTOTYPES, *SCHEDULE, centering=r), of_crops),
    "IBOTPatchLoss": (lambda r: IBOTPatchLoss(PROTOTYPES, centering=r), of_patches),
    "IBOTvMFPatchLoss": (lambda r: IBOTvMFPatchLoss(PROTOTYPES, centering=r), of_patches),
    "IBOTLoss": (lambda r: IBOTLoss(*BOTH, centering=r, patch_centering=Ramp()), of_both),
    "IBOTvMFLoss": (lambda r: IBOTvMFLoss(*BOTH, centering=r, patch_centering=Ramp()), of_both),
    "ibot.iBOTLoss": (lambda r: ibot.iBOTLoss(*BOTH, centering=r, patch_centering=Ramp()), of_both),
    "lightly.DINOLoss": (lambda r: lightly.DINOLoss(PROTOTYPES, teacher_temp=TAU, centering=r), of_views),
    "lightly.IBOTPatchLoss": (lambda r: lightly.IBOTPatchLoss(PROTOTYPES, teacher_temp=TAU, centering=r), of_masked),
}
IN_ORDER = ["target_bias", "accumulate", "apply_pending"]


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_takes_a_rule_of_ones_own(name: str) -> None:
    (make, run), rule = LOSSES[name], Ramp()
    with_rule, without = run(make(rule)), run(make(SinkhornKnopp()))
    assert [call for call in rule.calls if call != "begin"] == IN_ORDER, f"the loss called {rule.calls}"
    assert with_rule.isfinite()
    assert abs(with_rule - without) > 1e-3, "the rule's bias changes nothing"


def test_the_targets_have_the_bias_of_the_rule() -> None:
    got = of_crops(DINOLoss(*CROPS, centering=Ramp()), 0)
    targets = TeacherTargets(some_logits(2 * IMAGES, 1), TAU, torch.linspace(0, 2, PROTOTYPES))
    expected = target_cross_entropy(some_logits(2 * IMAGES, 0), targets, multi_crop_weights(2, 2) / IMAGES).loss
    assert torch.equal(got, expected), f"the loss is {got}; expected {expected}"


def test_a_rule_that_is_a_module_is_part_of_the_loss() -> None:
    loss = DINOLoss(*CROPS, centering=LogitCenter(PROTOTYPES, 0.5))
    of_crops(loss, 0)
    assert list(loss.state_dict()) == ["center"]
    assert loss.center_momentum == 0.5
    assert loss.center.any(), "the rule's centre has not moved"


def test_a_class_of_the_protocol_needs_the_bias_only() -> None:
    class NoCentering(CenteringRule):
        def target_bias(self, teacher: Any, temperature: Any, bias: Any = None) -> Tensor:
            return torch.zeros(teacher.shape[-1])

    loss, untouched = DINOLoss(*CROPS, centering=NoCentering()), DINOLoss(*CROPS)
    assert torch.equal(of_crops(loss, 0), of_crops(untouched, 0)), "a centre at 0 is no centring"


class Half:
    """Lacks what a rule needs."""

    def target_bias(self, teacher: Any, temperature: Any, bias: Any = None) -> Tensor:
        raise NotImplementedError


@pytest.mark.parametrize(
    ("make", "error", "said"),
    [
        (lambda: DINOLoss(*CROPS, centering="median"), ValueError, "centering is 'median'; expected one of logit,"),
        (lambda: DINOLoss(*CROPS, centering=Half()), TypeError, "is a Half without accumulate, apply_pending, begin,"),
        (lambda: DINOLoss(*CROPS, centering=3), TypeError, "centering is a int without"),
        (lambda: IBOTLoss(*BOTH, centering=Ramp()), ValueError, "expected another one as patch_centering="),
        (lambda: DINOLoss(*CROPS, centering=Ramp()).update_center(), None, ""),
        (
            lambda: DINOLoss(*CROPS, centering=ProbabilityCenter(PROTOTYPES)).update_center(some_logits(2, 0)),
            ValueError,
            "depend on the teacher's temperature",
        ),
        (
            lambda: setattr(DINOLoss(*CROPS, centering=Ramp()), "center", torch.zeros(PROTOTYPES)),
            ValueError,
            "Ramp keeps no centre",
        ),
        (
            lambda: ProbabilityCenter(9).accumulate(torch.zeros(2, 9), None),
            ValueError,
            "expected a number > 0, got None",
        ),
    ],
)
def test_what_does_not_fit_is_named(make: Callable[[], Any], error: type[Exception] | None, said: str) -> None:
    if error is None:
        make()
        return
    with pytest.raises(error, match=said):
        make()
