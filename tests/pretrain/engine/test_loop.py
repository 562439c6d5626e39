"""One step of a run, against the published loop and its own promises."""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.measure import worst_error
from tests.pretrain.tiny import copied, differing, digits_config, training_on, views_of
from tests.published import PublishedDINOLoss
from vmf_kernels import DINOHead, DINOLoss, DINOvMFHead, DINOvMFLoss, KoLeoLoss
from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.data.batches import ViewBatches
from vmf_pretrain.engine.loop import Training

pytestmark = pytest.mark.quick

METHODS = ["dino-vmf", "dino"]
PROTOTYPES = ("head.last_layer.weight_g", "head.last_layer.weight_v")
FRESH = {"warmup_epochs": 0, "freeze_last_layer_epochs": 0}  # the first step moves everything


def small(**sections: Any) -> tuple[Training, ViewBatches]:
    """2 steps of 32 digits in each of 2 epochs."""
    return training_on(digits_config(**{"data": {"batch_size": 32}, **sections}), 64)


def parameters(module: nn.Module) -> dict[str, Tensor]:
    return copied(dict(module.named_parameters()))


@pytest.mark.parametrize("method", METHODS)
def test_loss_falls_on_a_batch_that_is_seen_again_and_again(method: str) -> None:
    training, batches = small(method=method, optim={**FRESH, "teacher_momentum": 1.0}, train={"epochs": 20})
    views = views_of(batches, 0)
    losses = [training.step(step, views)["loss"].item() for step in range(30)]
    first, last = sum(losses[:3]) / 3, sum(losses[-3:]) / 3
    assert last < 0.8 * first, f"{first:.3f} at first and {last:.3f} after 30 steps"


@pytest.mark.parametrize("method", METHODS)
def test_method_chooses_the_loss_and_whether_norms_learn(method: str) -> None:
    training, batches = small(method=method, optim=FRESH)
    for step in range(3):
        training.step(step, views_of(batches, step))
    moved = (training.student.head.last_layer.weight_g - 1).abs().max().item()
    assert type(training.loss) is (DINOvMFLoss if method == "dino-vmf" else DINOLoss)
    assert type(training.teacher.head) is (DINOvMFHead if method == "dino-vmf" else DINOHead)
    assert (moved > 1e-4) == (method == "dino-vmf"), f"norms moved by {moved:.1e} with {method}"


