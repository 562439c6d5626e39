"""Compiled losses over a run: the teacher temperature changes with the epoch, the compiled code does not."""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.losses import ibot_steps
from tests.steps import CROPS, IMAGES, IN_DIM, networks, our_step
from vmf_kernels import DINOLoss, DINOvMFLoss
from vmf_kernels.losses.ibot import IBOTLoss, IBOTPatchLoss, IBOTvMFLoss, IBOTvMFPatchLoss
from vmf_kernels.losses.temperatures import EpochTemperatures

EPOCHS = 12  # beyond torch's limit of 8 compilations
WARM_UP = (0.04, 0.07, EPOCHS - 2, EPOCHS)
AT_MOST = 2  # epoch 0, a constant to torch, and then any


def compiled_over_epochs(step: Callable[[int], Tensor], epochs: int = EPOCHS) -> tuple[list[Tensor], int]:
    """The step's values, compiled into one graph, and how often it was."""
    compilations = 0

    def count(graph: Any, inputs: Any) -> Any:
        nonlocal compilations
        compilations += 1
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend=count)
    return [compiled(epoch).detach() for epoch in range(epochs)], compilations


def assert_compiled_once(make: Callable[[], nn.Module], step: Callable[[Any, int], Tensor]) -> None:
    """Every epoch's loss and the centres at the end are those of an eager run."""
    loss, eager = make(), make()
    values, compilations = compiled_over_epochs(lambda epoch: step(loss, epoch))
    expected = [step(eager, epoch).detach() for epoch in range(EPOCHS)]
    torch.testing.assert_close(torch.stack(values), torch.stack(expected), rtol=1e-6, atol=0)
    for name, center in eager.state_dict().items():
        torch.testing.assert_close(loss.state_dict()[name], center, rtol=1e-5, atol=1e-6)
    assert compilations <= AT_MOST, f"{compilations} compilations in {EPOCHS} epochs"
    assert len(set(expected)) == EPOCHS, "the epochs' losses are alike"


@pytest.mark.parametrize(("loss_class", "output"), [(DINOLoss, "unstored"), (DINOvMFLoss, "stored")])
def test_dino_is_compiled_once_for_all_epochs(loss_class: type[DINOLoss], output: str) -> None:
    heads = networks(50, torch.float32)
    batch = torch.randn(CROPS * IMAGES, IN_DIM), torch.randn(2 * IMAGES, IN_DIM)
    assert_compiled_once(
        lambda: loss_class(50, CROPS, *WARM_UP), lambda loss, epoch: our_step(loss, output)(*heads, *batch, epoch)
    )


@pytest.mark.parametrize("loss_class", [IBOTvMFLoss])  # which does all that iBOT's does
def test_ibot_is_compiled_once_for_all_epochs(loss_class: type[IBOTLoss]) -> None:
    heads, batch = ibot_steps.heads(), ibot_steps.make_batch(0)
    temperatures = (*WARM_UP[:2], 0.05, 0.08, *WARM_UP[2:])
    assert_compiled_once(
        lambda: loss_class(*ibot_steps.PROTOTYPES, 2, 2, *temperatures),
        lambda loss, epoch: ibot_steps.our_step(loss)(*heads, batch, epoch)["loss"],
    )


def test_a_number_for_each_epoch_would_be_compiled_each_time() -> None:
    """Negative control of the count."""
    numbers = EpochTemperatures([0.04 + 0.01 * epoch for epoch in range(5)]).values
    _, compilations = compiled_over_epochs(lambda epoch: torch.ones(2) * numbers[epoch], 5)
    assert compilations == 5


@pytest.mark.parametrize("patch_loss", [IBOTPatchLoss, IBOTvMFPatchLoss])
def test_the_patch_loss_takes_its_temperature_as_a_tensor(patch_loss: type[IBOTPatchLoss]) -> None:
    (student, teacher), batch = ibot_steps.heads(), ibot_steps.make_batch(0)
    given = student(batch.crops)[1], teacher(batch.views)[1], torch.cat(batch.masks)
    values = [
        patch_loss(ibot_steps.PROTOTYPES[1])(*given, tau) for tau in (0.05, torch.tensor([0.05], dtype=torch.float64))
    ]
    assert values[0] == values[1]
    assert patch_loss(ibot_steps.PROTOTYPES[1])(*given, 0.06) != values[0]


@pytest.mark.parametrize("loss_class", [DINOLoss, DINOvMFLoss])
def test_an_epoch_out_of_range_is_refused_by_a_compiled_loss(loss_class: type[DINOLoss]) -> None:
    student, teacher = networks(50, torch.float32)
    x = torch.randn(2 * IMAGES, IN_DIM)
    torch.compiler.reset()
    compiled = torch.compile(loss_class(50, 2, *WARM_UP), backend="eager")
    with pytest.raises(ValueError, match=f"epoch is {EPOCHS}; expected 0 to {EPOCHS - 1}"):
        compiled(student(x), teacher(x), EPOCHS)


VALUES = [0.04, 0.0501, 0.07]
MOVES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "half": lambda module: module.half(),
    "double": lambda module: module.double(),
    "deepcopy": copy.deepcopy,
    "meta": lambda module: module.to("meta").to_empty(device="cpu"),
}


@pytest.mark.parametrize("move", MOVES)
def test_temperatures_stay_exact_and_out_of_the_state_dict(move: str) -> None:
    module = MOVES[move](EpochTemperatures(VALUES))
    assert isinstance(module, EpochTemperatures)
    assert module.stored.tolist() == VALUES
    assert module.stored.dtype == torch.float64
    assert not module.state_dict()
    assert [module(epoch) for epoch in range(3)] == VALUES
    assert module(torch.tensor(1)) == VALUES[1]
