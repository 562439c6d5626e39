"""Compiled losses over a run: an eager run's numbers; the teacher temperature changes with the epoch, the code does not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from tests.losses import ibot_steps
from tests.measure import worst_error
from tests.steps import CROPS, IMAGES, IN_DIM, networks, our_step
from vmf_kernels import DINOLoss, DINOvMFLoss
from vmf_kernels.losses.ibot import IBOTLoss, IBOTPatchLoss, IBOTvMFLoss, IBOTvMFPatchLoss
from vmf_kernels.losses.temperatures import EpochTemperatures

EPOCHS = 12  # beyond torch's limit of 8 compilations
WARM_UP = (0.04, 0.07, EPOCHS - 2, EPOCHS)
DIM = (
    64  # below, the normaliser is traced with a recurrence as long as half the dim: tests/test_bessel.py compiles that
)
AT_MOST = 2  # epoch 0, a constant to torch, and then any

Record = dict[str, Tensor]
Step = Callable[[Any, int], Tensor]  # of a batch and an epoch


def compiled_over_epochs(step: Step) -> tuple[Step, CompileCounterWithBackend]:
    """The step compiled into one graph, and what counts how often it was."""
    counter = CompileCounterWithBackend("aot_eager")
    torch.compiler.reset()
    return torch.compile(step, fullgraph=True, backend=counter), counter


def record_of(step: Step, batches: list[Any], student: nn.Module) -> Record:
    """Every epoch's loss and gradients."""
    record: Record = {}
    for epoch, batch in enumerate(batches):
        value, parameters = step(batch, epoch), dict(student.named_parameters())
        gradients = torch.autograd.grad(value, list(parameters.values()))
        measured = {"loss": value.detach()} | dict(zip(parameters, gradients, strict=True))
        record |= {f"epoch {epoch} {name}": tensor for name, tensor in measured.items()}
    return record


def assert_compiled_once(
    make: Callable[[], nn.Module], step: Callable[[Any, Any, int], Tensor], batches: list[Any], student: nn.Module
) -> None:
    """Losses and gradients of every epoch, and the centres at the end, are those of an eager run."""
    loss, eager = make(), make()
    loss.load_state_dict(loss.state_dict())  # a resumed run compiles too
    compiled, counter = compiled_over_epochs(lambda batch, epoch: step(loss, batch, epoch))
    got = record_of(compiled, batches, student) | copied(loss)
    expected = record_of(lambda batch, epoch: step(eager, batch, epoch), batches, student) | copied(eager)
    error, name = worst_error(got, expected)
    assert error <= 1e-5, f"{name}: relative error {error:.2e}, budget 1e-05"
    assert counter.frame_count <= AT_MOST, f"{counter.frame_count} compilations in {EPOCHS} epochs"
    losses = {expected[f"epoch {epoch} loss"].item() for epoch in range(EPOCHS)}
    assert len(losses) == EPOCHS, "the epochs' losses are alike"


def copied(loss: nn.Module) -> Record:
    return {name: center.clone() for name, center in loss.state_dict().items()}


@pytest.mark.parametrize(("loss_class", "output"), [(DINOLoss, "unstored"), (DINOvMFLoss, "stored")])
def test_dino_is_compiled_once_for_all_epochs(loss_class: type[DINOLoss], output: str) -> None:
    heads = networks(50, torch.float32, dim=DIM)
    batch = torch.randn(CROPS * IMAGES, IN_DIM), torch.randn(2 * IMAGES, IN_DIM)
    assert_compiled_once(
        lambda: loss_class(50, CROPS, *WARM_UP),
        lambda loss, batch, epoch: our_step(loss, output)(heads[0], heads[1], batch[0], batch[1], epoch),
        [batch] * EPOCHS,
        heads[0],
    )


@pytest.mark.parametrize("loss_class", [IBOTvMFLoss])  # which does all that iBOT's does
def test_ibot_is_compiled_once_for_all_epochs(loss_class: type[IBOTLoss]) -> None:
    """Whatever the masks hold: their count is a size that the compiled loss takes at run time."""
    heads = ibot_steps.heads(dim=DIM)
    first, last, warm_up, epochs = WARM_UP
    batches = [ibot_steps.make_batch(epoch) for epoch in range(EPOCHS)]
    assert_compiled_once(
        lambda: loss_class(*ibot_steps.PROTOTYPES, 2, 2, first, last, 0.05, 0.08, warm_up, epochs),
        lambda loss, batch, epoch: ibot_steps.our_step(loss)(*heads, batch, epoch)["loss"],
        batches,
        heads[0],
    )
    counts = {sum(int(mask.sum()) for mask in batch.masks) for batch in batches}
    assert len(counts) > 1, "every batch has as many masked patches"


def test_a_number_for_each_epoch_would_be_compiled_each_time() -> None:
    """Negative control of the count."""
    numbers = EpochTemperatures([0.04 + 0.01 * epoch for epoch in range(5)]).values
    compiled, counter = compiled_over_epochs(lambda batch, epoch: batch * numbers[epoch])
    for epoch in range(5):
        compiled(torch.ones(2), epoch)
    assert counter.frame_count == 5


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
