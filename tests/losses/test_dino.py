"""The losses against the published formulas over five steps of training.

Both sides start from the same parameters and see the same batches; teachers follow their students, centres move, and every
loss, gradient and centre of every step is compared.

Legend: B images, V crops, K prototypes, D bottleneck dim.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.fuzz.statements.dino import PublishedDINOLoss, PublishedDINOvMFLoss
from tests.measure import worst_error
from tests.steps import (
    BUDGET,
    CROPS,
    DIM,
    DTYPES,
    IMAGES,
    IN_DIM,
    OUTPUTS,
    PROTOTYPES,
    SCHEDULE,
    SEEN,
    VMF_RULES,
    error_over_steps,
    networks,
    our_step,
    outputs,
    train,
)
from vmf_kernels import (
    DINOLoss,
    DINOvMFLoss,
    PrototypeLogits,
    linear_prototypes,
    weight_norm_prototypes,
)


@pytest.mark.quick
@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("prototypes", PROTOTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dino_equals_the_published_formula_over_steps(dtype: torch.dtype, prototypes: int, output: str) -> None:
    schedule = (prototypes, *SCHEDULE)
    error, name = error_over_steps(DINOLoss(*schedule), PublishedDINOLoss(*schedule), output, dtype)
    assert error <= BUDGET[dtype], f"{name}: relative error {error:.2e}, budget {BUDGET[dtype]:.0e}"


@pytest.mark.quick
@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize(("centering", "average"), VMF_RULES)
@pytest.mark.parametrize("prototypes", PROTOTYPES[1:])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dino_vmf_equals_the_published_formula_over_steps(
    dtype: torch.dtype, prototypes: int, centering: str, average: str, output: str
) -> None:
    schedule = (prototypes, *SCHEDULE)
    rule: dict[str, Any] = {"centering": centering, "center_average": average}
    ours, published = DINOvMFLoss(*schedule, **rule), PublishedDINOvMFLoss(*schedule, dim=DIM, **rule)
    error, name = error_over_steps(ours, published, output, dtype)
    assert error <= BUDGET[dtype], f"{name}: relative error {error:.2e}, budget {BUDGET[dtype]:.0e}"


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES)
def test_dino_with_frozen_norms_equals_the_published_formula_over_steps(dtype: torch.dtype) -> None:
    ours, published = DINOLoss(301, *SCHEDULE), PublishedDINOLoss(301, *SCHEDULE)
    error, name = error_over_steps(ours, published, "unstored", dtype, frozen_norm=True)
    assert error <= BUDGET[dtype], f"{name}: relative error {error:.2e}, budget {BUDGET[dtype]:.0e}"


class CenterDividedTwice(PublishedDINOLoss):
    def forward(self, student_logits: Tensor, teacher_logits: Tensor, epoch: int) -> Tensor:
        plain = self.center
        self.center = plain / self.teacher_temps[epoch]
        loss = super().forward(student_logits, teacher_logits, epoch)
        self.center = plain
        self.move_center(teacher_logits.detach().mean(dim=0, keepdim=True))
        return loss


class CenterMovedBeforeUse(PublishedDINOLoss):
    def forward(self, student_logits: Tensor, teacher_logits: Tensor, epoch: int) -> Tensor:
        self.move_center(teacher_logits.detach().mean(dim=0, keepdim=True))
        moved = self.center
        loss = super().forward(student_logits, teacher_logits, epoch)
        self.center = moved
        return loss


class ProbabilityCenterDivided(PublishedDINOvMFLoss):
    def forward(self, *arguments: Any) -> Tensor:
        used = self.center
        self.center = used / self.teacher_temps[arguments[2]]
        loss = super().forward(*arguments)
        self.center = self.center + self.center_momentum * (used - used / self.teacher_temps[arguments[2]])
        return loss


class StudentNormalizerForTheTeacher(PublishedDINOvMFLoss):
    def normalizer(self, norms: Tensor, temperature: float) -> Tensor:
        return super().normalizer(norms, self.student_temp)


class NormalizerWithoutGradient(PublishedDINOvMFLoss):
    def normalizer(self, norms: Tensor, temperature: float) -> Tensor:
        return super().normalizer(norms.detach(), temperature)


@pytest.mark.quick
@pytest.mark.parametrize("broken", [CenterDividedTwice, CenterMovedBeforeUse])
def test_a_broken_dino_formula_is_seen(broken: type[PublishedDINOLoss]) -> None:
    """Negative control of the comparison over steps."""
    error, _ = error_over_steps(DINOLoss(301, *SCHEDULE), broken(301, *SCHEDULE), "unstored", torch.float32)
    assert error > SEEN * BUDGET[torch.float32], f"{broken.__name__} passes: relative error {error:.2e}"


@pytest.mark.quick
@pytest.mark.parametrize(
    "broken", [ProbabilityCenterDivided, StudentNormalizerForTheTeacher, NormalizerWithoutGradient]
)
def test_a_broken_dino_vmf_formula_is_seen(broken: type[PublishedDINOvMFLoss]) -> None:
    """Negative control of the comparison over steps: the second takes the student's temperature for the teacher (T3)."""
    published = broken(301, *SCHEDULE, dim=DIM)
    error, _ = error_over_steps(DINOvMFLoss(301, *SCHEDULE), published, "unstored", torch.float32)
    assert error > SEEN * BUDGET[torch.float32], f"{broken.__name__} passes: relative error {error:.2e}"


