"""One step of a run, against the published loop and its own promises."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.fuzz.statements.dino import PublishedDINOLoss
from tests.measure import worst_error
from tests.pretrain.tiny import batch_of, copied, differing, digits_config, dino_of, loop_on, numbers_of
from vmf_kernels import DINOHead, DINOLoss, DINOvMFHead, DINOvMFLoss, KoLeoLoss
from vmf_pretrain.data.batch import Batch
from vmf_pretrain.data.batches import ViewBatches
from vmf_pretrain.engine.loop import Loop

pytestmark = pytest.mark.quick

METHODS = ["dino-vmf", "dino"]
PROTOTYPES = ("head.last_layer.weight_g", "head.last_layer.weight_v")
FRESH = {"warmup_epochs": 0, "freeze_last_layer_epochs": 0}  # the first step moves everything


def small(**sections: Any) -> tuple[Loop, ViewBatches]:
    """2 steps of 32 digits in each of 2 epochs."""
    return loop_on(digits_config(**{"data": {"batch_size": 32}, **sections}), 64)


def parameters(module: nn.Module) -> dict[str, Tensor]:
    return copied(dict(module.named_parameters()))


@pytest.mark.parametrize("method", METHODS)
def test_loss_falls_on_a_batch_that_is_seen_again_and_again(method: str) -> None:
    training, batches = small(method=method, optim={**FRESH, "teacher_momentum": 1.0}, train={"epochs": 20})
    batch = batch_of(batches, 0)
    losses = [numbers_of(training, step, batch)["loss"] for step in range(30)]
    first, last = sum(losses[:3]) / 3, sum(losses[-3:]) / 3
    assert last < 0.8 * first, f"{first:.3f} at first and {last:.3f} after 30 steps"


@pytest.mark.parametrize("method", METHODS)
def test_method_chooses_the_loss_and_whether_norms_learn(method: str) -> None:
    training, batches = small(method=method, optim=FRESH)
    for step in range(3):
        training.step(step, batch_of(batches, step))
    moved = (dino_of(training).student.head.last_layer.weight_g - 1).abs().max().item()
    assert type(dino_of(training).loss) is (DINOvMFLoss if method == "dino-vmf" else DINOLoss)
    assert type(dino_of(training).teacher.head) is (DINOvMFHead if method == "dino-vmf" else DINOHead)
    assert (moved > 1e-4) == (method == "dino-vmf"), f"norms moved by {moved:.1e} with {method}"


def test_step_equals_the_published_loop() -> None:
    training, batches = small(
        method="dino", loss={"center_start": "zero", "koleo_weight": 0.3}, optim={**FRESH, "clip": 0.05}
    )
    # fp64: some gradients are 0 but for rounding (a bias before a softmax or a batch norm), and AdamW divides by their size
    for part in (dino_of(training).student, dino_of(training).teacher, dino_of(training).loss):
        part.double()
    clip = training.config.optim.clip
    student, teacher = copy.deepcopy(dino_of(training).student), copy.deepcopy(dino_of(training).teacher)
    loss = PublishedDINOLoss(32, 3, 0.02, 0.025, 1, 2, 0.1, 0.9).double()
    optimizer = torch.optim.AdamW(student.parameters(), weight_decay=0.0)
    decayed = [value for value in student.parameters() if value.ndim > 1 and value.requires_grad]
    for step in range(3):
        batch = batch_of(batches, step).to(torch.device("cpu"), torch.float64)
        views = batch.views
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
        momentum = dino_of(training).momentum.at(step)
        with torch.no_grad():
            for average, value in zip(teacher.parameters(), student.parameters(), strict=True):
                average.mul_(momentum).add_(value, alpha=1 - momentum)
        training.step(step, batch)
    error = 0.0
    for ours, theirs in ((dino_of(training).student, student), (dino_of(training).teacher, teacher)):
        pairs = zip(ours.parameters(), theirs.parameters(), strict=True)
        error = max(error, *((one - other).abs().max().item() for one, other in pairs))
    assert error < 1e-8, f"a weight is off by {error:.1e} after 3 steps of about {training.learning_rate.start}"


@pytest.mark.parametrize("method", METHODS)
def test_prototypes_stand_still_while_frozen_and_move_afterwards(method: str) -> None:
    training, batches = small(method=method, optim={"warmup_epochs": 0, "freeze_last_layer_epochs": 1})
    start = parameters(dino_of(training).student)
    for step in range(batches.steps_per_epoch):
        training.step(step, batch_of(batches, step))
    frozen = parameters(dino_of(training).student)
    training.step(2, batch_of(batches, 2))
    afterwards = parameters(dino_of(training).student)
    still = [name for name in start if torch.equal(start[name], frozen[name])]
    norms_rest = ["head.last_layer.weight_g"] if method == "dino" else []
    assert set(still) & set(PROTOTYPES) == set(PROTOTYPES), "frozen prototypes moved"
    assert len(still) < len(start) / 2, f"these did not move either: {still}"
    assert [name for name in PROTOTYPES if torch.equal(frozen[name], afterwards[name])] == norms_rest


def test_teacher_is_the_running_mean_of_the_student_at_the_scheduled_momentum() -> None:
    training, batches = small(optim={**FRESH, "teacher_momentum": 0.5, "final_teacher_momentum": 0.9})
    expected = parameters(dino_of(training).teacher)
    for step in range(4):
        training.step(step, batch_of(batches, step))
        momentum = 0.9 - 0.4 * 0.5 * (1 + math.cos(math.pi * step / 4))
        for name, value in dino_of(training).student.named_parameters():
            expected[name] = momentum * expected[name] + (1 - momentum) * value.detach()
    error, name = worst_error(parameters(dino_of(training).teacher), expected)
    assert error < 1e-5, f"{name} is off by {error:.1e}"


def test_teacher_never_has_a_gradient() -> None:
    training, batches = small()
    training.step(0, batch_of(batches, 0))
    assert not [name for name, value in dino_of(training).teacher.named_parameters() if value.grad is not None]
    assert [name for name, value in dino_of(training).student.named_parameters() if value.grad is not None]


def test_optimizer_gets_the_rates_of_the_step() -> None:
    training, batches = small()
    for step in range(4):
        training.step(step, batch_of(batches, step))
        rates = training.rates(step)
        decayed, plain = training.optimizer.param_groups
        assert decayed["lr"] == plain["lr"] == rates["learning_rate"]
        assert (decayed["weight_decay"], plain["weight_decay"]) == (rates["weight_decay"], 0.0)


def test_koleo_spreads_the_students_features_of_each_global_view_by_itself() -> None:
    training, batches = small(loss={"koleo_weight": 0.5}, views={"local_count": 2})
    batch = batch_of(batches, 0)
    features, _ = copy.deepcopy(dino_of(training).student)(batch.views)
    expected = (KoLeoLoss()(features[:32]) + KoLeoLoss()(features[32:64])).item()
    together = 2 * KoLeoLoss()(features[:64]).item()
    got = numbers_of(training, 0, batch)["koleo"]
    assert abs(got - expected) < 1e-4, f"{got:.5f} instead of {expected:.5f}"
    assert abs(got - together) > 1e-2, "both views together give the same: this test shows nothing"


def test_koleo_moves_the_student_by_its_weight() -> None:
    trained = {}
    for weight in (0.0, 0.5):
        training, batches = small(loss={"koleo_weight": weight}, optim=FRESH)
        numbers = numbers_of(training, 0, batch_of(batches, 0))
        trained[weight] = parameters(dino_of(training).student)
        assert (numbers["koleo"] == 0.0) == (weight == 0.0)
    assert differing(trained[0.0], trained[0.5]), "the weight of KoLeo changes nothing"


def test_step_does_not_depend_on_the_global_generator() -> None:
    results = []
    for seed in (1, 2):
        training, batches = small(backbone={"drop_path": 0.5, "depth": 2}, optim=FRESH)
        torch.manual_seed(seed)
        training.step(0, batch_of(batches, 0))
        results.append(parameters(dino_of(training).student))
    assert differing(*results) == []


def test_stochastic_depth_draws_anew_at_every_step() -> None:
    training, batches = small(backbone={"drop_path": 0.5, "depth": 2}, optim={**FRESH, "learning_rate": 1e-30})
    batch = batch_of(batches, 0)
    losses = {numbers_of(training, step, batch)["koleo"] for step in range(4)}
    assert len(losses) > 1, f"four steps dropped the same paths: {losses}"


def test_numbers_of_a_step_fit_together() -> None:
    training, batches = small()
    numbers = numbers_of(training, 0, batch_of(batches, 0))
    entropy, kl = numbers["teacher_entropy"], numbers["kl"]
    assert abs(entropy + kl - numbers["loss"]) < 1e-4 * numbers["loss"], f"H(q) {entropy} + KL {kl}: {numbers['loss']}"
    assert 0 <= entropy <= math.log(32)
    assert 0 <= numbers["mutual_information"] <= math.log(32)
    assert numbers["gradient_norm"] > 0


def break_views(training: Loop, batch: Batch) -> None:
    batch.views[0][3] = math.nan


def break_gradient(training: Loop, batch: Batch) -> None:
    """The loss stays finite."""
    weight = next(iter(dino_of(training).student.backbone.parameters()))

    def broken(gradient: Tensor) -> Tensor:
        handle.remove()
        return gradient * math.inf

    handle = weight.register_hook(broken)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("start", [0, 1], ids=["the first step", "a later step"])
@pytest.mark.parametrize("spoil", [break_views, break_gradient])
def test_step_that_is_not_finite_is_skipped_and_changes_no_bit(
    spoil: Callable[[Loop, Batch], None], start: int, method: str
) -> None:
    training, batches = small(method=method, optim=FRESH)
    for step in range(start):
        training.step(step, batch_of(batches, step))
    before, bad = copied(training.method.state_dict()), batch_of(batches, start)
    optimizer = copied(training.tensors()["optimizer"])
    spoil(training, bad)
    (taken,) = training.step(start, bad)
    assert taken.counts.not_finite == 1
    assert taken.counts.bad_losses == (spoil is break_views)
    assert differing(copied(training.method.state_dict()), before) == []
    assert differing(copied(training.tensors()["optimizer"]), optimizer) == []
    again, _ = small(method=method, optim=FRESH)
    for step in range(start):
        again.step(step, batch_of(batches, step))
    for each in (training, again):  # as if the step had not been
        each.step(start + 1, batch_of(batches, start + 1))
    assert differing(copied(training.method.state_dict()), copied(again.method.state_dict())) == []


def test_step_that_is_read_late_is_the_same_step() -> None:
    """What a GPU does without waiting, on a CPU: the same losses but for the rounding of the fused optimizer."""
    losses = {}
    for late in (False, True):
        training, batches = loop_on(digits_config(data={"batch_size": 32}, optim=FRESH), 64, late=late)
        taken = []
        for step in range(4):
            batch = batch_of(batches, step)
            if step == 2:
                break_views(training, batch)
            taken += training.step(step, batch)
        taken += training.drain()
        assert [(one.step, one.counts.not_finite) for one in taken] == [(0, 0), (1, 0), (2, 1), (3, 0)]
        losses[late] = [one.numbers["total"] for one in taken]
    assert [math.isnan(loss) for loss in losses[True]] == [False, False, True, False]
    assert losses[True] == pytest.approx(losses[False], rel=1e-4, nan_ok=True)
    assert losses[True][3] != pytest.approx(losses[True][0], rel=1e-2), "nothing was learned: this shows nothing"


@pytest.mark.parametrize("done", [0, 1])
@pytest.mark.parametrize("spoil", [break_views, break_gradient])
def test_late_step_that_is_not_finite_changes_no_bit(spoil: Callable[[Loop, Batch], None], done: int) -> None:
    training, batches = loop_on(digits_config(data={"batch_size": 32}, optim=FRESH), 64, late=True)
    for step in range(done):
        training.step(step, batch_of(batches, step))
    before = copied({**training.method.state_dict(), **training.tensors()["optimizer"]})
    bad = batch_of(batches, 1)
    spoil(training, bad)
    training.step(1, bad)
    after = copied({**training.method.state_dict(), **training.tensors()["optimizer"]})
    assert differing(after, before) == []
    training.step(2, batch_of(batches, 2))
    assert training.drain()[-1].counts.not_finite == 0, "a step that was skipped spoilt the next one"


def test_same_seed_gives_the_same_start_and_another_seed_another() -> None:
    torch.manual_seed(5)
    first = parameters(dino_of(small()[0]).student)
    torch.manual_seed(6)
    assert differing(first, parameters(dino_of(small()[0]).student)) == []
    assert differing(first, parameters(dino_of(small(seed=1)[0]).student)), "another seed starts with the same weights"