def test_step_equals_the_published_loop() -> None:
    training, batches = small(
        method="dino", loss={"center_start": "zero", "koleo_weight": 0.3}, optim={**FRESH, "clip": 0.05}
    )
    # fp64: some gradients are 0 but for rounding (a bias before a softmax or a batch norm), and AdamW divides by their size
    for part in (training.student, training.teacher, training.loss):
        part.double()
    clip = training.config.optim.clip
    student, teacher = copy.deepcopy(training.student), copy.deepcopy(training.teacher)
    loss = PublishedDINOLoss(32, 3, 0.02, 0.025, 1, 2, 0.1, 0.9).double()
    optimizer = torch.optim.AdamW(student.parameters(), weight_decay=0.0)
    decayed = [value for value in student.parameters() if value.ndim > 1 and value.requires_grad]
    for step in range(3):
        views = [view.double() for view in views_of(batches, step)]
        features, logits = student(views)
        koleo = sum(KoLeoLoss()(features[32 * view : 32 * (view + 1)]) for view in (0, 1))
        total = loss(logits.materialize(), teacher(views[:2])[1].materialize(), step // 2) + 0.3 * koleo
        optimizer.zero_grad()
        total.backward()
        rate, decay = training.learning_rate.at(step), training.weight_decay.at(step)
        with torch.no_grad():
            for value in student.parameters():
                if value.grad is not None:
                    value.grad.mul_(min(1.0, clip / (value.grad.norm().item() + 1e-6)))
            for value in decayed:
                value.mul_(1 - rate * decay)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        momentum = training.momentum.at(step)
        with torch.no_grad():
            for average, value in zip(teacher.parameters(), student.parameters(), strict=True):
                average.mul_(momentum).add_(value, alpha=1 - momentum)
        training.step(step, views)
    error = 0.0
    for ours, theirs in ((training.student, student), (training.teacher, teacher)):
        pairs = zip(ours.parameters(), theirs.parameters(), strict=True)
        error = max(error, *((one - other).abs().max().item() for one, other in pairs))
    assert error < 1e-8, f"a weight is off by {error:.1e} after 3 steps of about {training.learning_rate.start}"


@pytest.mark.parametrize("method", METHODS)
def test_prototypes_stand_still_while_frozen_and_move_afterwards(method: str) -> None:
    training, batches = small(method=method, optim={"warmup_epochs": 0, "freeze_last_layer_epochs": 1})
    start = parameters(training.student)
    for step in range(batches.steps_per_epoch):
        training.step(step, views_of(batches, step))
    frozen = parameters(training.student)
    training.step(2, views_of(batches, 2))
    afterwards = parameters(training.student)
    still = [name for name in start if torch.equal(start[name], frozen[name])]
    norms_rest = ["head.last_layer.weight_g"] if method == "dino" else []
    assert set(still) & set(PROTOTYPES) == set(PROTOTYPES), "frozen prototypes moved"
    assert len(still) < len(start) / 2, f"these did not move either: {still}"
    assert [name for name in PROTOTYPES if torch.equal(frozen[name], afterwards[name])] == norms_rest


def test_teacher_is_the_running_mean_of_the_student_at_the_scheduled_momentum() -> None:
    training, batches = small(optim={**FRESH, "teacher_momentum": 0.5, "final_teacher_momentum": 0.9})
    expected = parameters(training.teacher)
    for step in range(4):
        training.step(step, views_of(batches, step))
        momentum = 0.9 - 0.4 * 0.5 * (1 + math.cos(math.pi * step / 4))
        for name, value in training.student.named_parameters():
            expected[name] = momentum * expected[name] + (1 - momentum) * value.detach()
    error, name = worst_error(parameters(training.teacher), expected)
    assert error < 1e-5, f"{name} is off by {error:.1e}"


def test_teacher_never_has_a_gradient() -> None:
    training, batches = small()
    training.step(0, views_of(batches, 0))
    assert not [name for name, value in training.teacher.named_parameters() if value.grad is not None]
    assert [name for name, value in training.student.named_parameters() if value.grad is not None]


def test_optimizer_gets_the_rates_of_the_step() -> None:
    training, batches = small()
    for step in range(4):
        training.step(step, views_of(batches, step))
        rates = training.rates(step)
        decayed, plain = training.optimizer.param_groups
        assert decayed["lr"] == plain["lr"] == rates["learning_rate"]
        assert (decayed["weight_decay"], plain["weight_decay"]) == (rates["weight_decay"], 0.0)


def test_koleo_spreads_the_students_features_of_each_global_view_by_itself() -> None:
    training, batches = small(loss={"koleo_weight": 0.5}, views={"local_count": 2})
    views = views_of(batches, 0)
    features, _ = copy.deepcopy(training.student)(views)
    expected = (KoLeoLoss()(features[:32]) + KoLeoLoss()(features[32:64])).item()
    together = 2 * KoLeoLoss()(features[:64]).item()
    got = training.step(0, views)["koleo"].item()
    assert abs(got - expected) < 1e-4, f"{got:.5f} instead of {expected:.5f}"
    assert abs(got - together) > 1e-2, "both views together give the same: this test shows nothing"


def test_koleo_moves_the_student_by_its_weight() -> None:
    trained = {}
    for weight in (0.0, 0.5):
        training, batches = small(loss={"koleo_weight": weight}, optim=FRESH)
        numbers = training.step(0, views_of(batches, 0))
        trained[weight] = parameters(training.student)
        assert (numbers["koleo"].item() == 0.0) == (weight == 0.0)
    assert differing(trained[0.0], trained[0.5]), "the weight of KoLeo changes nothing"


def test_step_does_not_depend_on_the_global_generator() -> None:
    results = []
    for seed in (1, 2):
        training, batches = small(backbone={"drop_path": 0.5, "depth": 2}, optim=FRESH)
        torch.manual_seed(seed)
        training.step(0, views_of(batches, 0))
        results.append(parameters(training.student))
    assert differing(*results) == []


def test_stochastic_depth_draws_anew_at_every_step() -> None:
    training, batches = small(backbone={"drop_path": 0.5, "depth": 2}, optim={**FRESH, "learning_rate": 1e-30})
    views = views_of(batches, 0)
    losses = {training.step(step, views)["koleo"].item() for step in range(4)}
    assert len(losses) > 1, f"four steps dropped the same paths: {losses}"


def test_numbers_of_a_step_fit_together() -> None:
    training, batches = small()
    numbers = {name: value.item() for name, value in training.step(0, views_of(batches, 0)).items()}
    entropy, kl = numbers["teacher_entropy"], numbers["kl"]
    assert abs(entropy + kl - numbers["loss"]) < 1e-4 * numbers["loss"], f"H(q) {entropy} + KL {kl}: {numbers['loss']}"
    assert 0 <= entropy <= math.log(32)
    assert 0 <= numbers["mutual_information"] <= math.log(32)
    assert numbers["gradient_norm"] > 0


def state_of(training: Training) -> dict[str, Tensor]:
    """Parameters of both networks, the optimizer's state and the centre."""
    networks = {"student": training.student, "teacher": training.teacher}
    found = {f"{name}.{key}": value for name, part in networks.items() for key, value in part.named_parameters()}
    tensors = training.tensors()
    return copied(
        found | {f"{part}.{key}": tensors[part][key] for part in ("optimizer", "loss") for key in tensors[part]}
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_loss_that_is_not_finite_stops_the_run_and_changes_nothing(method: str, broken: float) -> None:
    training, batches = small(method=method, optim=FRESH)
    training.step(0, views_of(batches, 0))
    before, views = state_of(training), views_of(batches, 1)
    views[0][3] = broken
    with pytest.raises(PretrainError, match=r"the loss is nan at step 1; lower optim\.learning_rate"):
        training.step(1, views)
    assert differing(state_of(training), before) == []


@pytest.mark.parametrize("clip", [0.0, 3.0])
def test_gradient_that_is_not_finite_stops_the_run_and_changes_no_weight(clip: float) -> None:
    training, batches = small(optim={**FRESH, "clip": clip})
    training.step(0, views_of(batches, 0))
    before = state_of(training)
    some_weight = next(iter(training.student.backbone.parameters()))
    some_weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(PretrainError, match=r"the gradient's norm is (nan|inf) at step 1"):
        training.step(1, views_of(batches, 1))
    changed = [name for name in differing(state_of(training), before) if not name.startswith("loss.")]
    assert changed == [], f"changed: {changed}"


def test_same_seed_gives_the_same_start_and_another_seed_another() -> None:
    torch.manual_seed(5)
    first = parameters(small()[0].student)
    torch.manual_seed(6)
    assert differing(first, parameters(small()[0].student)) == []
    assert differing(first, parameters(small(seed=1)[0].student)), "another seed starts with the same weights"