@pytest.mark.quick
@pytest.mark.filterwarnings("ignore:DINO-vMF is on but")
@pytest.mark.parametrize("output", OUTPUTS)
def test_dino_vmf_with_norms_at_one_equals_dino(output: str) -> None:
    losses = DINOLoss(301, *SCHEDULE), DINOvMFLoss(301, *SCHEDULE, centering="logit")
    records = []
    for loss in losses:
        torch.manual_seed(0)
        student, teacher = networks(301, torch.float64, frozen_norm=True)
        records.append(train(student, teacher, loss.double(), our_step(loss, output), torch.float64))
    error, name = worst_error(records[1], records[0])
    assert error <= 1e-10, f"{name}: relative error {error:.2e}, budget 1e-10"


@pytest.mark.quick
@pytest.mark.filterwarnings("ignore:DINO-vMF is on but")
def test_probability_centering_with_norms_at_one_differs_from_dino_in_the_center_only() -> None:
    student, teacher = outputs(frozen_norm=True)
    dino = DINOLoss(50, *SCHEDULE)
    vmf = DINOvMFLoss(50, *SCHEDULE)
    first = dino(student, teacher, 0), vmf(student, teacher, 0)
    second = dino(student, teacher, 0), vmf(student, teacher, 0)
    torch.testing.assert_close(first[1], first[0], rtol=1e-5, atol=0)
    assert abs(second[0] - second[1]) > 1e-3, f"both centres gave {second[0].item():.6f}"


