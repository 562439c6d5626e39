"""iBOT's losses against the published formulas over five steps of training, and what holds of them by definition.

Both sides start from the same parameters and see the same batches; teachers follow their students, both centres move, and
every loss, gradient and centre of every step is compared.

Legend: G global crops, B images, C = G B, N patches of an image, M masked patches, K / K2 prototypes of class tokens / patches.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.fuzz.statements.ibot import PublishedIBOTLoss, PublishedIBOTvMFLoss
from tests.fuzz.statements.sinkhorn import published_sinkhorn_knopp
from tests.losses.ibot_steps import (
    GLOBAL,
    PROTOTYPES,
    SIDE,
    Batch,
    batches,
    error_over_steps,
    heads,
    make_batch,
    our_step,
    published_step,
    schedule,
    train,
    twin_of,
)
from tests.measure import worst_error
from vmf_kernels import PrototypeLogits
from vmf_kernels.losses.ibot import IBOTLoss, IBOTPatchLoss, IBOTvMFLoss, IBOTvMFPatchLoss

pytestmark = pytest.mark.quick

BUDGET = {torch.float64: 1e-10, torch.float32: 1e-5}  # relative, in norm, of each tensor of each step
SEEN = 100  # a broken formula must be off by so many budgets
DTYPES = [pytest.param(torch.float64, id="fp64"), pytest.param(torch.float32, id="fp32")]
OUTPUTS = ["unstored", "stored"]
SAME = (120, 120)
HEADS: dict[str, dict[str, Any]] = {
    "separate": {"prototypes": PROTOTYPES},
    "shared": {"prototypes": SAME, "shared": True},
    "teacher-shared": {"prototypes": SAME, "shared_teacher": True},  # the published default
    "frozen-norm": {"prototypes": PROTOTYPES, "frozen_norm": True},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "all-set": {
        "student_temp": 0.13,
        "center_momentum": 0.8,
        "center_momentum2": 0.6,
        "lambda1": 0.7,
        "lambda2": 1.3,
        "mim_start_epoch": 2,
    },
}


@pytest.mark.parametrize(
    ("dtype", "kind", "output", "local"),
    [
        *((torch.float64, kind, output, 2) for kind in HEADS for output in OUTPUTS),
        (torch.float64, "separate", "unstored", 0),
        *((torch.float32, "separate", output, 2) for output in OUTPUTS),
    ],
)
def test_ibot_equals_the_published_formula_over_steps(dtype: torch.dtype, kind: str, output: str, local: int) -> None:
    given = schedule(HEADS[kind]["prototypes"], local)
    error, name = error_over_steps(IBOTLoss(*given), PublishedIBOTLoss(*given), output, dtype, local, **HEADS[kind])
    assert error <= BUDGET[dtype], f"{name}: relative error {error:.2e}, budget {BUDGET[dtype]:.0e}"


@pytest.mark.parametrize("local", [0, 2])
@pytest.mark.parametrize("kind", ["separate", "shared"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_ibot_vmf_equals_the_formula_over_steps(dtype: torch.dtype, kind: str, local: int) -> None:
    given = schedule(HEADS[kind]["prototypes"], local)
    ours, published = IBOTvMFLoss(*given), PublishedIBOTvMFLoss(*given)
    error, name = error_over_steps(ours, published, "unstored", dtype, local, **HEADS[kind])
    assert error <= BUDGET[dtype], f"{name}: relative error {error:.2e}, budget {BUDGET[dtype]:.0e}"


@pytest.mark.parametrize(("ours", "published"), [(IBOTLoss, PublishedIBOTLoss), (IBOTvMFLoss, PublishedIBOTvMFLoss)])
def test_every_option_is_the_published_one(ours: type[IBOTLoss], published: type[PublishedIBOTLoss]) -> None:
    given, options = schedule(), OPTIONS["all-set"]
    error, name = error_over_steps(ours(*given, **options), published(*given, **options))
    assert error <= BUDGET[torch.float64], f"{name}: relative error {error:.2e}, budget 1e-10"


class CenterOfMaskedPatches(PublishedIBOTLoss):
    def forward(self, *given: Any) -> dict[str, Tensor]:
        self.mask = torch.cat([mask.flatten(1) for mask in given[3][:GLOBAL]])
        return super().forward(*given)

    def move_centers(self, teacher_cls: Tensor, teacher_patch: Tensor, epoch: int) -> None:
        super().move_centers(teacher_cls, teacher_patch[self.mask][None], epoch)


class MeanOverMaskedImages(PublishedIBOTLoss):
    def mean_of_masked(self, loss_BN: Tensor, mask_BN: Tensor) -> Tensor:
        return super().mean_of_masked(loss_BN, mask_BN) * len(mask_BN) / mask_BN.any(dim=1).sum()


class MeanOverMaskedPatches(PublishedIBOTLoss):
    def mean_of_masked(self, loss_BN: Tensor, mask_BN: Tensor) -> Tensor:
        return (loss_BN * mask_BN).sum() / mask_BN.sum()


class CenterMovedBeforeUse(PublishedIBOTLoss):
    def forward(self, *given: Any) -> dict[str, Tensor]:
        self.move_centers(given[1][0].detach(), given[1][1].detach(), given[4])
        moved = self.center, self.center2
        losses = super().forward(*given)
        self.center, self.center2 = moved
        return losses


class OneTemperature(PublishedIBOTLoss):
    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.teacher_temps2 = self.teacher_temps


class VMFWithOneTemperature(PublishedIBOTvMFLoss):
    def normalizer(self, norms: Tensor, temperature: float) -> Tensor:
        return super().normalizer(norms, self.student_temp)


class VMFCenterDivided(PublishedIBOTvMFLoss):
    def patch_targets(self, logits: Tensor, temperature: float) -> Tensor:
        return (self.uncentered(logits, 1, temperature) - self.center2 / temperature).softmax(dim=-1)


@pytest.mark.parametrize(
    "broken",
    [CenterOfMaskedPatches, MeanOverMaskedImages, MeanOverMaskedPatches, CenterMovedBeforeUse, OneTemperature],
)
def test_a_broken_ibot_formula_is_seen(broken: type[PublishedIBOTLoss]) -> None:
    """Negative control of the comparison over steps."""
    error, _ = error_over_steps(IBOTLoss(*schedule()), broken(*schedule()))
    assert error > SEEN * BUDGET[torch.float32], f"{broken.__name__} passes: relative error {error:.2e}"


@pytest.mark.parametrize("broken", [VMFWithOneTemperature, VMFCenterDivided])
def test_a_broken_ibot_vmf_formula_is_seen(broken: type[PublishedIBOTvMFLoss]) -> None:
    """Negative control of the comparison over steps."""
    given = schedule(SAME)
    error, _ = error_over_steps(IBOTvMFLoss(*given), broken(*given), **HEADS["shared"])
    assert error > SEEN * BUDGET[torch.float32], f"{broken.__name__} passes: relative error {error:.2e}"


@pytest.mark.parametrize("output", OUTPUTS)
def test_center_of_masked_patches_equals_the_formula_over_steps(output: str) -> None:
    given = schedule()
    error, name = error_over_steps(IBOTLoss(*given, center_tokens="masked"), CenterOfMaskedPatches(*given), output)
    assert error <= BUDGET[torch.float64], f"{name}: relative error {error:.2e}, budget 1e-10"


class PublishedSinkhornLoss(PublishedIBOTLoss):
    """Targets from each batch alone: class tokens of all global crops, and masked patches."""

    def forward(self, *given: Any) -> dict[str, Tensor]:
        self.mask = torch.cat([mask.flatten(1) for mask in given[3][:GLOBAL]])
        return super().forward(*given)

    def cls_targets(self, logits: Tensor, temperature: float) -> Tensor:
        return published_sinkhorn_knopp(logits / temperature)

    def patch_targets(self, logits: Tensor, temperature: float) -> Tensor:
        targets = torch.zeros_like(logits)
        targets[self.mask] = published_sinkhorn_knopp(logits[self.mask] / temperature)
        return targets

    def move_centers(self, teacher_cls: Tensor, teacher_patch: Tensor, epoch: int) -> None:
        pass

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return {}


@pytest.mark.parametrize("output", OUTPUTS)
def test_sinkhorn_knopp_equals_the_formula_over_steps(output: str) -> None:
    ours, published = IBOTLoss(*schedule(), centering="sinkhorn_knopp"), PublishedSinkhornLoss(*schedule())
    error, name = error_over_steps(ours, published, output)
    assert error <= BUDGET[torch.float64], f"{name}: relative error {error:.2e}, budget 1e-10"
    assert not ours.state_dict()


@pytest.mark.filterwarnings("ignore:DINO-vMF is on but")
def test_ibot_vmf_with_norms_at_one_equals_ibot() -> None:
    records = []
    for loss in (IBOTLoss(*schedule()), IBOTvMFLoss(*schedule(), centering="logit")):
        torch.manual_seed(0)
        networks = heads(torch.float64, frozen_norm=True)
        records.append(train(*networks, loss.double(), our_step(loss), batches(torch.float64)))
    error, name = worst_error(records[1], records[0])
    assert error <= 1e-10, f"{name}: relative error {error:.2e}, budget 1e-10"


def test_ibot_vmf_with_free_norms_is_another_loss() -> None:
    """Negative control of the one above."""
    student, teacher = heads()
    values = [
        our_step(loss)(student, teacher, make_batch(0), 0)["patch"]
        for loss in (IBOTLoss(*schedule()), IBOTvMFLoss(*schedule(), centering="logit"))
    ]
    assert abs(values[1] / values[0] - 1) > 1e-3, f"both gave {values[0].item():.6f}"


def test_ibot_vmf_warns_once_of_frozen_norms() -> None:
    networks, loss = heads(frozen_norm=True), IBOTvMFLoss(*schedule())
    with pytest.warns(UserWarning, match=r"norms are frozen \(norm_last_layer=True\)") as seen:
        our_step(loss)(*networks, make_batch(0), 0)
    assert len(seen) == 1, f"{len(seen)} warnings in one step"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        our_step(loss)(*networks, make_batch(1), 1)


def test_ibot_vmf_does_not_warn_of_free_norms() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        our_step(IBOTvMFLoss(*schedule()))(*heads(), make_batch(0), 0)


def test_the_teacher_gets_no_gradient() -> None:
    student, teacher = heads()
    teacher.requires_grad_(True)
    our_step(IBOTLoss(*schedule()))(student, teacher, make_batch(0), 0)["loss"].backward()
    touched = [name for name, parameter in teacher.named_parameters() if parameter.grad is not None]
    assert not touched, f"the teacher's {', '.join(touched)} got a gradient"
    assert all(parameter.grad is not None for parameter in student.parameters())


def test_statistics_add_up_to_the_losses() -> None:
    given: tuple[Any, ...] = schedule()
    loss = IBOTLoss(*given, lambda1=0.5).double()  # type: ignore[misc]
    batch = make_batch(1, torch.float64)
    values = our_step(loss)(*heads(torch.float64), batch, 0)
    of_cls, of_patch = loss.statistics, loss.patch_statistics
    assert of_cls is not None
    assert of_patch is not None
    share = (
        sum(mask.flatten(1).any(dim=1).double().mean() for mask in batch.masks) / GLOBAL
    )  # images with a masked patch
    assert 0 < share < 1
    torch.testing.assert_close(0.5 * (of_cls.teacher_entropy + of_cls.kl), values["cls"].detach())
    torch.testing.assert_close((of_patch.teacher_entropy + of_patch.kl) * share, values["patch"].detach())
    assert (of_cls.usage.shape, of_patch.usage.shape) == ((PROTOTYPES[0],), (PROTOTYPES[1],))


def patch_logits(dtype: torch.dtype = torch.float64) -> tuple[PrototypeLogits, PrototypeLogits, Tensor]:
    """Student's and teacher's patches and their mask."""
    student, teacher = heads(dtype)
    batch = make_batch(1, dtype)
    mask = torch.cat([mask.flatten(1) for mask in batch.masks])
    return student(batch.crops)[1], teacher(batch.views)[1], mask


def test_the_patch_loss_alone_equals_the_formula() -> None:
    student, teacher, mask = patch_logits()
    q = ((teacher.materialize() - 0.0) / 0.07).softmax(dim=-1)
    loss_CN = -(q * (student.materialize() / 0.1).log_softmax(dim=-1)).sum(dim=-1)
    per_image = [
        row[masked].mean() if masked.any() else row.new_zeros(()) for row, masked in zip(loss_CN, mask, strict=True)
    ]
    expected = torch.stack(per_image).mean()
    value = IBOTPatchLoss(PROTOTYPES[1]).double()(student, teacher, mask, 0.07)
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=0)


def test_masks_may_have_the_shape_of_the_image() -> None:
    student, teacher, mask = patch_logits()
    flat, square = (
        IBOTPatchLoss(PROTOTYPES[1])(student, teacher, shaped, 0.07)
        for shaped in (mask, mask.unflatten(1, (SIDE, SIDE)))
    )
    assert flat == square


@pytest.mark.parametrize("patch_loss", [IBOTPatchLoss, IBOTvMFPatchLoss])
def test_patches_that_are_not_masked_do_not_matter_to_the_loss(patch_loss: type[IBOTPatchLoss]) -> None:
    student, teacher, mask = patch_logits()
    values = []
    for noise in (0.0, 1.0):
        features = student.features + noise * (~mask)[..., None] * torch.randn_like(student.features)
        moved = PrototypeLogits(features.detach().requires_grad_(), student.prototypes)
        value = patch_loss(PROTOTYPES[1]).double()(moved, teacher, mask, 0.07)
        (gradient,) = torch.autograd.grad(value, [moved.features])
        assert gradient[~mask].eq(0).all()
        assert gradient[mask].ne(0).any(dim=-1).all()
        values.append(value)
    assert values[0] == values[1]


@pytest.mark.parametrize("tokens", ["all", "masked"])
@pytest.mark.parametrize(
    ("loss_class", "output"), [(IBOTLoss, "unstored"), (IBOTLoss, "stored"), (IBOTvMFLoss, "unstored")]
)
def test_a_batch_without_masked_patches(loss_class: type[IBOTLoss], output: str, tokens: str) -> None:
    student, teacher = heads()
    loss, batch = loss_class(*schedule(), center_tokens=tokens), make_batch(0)
    batch = batch._replace(masks=[torch.zeros_like(mask) for mask in batch.masks])
    values = our_step(loss, output)(student, teacher, batch, 0)
    values["loss"].backward()
    assert values["patch"] == 0
    assert values["loss"] == values["cls"] > 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in student.parameters())
    assert student.last_layer2.weight_v.grad is not None
    assert student.last_layer2.weight_v.grad.eq(0).all()
    assert student.last_layer.weight_v.grad.ne(0).any()  # type: ignore[union-attr]
    assert loss.center.ne(0).any()
    assert bool(loss.center2.ne(0).any()) == (tokens == "all"), "which patches move the centre"
    assert all(value.isfinite().all() for value in vars(loss.patch_statistics).values())


@pytest.mark.parametrize("tokens", ["all", "masked"])
@pytest.mark.parametrize("start", ["zero", "first_batch"])
@pytest.mark.parametrize("rule", ["logit", "probability", "sinkhorn_knopp"])
@pytest.mark.parametrize("output", OUTPUTS)
def test_the_step_after_a_batch_without_masked_patches_is_finite(
    output: str, rule: str, start: str, tokens: str
) -> None:
    student, teacher = heads()
    loss = IBOTLoss(*schedule(), centering=rule, center_start=start, center_tokens=tokens)
    for i, empty in enumerate((True, False)):
        batch = make_batch(i)
        batch = batch._replace(masks=[torch.zeros_like(mask) for mask in batch.masks]) if empty else batch
        values = our_step(loss, output)(student, teacher, batch, i)
        values["loss"].backward()
        assert bool(values["patch"] == 0) == empty
    assert all(p.grad is not None and p.grad.isfinite().all() for p in student.parameters())
    assert all(center.isfinite().all() for center in loss.state_dict().values())


@pytest.mark.parametrize("tokens", ["all", "masked"])
def test_center_start_first_batch_begins_at_the_mean_of_its_tokens(tokens: str) -> None:
    student, teacher, mask = patch_logits(torch.float32)
    loss = IBOTPatchLoss(PROTOTYPES[1], center_tokens=tokens, center_start="first_batch")
    logits = teacher.materialize()
    mean = (logits.flatten(0, 1) if tokens == "all" else logits[mask]).mean(dim=0, keepdim=True)
    reference = IBOTPatchLoss(PROTOTYPES[1], center_tokens=tokens)
    reference.load_state_dict({"center": mean})
    torch.testing.assert_close(loss(student, teacher, mask, 0.07), reference(student, teacher, mask, 0.07))
    torch.testing.assert_close(loss.center, mean)


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("tokens", ["all", "masked"])
@pytest.mark.parametrize("centering", ["logit", "probability"])
def test_manual_update_takes_two_micro_batches_as_one(centering: str, tokens: str, output: str) -> None:
    student, teacher = heads()
    options: dict[str, Any] = {"centering": centering, "center_tokens": tokens}
    parts = [make_batch(step, local=0) for step in (0, 1)]
    manual = IBOTLoss(*schedule(local=0), center_update="manual", **options)
    for part in parts:
        our_step(manual, output)(student, teacher, part, 0)
        assert manual.center.eq(0).all()
        assert manual.center2.eq(0).all()
    manual.update_center()
    whole = IBOTLoss(*schedule(local=0), **options)
    our_step(whole, output)(student, teacher, together(*parts), 0)
    for name in ("center", "center2"):
        torch.testing.assert_close(getattr(manual, name), getattr(whole, name), rtol=1e-5, atol=1e-6)
        assert getattr(whole, name).ne(0).any()


def together(one: Batch, other: Batch) -> Batch:
    """The images of both, view-major."""

    def join(a: Tensor, b: Tensor) -> Tensor:
        return torch.cat([part for pair in zip(a.chunk(GLOBAL), b.chunk(GLOBAL), strict=True) for part in pair])

    masks = [torch.cat(pair) for pair in zip(one.masks, other.masks, strict=True)]
    return Batch(join(one.crops, other.crops), None, join(one.views, other.views), masks)


def test_three_global_crops_of_one_image_and_no_local_one_equal_the_formula() -> None:
    student, teacher = heads(torch.float64)
    given = (*PROTOTYPES, 3, 0, *schedule()[4:])
    batch = make_batch(1, torch.float64, local=0, images=1)
    crops = torch.cat([batch.crops.detach(), batch.views[:1]]).requires_grad_()
    batch = Batch(crops, None, crops.detach() + 0.1, [torch.rand(1, SIDE, SIDE) < 0.5 for _ in range(3)])
    ours = our_step(IBOTLoss(*given).double())(student, teacher, batch, 0)
    published = published_step(PublishedIBOTLoss(*given).double())(twin_of(student), twin_of(teacher), batch, 0)
    for name, value in published.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-10, atol=0)
