"""Schedules against DINO's published arrays."""

from __future__ import annotations

import numpy as np
import pytest

from tests.pretrain.tiny import digits_config, loop_on
from vmf_pretrain.schedules import CosineSchedule

pytestmark = pytest.mark.quick

STEPS = 37


def published(start: float, end: float, steps: int, warmup_steps: int) -> np.ndarray:
    """DINO's ``cosine_scheduler``: one value for each step of the run."""
    warm_up = np.linspace(0, start, warmup_steps)
    rest = np.arange(steps - warmup_steps)
    return np.concatenate((warm_up, end + 0.5 * (start - end) * (1 + np.cos(np.pi * rest / max(len(rest), 1)))))


@pytest.mark.parametrize("warmup_steps", [0, 1, 2, 10, STEPS])
@pytest.mark.parametrize(("start", "end"), [(0.003, 1e-6), (0.04, 0.4), (0.996, 1.0)])
def test_schedule_equals_the_published_array(start: float, end: float, warmup_steps: int) -> None:
    schedule = CosineSchedule(start, end, STEPS, warmup_steps)
    got = np.array([schedule.at(step) for step in range(STEPS)])
    error = np.abs(got - published(start, end, STEPS, warmup_steps)).max()
    assert error <= 1e-12, f"off by {error:.1e}"


def test_end_is_held_after_the_last_step() -> None:
    schedule = CosineSchedule(0.5, 0.1, STEPS, 3)
    assert [schedule.at(step) for step in (STEPS, STEPS + 1, 10 * STEPS)] == [0.1, 0.1, 0.1]


def test_warm_up_as_long_as_the_run_never_divides_by_zero() -> None:
    schedule = CosineSchedule(1.0, 0.0, 4, 4)
    assert [schedule.at(step) for step in (0, 3, 4)] == [0.0, 1.0, 1.0]


@pytest.mark.parametrize(("warm_up", "epochs"), [(0, 3), (3, 7), (1, 2)])
def test_teacher_temperature_rises_in_a_line_and_stays(warm_up: int, epochs: int) -> None:
    config = digits_config(
        loss={"warmup_teacher_temp": 0.02, "teacher_temp": 0.06, "warmup_teacher_temp_epochs": warm_up},
        train={"epochs": epochs},
    )
    training = loop_on(config, 5 * 256)[0]
    published_array = np.concatenate((np.linspace(0.02, 0.06, warm_up), np.full(epochs - warm_up + 1, 0.06)))
    got = np.array(
        [training.method.rates(training.place(5 * epoch))["teacher_temperature"] for epoch in range(epochs + 1)]
    )
    assert np.allclose(got, published_array, atol=1e-12), f"{got.tolist()} instead of {published_array.tolist()}"


def test_rates_of_a_step_follow_the_configuration() -> None:
    optim = {
        "learning_rate": 0.01,
        "final_learning_rate": 0.001,
        "warmup_epochs": 1,
        "weight_decay": 0.1,
        "final_weight_decay": 0.2,
        "teacher_momentum": 0.9,
        "final_teacher_momentum": 0.99,
    }
    training = loop_on(digits_config(optim=optim), 5 * 256)[0]
    expected = {
        "learning_rate": published(0.01, 0.001, 10, 5),
        "weight_decay": published(0.1, 0.2, 10, 0),
        "teacher_momentum": published(0.9, 0.99, 10, 0),
    }
    for step in range(10):
        rates = training.rates(step)
        wrong = {
            name: (rates[name], array[step])
            for name, array in expected.items()
            if abs(rates[name] - array[step]) > 1e-12
        }
        assert not wrong, f"step {step}: got and expected {wrong}"
