"""The optimizer's state in a checkpoint: it comes back bit for bit, or is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.pretrain.saved import assert_same_bits, quiet_load
from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.storage.checkpoint import save_checkpoint
from vmf_pretrain.storage.optimizer_state import flatten_optimizer, optimizer_targets, restore_optimizer

pytestmark = pytest.mark.quick


def small_model() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 5), nn.GELU(), nn.Linear(5, 2))


def first_weight(model: nn.Sequential) -> nn.Parameter:
    return model[0].get_parameter("weight")


def adamw(model: nn.Module) -> torch.optim.AdamW:
    decayed: dict[str, Any] = {"params": [value for value in model.parameters() if value.ndim != 1]}
    plain = {"params": [value for value in model.parameters() if value.ndim == 1], "weight_decay": 0.0}
    return torch.optim.AdamW([decayed, plain], lr=0.01, weight_decay=0.1)


def train(model: nn.Sequential, optimizer: torch.optim.Optimizer, steps: range, *, frozen: int = 0) -> None:
    """Steps on inputs that depend on the step only; in the first ``frozen`` the last layer gets no gradient."""
    for step in steps:
        optimizer.zero_grad()
        model(torch.randn(4, 3, generator=torch.Generator().manual_seed(step))).square().sum().backward()
        if step < frozen:
            for parameter in model[2].parameters():
                parameter.grad = None
        optimizer.step()


@pytest.mark.parametrize("frozen", [0, 3, 10], ids=["all-moving", "thawed-at-3", "frozen-at-the-save"])
def test_training_goes_on_from_a_checkpoint_bit_for_bit(tmp_path: Path, frozen: int) -> None:
    through = small_model()
    optimizer = adamw(through)
    train(through, optimizer, range(5), frozen=frozen)
    tensors = {"student": dict(through.state_dict()), "optimizer": flatten_optimizer(optimizer)}
    save_checkpoint(tmp_path, 5, tensors, {}, keep=1)
    train(through, optimizer, range(5, 15), frozen=frozen)

    resumed, loaded = small_model(), quiet_load(tmp_path)
    resumed.load_state_dict(loaded.tensors["student"])
    fresh = adamw(resumed)
    restore_optimizer(fresh, loaded.tensors["optimizer"])
    train(resumed, fresh, range(5, 15), frozen=frozen)
    assert_same_bits(dict(resumed.state_dict()), dict(through.state_dict()))
    assert_same_bits(flatten_optimizer(fresh), flatten_optimizer(optimizer))


def test_forgetting_the_optimizer_would_be_noticed() -> None:
    through, forgetful = small_model(), small_model()
    optimizer = adamw(through)
    train(through, optimizer, range(5))
    forgetful.load_state_dict(through.state_dict())
    train(through, optimizer, range(5, 8))
    train(forgetful, adamw(forgetful), range(5, 8))
    difference = (first_weight(through) - first_weight(forgetful)).abs().max().item()
    assert difference > 1e-4, f"weights differ by only {difference}"


def test_parameters_without_state_have_no_entries_and_lose_what_they_had() -> None:
    model = small_model()
    optimizer = adamw(model)
    assert flatten_optimizer(optimizer) == {}
    train(model, optimizer, range(2))
    restore_optimizer(optimizer, {})
    assert not optimizer.state, f"{len(optimizer.state)} parameters still have state"


def test_restoring_copies() -> None:
    model = small_model()
    optimizer = adamw(model)
    train(model, optimizer, range(2))
    tensors = {name: tensor.clone() for name, tensor in flatten_optimizer(optimizer).items()}
    kept = {name: tensor.clone() for name, tensor in tensors.items()}
    restore_optimizer(optimizer, tensors)
    train(model, optimizer, range(2, 4))
    assert_same_bits(tensors, kept)


def test_a_state_that_does_not_fit_is_refused_with_every_name_and_changes_nothing() -> None:
    model = small_model()
    optimizer = adamw(model)
    train(model, optimizer, range(2))
    before = {name: tensor.clone() for name, tensor in flatten_optimizer(optimizer).items()}
    wrong = dict(before)
    del wrong["0.step"]
    wrong["1.exp_avg"] = torch.zeros(7)
    wrong["2.exp_avg_sq"] = wrong["2.exp_avg_sq"].double()
    wrong["3.step"] = torch.zeros(2)
    wrong["9.exp_avg"] = torch.zeros(1)
    with pytest.raises(PretrainError) as refusal:
        restore_optimizer(optimizer, wrong)
    for part in (
        "0.step is missing",
        "1.exp_avg is torch.float32 of shape (7,) but must be torch.float32 of shape (2, 5)",
        "2.exp_avg_sq is torch.float64",
        "3.step is torch.float32 of shape (2,)",
        "9.exp_avg belongs to none of the 4 parameters",
    ):
        assert part in str(refusal.value), f"{part!r} is not in {refusal.value}"
    assert_same_bits(flatten_optimizer(optimizer), before)


class Trusting(torch.optim.SGD):
    """Keeps a Python number and a flag beside SGD's momentum."""

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                state["trust"] = state.get("trust", 1.0) * 0.7
                state["updates"] = state.get("updates", 0) + 1
                state["adapted"] = parameter.ndim > 1
                parameter.data.mul_(1 - 0.01 * state["trust"])
        return loss


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "AMSGrad": lambda model: torch.optim.AdamW(model.parameters(), lr=0.01, amsgrad=True),
    "SGD": lambda model: torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True),
    "plain SGD": lambda model: torch.optim.SGD(model.parameters(), lr=0.01),
    "RMSprop": lambda model: torch.optim.RMSprop(model.parameters(), lr=0.01, momentum=0.5, centered=True),
    "fused Adam": lambda model: torch.optim.Adam(model.parameters(), lr=0.01, fused=True),
    "numbers": lambda model: Trusting(model.parameters(), lr=0.01, momentum=0.9),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_any_optimizer_of_tensors_and_numbers_goes_on_bit_for_bit(kind: str, tmp_path: Path) -> None:
    through, resumed = small_model(), small_model()
    optimizer, fresh = OPTIMIZERS[kind](through), OPTIMIZERS[kind](resumed)
    train(through, optimizer, range(5))
    save_checkpoint(
        tmp_path, 5, {"student": through.state_dict(), "optimizer": flatten_optimizer(optimizer)}, {}, keep=1
    )
    found = quiet_load(tmp_path).tensors
    resumed.load_state_dict(found["student"])
    targets = optimizer_targets(fresh, found["optimizer"])
    shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in found["optimizer"].items()}
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in targets.items()} == shapes
    restore_optimizer(fresh, found["optimizer"])
    for parameter, other in zip(through.parameters(), resumed.parameters(), strict=True):
        kinds = {name: type(value) for name, value in optimizer.state[parameter].items() if value is not None}
        assert {name: type(value) for name, value in fresh.state[other].items()} == kinds
    train(through, optimizer, range(5, 10))
    train(resumed, fresh, range(5, 10))
    assert_same_bits(dict(resumed.state_dict()), dict(through.state_dict()))


@pytest.mark.parametrize("value", ["text", [1.0], torch.zeros(7)], ids=["text", "list", "shape"])
def test_a_state_that_cannot_be_saved_is_refused(value: Any) -> None:
    model = small_model()
    optimizer = adamw(model)
    train(model, optimizer, range(1))
    optimizer.state[first_weight(model)]["odd"] = value
    with pytest.raises(ValueError, match=r"0\.odd is"):
        flatten_optimizer(optimizer)
