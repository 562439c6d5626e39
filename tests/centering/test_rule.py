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
from vmf_kernels.compat import dino, dinov2, ibot, lightly, solo
from vmf_kernels.unstored.teacher_targets import TeacherTargets

pytestmark = pytest.mark.quick

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


def one_rule_twice() -> nn.Module:
    rule = Ramp()
    return IBOTLoss(*BOTH, centering=rule, patch_centering=rule)


class Nameless(CenteringRule):
    """Inherits, and forgets the one method that it needs."""

    def target_biass(self) -> None:
        """Misspelled."""


@pytest.mark.parametrize(
    ("make", "error", "said"),
    [
        (lambda: DINOLoss(*CROPS, centering="median"), ValueError, "centering is 'median'; expected one of logit,"),
        (lambda: DINOLoss(*CROPS, centering=Half()), TypeError, "is a Half without accumulate, apply_pending, begin,"),  # type: ignore[arg-type]
        (lambda: DINOLoss(*CROPS, centering=3), TypeError, "centering is a int without accumulate"),  # type: ignore[arg-type]
        (
            lambda: IBOTLoss(*BOTH, centering=Ramp()),
            ValueError,
            "expected another one as patch_centering=, for the patches",
        ),
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


BIASES: dict[str, Callable[[int], Any]] = {
    "None": lambda k: None,
    "a number": lambda k: 0.5,
    "one for all": lambda k: torch.zeros(1),
    "one too many": lambda k: torch.zeros(k + 1),
    "integers": lambda k: torch.zeros(k, dtype=torch.int64),
    "another device": lambda k: torch.zeros(k, device="meta"),
}


@pytest.mark.parametrize("stored", [False, True], ids=["unstored", "stored"])
@pytest.mark.parametrize("name", BIASES)
def test_a_bias_that_does_not_fit_is_named(name: str, stored: bool) -> None:
    rule = Ramp()
    rule.target_bias = lambda teacher, *rest: BIASES[name](teacher.shape[-1])  # type: ignore[method-assign]
    logits = [some_logits(2 * IMAGES, seed) for seed in (0, 1)]
    given = [each.materialize() for each in logits] if stored else logits
    with pytest.raises(
        ValueError, match=r"Ramp.target_bias returned .*; expected a floating-point tensor \[33\] on cpu"
    ):
        DINOLoss(*CROPS, centering=rule)(*given, 0)


def test_a_loss_that_was_left_on_another_device_is_told_to_move() -> None:
    logits = torch.randn(2 * IMAGES, 33, device="meta"), torch.randn(2 * IMAGES, 33, device="meta")
    with pytest.raises(ValueError, match=r"on cpu; expected .* on meta, where the logits are: move the loss by \.to"):
        DINOLoss(*CROPS)(*logits, 0)


def test_any_shape_and_dtype_of_k_numbers_is_a_bias() -> None:
    rule, expected = Ramp(), of_crops(DINOLoss(*CROPS, centering=Ramp()), 0)
    rule.target_bias = lambda teacher, *rest: torch.linspace(0, 2, 33).double()[None]  # type: ignore[method-assign]
    assert abs(of_crops(DINOLoss(*CROPS, centering=rule), 0) - expected) < 1e-6


def test_a_rule_sees_no_graph_and_may_keep_what_it_sees() -> None:
    class Mean(Ramp):
        kept = torch.zeros(PROTOTYPES)

        def target_bias(self, teacher: Any, temperature: Any, bias: Any = None) -> Tensor:
            return -self.kept

        def accumulate(self, teacher: Any, temperature: Any, bias: Any = None) -> None:
            self.kept = 0.9 * self.kept + 0.1 * teacher.mean(0)

    loss = DINOLoss(*CROPS, centering=Mean())
    for _ in range(2):
        student, teacher = (
            torch.randn(4, PROTOTYPES, requires_grad=True),
            torch.randn(4, PROTOTYPES, requires_grad=True),
        )
        loss(student, teacher, 0).backward()
    assert teacher.grad is None


@pytest.mark.parametrize("name", LOSSES)
def test_none_is_the_rule_of_the_method(name: str) -> None:
    loss = LOSSES[name][0](None)
    rules = [part for part in loss.modules() if isinstance(part, LogitCenter | ProbabilityCenter)]
    expected = ProbabilityCenter if "vMF" in name else lightly.RankMeanCenter if "lightly" in name else LogitCenter
    assert type(rules[0]) is expected


def test_a_checkpoint_with_a_centre_loads_where_the_rule_has_none() -> None:
    saved = DINOLoss(*CROPS).state_dict()
    for rule in (Ramp(), SinkhornKnopp()):
        with pytest.warns(UserWarning, match="keeps no centre: 'center' of the checkpoint is not used"):
            DINOLoss(*CROPS, centering=rule).load_state_dict(saved)


def test_a_rule_with_a_flat_centre_loads_what_it_saved() -> None:
    class Flat(nn.Module, CenteringRule):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("center", torch.arange(float(PROTOTYPES)))

        def target_bias(self, teacher: Any, temperature: Any, bias: Any = None) -> Tensor:
            return -self.center  # type: ignore[operator]

    one, other = DINOLoss(*CROPS, centering=Flat()), DINOLoss(*CROPS, centering=Flat())
    assert one.state_dict()["center"].shape == (1, PROTOTYPES)
    one.centering.center += 1  # type: ignore[attr-defined]
    other.load_state_dict(one.state_dict())
    assert torch.equal(other.centering.center, one.centering.center)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "make", [lambda: dinov2.DINOLoss(8), lambda: dinov2.iBOTPatchLoss(8), lambda: DINOLoss(8, 2, *SCHEDULE)]
)
@pytest.mark.parametrize("value", [torch.ones(8, 1), torch.ones(2, 4), torch.ones(9), "eight"], ids=str)
def test_a_centre_that_does_not_fit_is_named_as_it_was_saved(make: Callable[[], nn.Module], value: Any) -> None:
    loss = make()
    with pytest.raises(RuntimeError, match=r"center is a|size mismatch for center:|named .center., expected"):
        loss.load_state_dict({"center": value})


def test_a_centre_is_assigned_from_a_parameter_too() -> None:
    for loss in (DINOLoss(8, 2, *SCHEDULE), dinov2.DINOLoss(8), dinov2.iBOTPatchLoss(8)):
        loss.center = nn.Parameter(torch.full((8,), 2.0))
        assert torch.equal(loss.center.flatten(), torch.full((8,), 2.0))
        assert not list(loss.parameters())


@pytest.mark.parametrize("options", [{"center_start": "first_batch"}, {"centering": "sinkhorn_knopp"}])
def test_a_backend_without_a_pass_over_stored_logits_is_refused_before_a_centre_starts(options: dict[str, Any]) -> None:
    loss = DINOLoss(*CROPS, backend="native", **options)
    with pytest.raises(ValueError, match="backend 'native' has no pass over stored logits; expected one of auto,"):
        loss(torch.randn(4, PROTOTYPES), torch.randn(4, PROTOTYPES), 0)
    assert all(value.isnan().all() for value in loss.state_dict().values()), "the centre has started"
    with pytest.raises(ValueError, match="backend 'native' has no pass over stored logits"):
        dinov2.DINOLoss(9, backend="native").softmax_center_teacher(torch.randn(4, 9), 0.1)


def test_heads_of_two_kinds_are_refused_unless_the_loss_makes_them_one() -> None:
    student, teacher = some_logits(2 * IMAGES, 0).with_vmf(), some_logits(2 * IMAGES, 1)
    for pair, said in (
        ((student, teacher), "student's prototypes are"),
        ((teacher, student), "teacher's prototypes are"),
    ):
        with pytest.raises(ValueError, match=f"the {said} von Mises-Fisher components but the"):
            DINOLoss(*CROPS)(*pair, 0)
    one_kind = DINOvMFLoss(*CROPS)(student, teacher.with_vmf(), 0)
    assert torch.equal(DINOvMFLoss(*CROPS)(student, teacher, 0), one_kind)