@pytest.mark.quick
@pytest.mark.parametrize("output", OUTPUTS)
def test_dino_vmf_warns_once_of_frozen_norms(output: str) -> None:
    networks_, loss = networks(50, torch.float32, frozen_norm=True), DINOvMFLoss(50, *SCHEDULE)
    batch = torch.randn(CROPS * IMAGES, IN_DIM), torch.randn(2 * IMAGES, IN_DIM)
    step = our_step(loss, output)
    with pytest.warns(UserWarning, match=r"norms are frozen \(norm_last_layer=True\).*use norm_last_layer=False"):
        step(*networks_, *batch, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(*networks_, *batch, 1)


@pytest.mark.quick
@pytest.mark.parametrize("output", OUTPUTS)
def test_dino_vmf_does_not_warn_of_free_norms(output: str) -> None:
    networks_, loss = networks(50, torch.float32), DINOvMFLoss(50, *SCHEDULE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        our_step(loss, output)(*networks_, torch.randn(CROPS * IMAGES, IN_DIM), torch.randn(2 * IMAGES, IN_DIM), 0)


@pytest.mark.quick
@pytest.mark.parametrize("loss_class", [DINOLoss, DINOvMFLoss])
@pytest.mark.parametrize("output", OUTPUTS)
def test_the_teacher_gets_no_gradient(loss_class: type[DINOLoss], output: str) -> None:
    student, teacher = networks(50, torch.float32)
    teacher.requires_grad_(True)
    loss = loss_class(50, *SCHEDULE)
    our_step(loss, output)(
        student, teacher, torch.randn(CROPS * IMAGES, IN_DIM), torch.randn(2 * IMAGES, IN_DIM), 0
    ).backward()
    touched = [name for name, parameter in teacher.named_parameters() if parameter.grad is not None]
    assert not touched, f"the teacher's {', '.join(touched)} got a gradient"
    assert all(parameter.grad is not None for parameter in student.parameters())


@pytest.mark.quick
def test_features_get_their_gradient_from_a_frozen_layer() -> None:
    """Freezing the last layer (DINO's first epoch) must not cut the features off."""
    student, teacher = networks(50, torch.float32)
    batch = torch.randn(CROPS * IMAGES, IN_DIM), torch.randn(2 * IMAGES, IN_DIM)
    step = our_step(DINOLoss(50, *SCHEDULE), "unstored")
    (free,) = torch.autograd.grad(step(student, teacher, *batch, 0), [student.mlp[0].weight])  # type: ignore[index]
    student.last_layer.requires_grad_(False)
    step = our_step(DINOLoss(50, *SCHEDULE), "unstored")
    (frozen,) = torch.autograd.grad(step(student, teacher, *batch, 0), [student.mlp[0].weight])  # type: ignore[index]
    torch.testing.assert_close(frozen, free)


@pytest.mark.quick
@pytest.mark.parametrize("output", OUTPUTS)
def test_statistics_add_up_to_the_loss(output: str) -> None:
    student, teacher = networks(50, torch.float64)
    loss = DINOLoss(50, *SCHEDULE).double()
    value = our_step(loss, output)(
        student, teacher, torch.randn(15, IN_DIM).double(), torch.randn(6, IN_DIM).double(), 0
    )
    statistics = loss.statistics
    assert statistics is not None
    torch.testing.assert_close(statistics.teacher_entropy + statistics.kl, value.detach())
    torch.testing.assert_close(statistics.usage.sum(), torch.ones((), dtype=torch.float64))
    assert 0 <= statistics.mutual_information <= torch.tensor(50.0).log()
    assert not any(t.requires_grad for t in vars(statistics).values())


@pytest.mark.quick
def test_rows_in_more_than_one_dim_give_the_published_mean() -> None:
    student, teacher = torch.randn(5 * 2, 3, 50), torch.randn(2 * 2, 3, 50)
    published = PublishedDINOLoss(50, *SCHEDULE)(student, teacher, 0)
    torch.testing.assert_close(DINOLoss(50, *SCHEDULE)(student, teacher, 0), published)


@pytest.mark.quick
def test_a_batch_without_images_gives_no_loss_and_leaves_the_center() -> None:
    student, teacher = networks(50, torch.float32)
    loss = DINOvMFLoss(50, *SCHEDULE)
    value = loss(student(torch.zeros(0, IN_DIM)), teacher(torch.zeros(0, IN_DIM)), 0)
    assert value == 0
    assert loss.center.eq(0).all()


@pytest.mark.quick
def test_teacher_temperature_follows_the_published_schedule() -> None:
    loss = DINOLoss(5, 2, 0.04, 0.07, 4, 6)
    expected = [0.04, 0.05, 0.06, 0.07, 0.07, 0.07]  # the last warm-up epoch already has the final value
    assert loss.teacher_temp_schedule == pytest.approx(expected)
    assert DINOLoss(5, 2, 0.04, 0.05, 0, 2).teacher_temp_schedule.tolist() == [0.05, 0.05]
    assert DINOLoss(5, 2, 0.03, 0.05, 1, 2).teacher_temp_schedule.tolist() == [0.03, 0.05]


@pytest.mark.quick
@pytest.mark.parametrize("loss_class", [DINOLoss, DINOvMFLoss])
def test_state_dict_holds_the_center_alone_and_loads_back(loss_class: type[DINOLoss]) -> None:
    loss, other = loss_class(50, *SCHEDULE), loss_class(50, *SCHEDULE)
    loss(*outputs(), 0)
    state = loss.state_dict()
    other.load_state_dict(state)
    assert list(state) == ["center"]
    assert torch.equal(other.center, loss.center)
    assert loss.center.ne(0).any()


@pytest.mark.quick
def test_state_dict_of_a_module_that_holds_the_loss_loads_back() -> None:
    holder, other = (nn.ModuleDict({"loss": DINOLoss(50, *SCHEDULE)}) for _ in range(2))
    holder["loss"](*outputs(), 0)
    other.load_state_dict(holder.state_dict())
    assert list(holder.state_dict()) == ["loss.center"]
    assert torch.equal(other["loss"].center, holder["loss"].center)  # type: ignore[arg-type]


@pytest.mark.parametrize("loss_class", [DINOLoss, DINOvMFLoss])
def test_logits_may_enter_the_compiled_loss_from_outside(loss_class: type[DINOLoss]) -> None:
    """Frozen norms, whose warning cannot be traced, included."""
    student, teacher = outputs(frozen_norm=True)
    torch.compiler.reset()
    compiled = torch.compile(loss_class(50, *SCHEDULE), fullgraph=True, backend="aot_eager")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "DINO-vMF is on but")
        expected = loss_class(50, *SCHEDULE)(student, teacher, 0)
    torch.testing.assert_close(compiled(student, teacher, 0), expected)


@pytest.mark.quick
def test_center_start_first_batch_begins_at_its_mean() -> None:
    student, teacher = outputs()
    loss = DINOLoss(50, *SCHEDULE, center_start="first_batch")
    reference = DINOLoss(50, *SCHEDULE)
    reference.load_state_dict({"center": teacher.materialize().mean(dim=0, keepdim=True)})
    torch.testing.assert_close(loss(student, teacher, 0), reference(student, teacher, 0))
    torch.testing.assert_close(loss.center, teacher.materialize().mean(dim=0, keepdim=True))


@pytest.mark.quick
def test_norms_given_for_plain_logits_may_be_of_any_free_kind() -> None:
    features = [functional.normalize(torch.randn(rows, DIM), dim=1) for rows in (15, 6)]
    g, v = torch.rand(50, 1) + 0.5, torch.randn(50, DIM)
    under_norm = weight_norm_prototypes(g, v)
    losses = []
    for kept in (under_norm, linear_prototypes(under_norm.effective_weight())):
        logits = [PrototypeLogits(x, kept).materialize() for x in features]
        losses.append(
            DINOvMFLoss(50, *SCHEDULE)(*logits, 0, student_prototypes=kept, teacher_prototypes=kept),
        )
    torch.testing.assert_close(losses[0], losses[1])
