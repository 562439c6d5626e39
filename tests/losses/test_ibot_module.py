"""iBOT's losses as modules: state dicts, copies, compilation, and what a step allocates."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from tests.losses.ibot_steps import PATCHES, PROTOTYPES, Batch, Record, heads, make_batch, our_step, schedule
from tests.measure import allocations_of, worst_error
from vmf_kernels.losses.ibot import IBOTLoss, IBOTPatchLoss, IBOTvMFLoss


def moved_loss(loss_class: type[IBOTLoss] = IBOTLoss) -> IBOTLoss:
    """A loss whose centres have moved."""
    loss = loss_class(*schedule())
    our_step(loss)(*heads(), make_batch(0), 0)
    return loss


def assert_same_centers(one: IBOTLoss, other: IBOTLoss) -> None:
    assert torch.equal(one.center, other.center)
    assert torch.equal(one.center2, other.center2)
    assert other.center.ne(0).any()
    assert other.center2.ne(0).any()


@pytest.mark.quick
@pytest.mark.parametrize("loss_class", [IBOTLoss, IBOTvMFLoss])
def test_state_dict_holds_both_centers_alone_and_loads_back(loss_class: type[IBOTLoss]) -> None:
    loss, other = moved_loss(loss_class), loss_class(*schedule())
    other.load_state_dict(loss.state_dict())
    shapes = {name: tuple(value.shape) for name, value in loss.state_dict().items()}
    assert shapes == {"center": (1, PROTOTYPES[0]), "center2": (1, 1, PROTOTYPES[1])}
    assert all(value.dtype == torch.float32 for value in loss.state_dict().values())
    assert_same_centers(other, loss)


@pytest.mark.quick
def test_state_dict_of_a_module_that_holds_the_loss_loads_back() -> None:
    holder, other = nn.ModuleDict({"loss": moved_loss()}), nn.ModuleDict({"loss": IBOTLoss(*schedule())})
    other.load_state_dict(holder.state_dict())
    assert sorted(holder.state_dict()) == ["loss.center", "loss.center2"]
    assert_same_centers(other["loss"], holder["loss"])  # type: ignore[arg-type]


@pytest.mark.quick
def test_state_dict_of_the_patch_loss_holds_its_center_alone() -> None:
    (student, teacher), batch = heads(), make_batch(1)
    loss, other = IBOTPatchLoss(PROTOTYPES[1]), IBOTPatchLoss(PROTOTYPES[1])
    loss(student(batch.crops)[1], teacher(batch.views)[1], torch.cat(batch.masks), 0.07)
    other.load_state_dict(loss.state_dict())
    assert list(loss.state_dict()) == ["center"]
    assert torch.equal(other.center, loss.center)
    assert loss.center.ne(0).any()


@pytest.mark.quick
@pytest.mark.parametrize("way", ["pickle", "deepcopy"])
@pytest.mark.parametrize("loss_class", [IBOTLoss, IBOTvMFLoss])
def test_a_copied_loss_goes_on_as_the_original(loss_class: type[IBOTLoss], way: str) -> None:
    loss = moved_loss(loss_class)
    other = copy.deepcopy(loss) if way == "deepcopy" else pickle.loads(pickle.dumps(loss))
    networks = heads()
    results = []
    for one in (loss, other):
        value = our_step(one)(*networks, make_batch(1), 1)["loss"]
        results.append({"loss": value.detach(), **one.state_dict()})
    assert worst_error(results[1], results[0])[0] == 0
    other.load_state_dict(loss_class(*schedule()).state_dict())
    assert other.center2.eq(0).all()
    assert loss.center2.ne(0).any()


def test_the_loss_compiles_with_breaks() -> None:
    """On logits from outside, without local crops; with them, and in one graph with heads and gradients: test_compiled.py."""
    torch.compiler.reset()
    networks = heads()
    losses = IBOTLoss(*schedule(local=0)), IBOTLoss(*schedule(local=0))
    compiled = torch.compile(losses[0], backend="eager")
    records: list[Record] = []
    for run, loss in zip((compiled, losses[1]), losses, strict=True):
        record: Record = {}
        for i in range(2):
            batch = make_batch(i, local=0)
            value = our_step(run)(*networks, batch, 4)["loss"]
            value.backward()
            assert batch.crops.grad is not None
            record |= {f"{i} loss": value.detach(), f"{i} crops": batch.crops.grad}
        records.append(record | {name: value.clone() for name, value in loss.state_dict().items()})
    error, name = worst_error(*records)
    assert error <= 1e-5, f"{name}: relative error {error:.2e}, budget 1e-05"


MANY = 16001
MANY_IMAGES = 128  # so many that [masked patches, K] is larger than any backend's workspace


@pytest.mark.parametrize(("loss_class", "tokens"), [(IBOTLoss, "all"), (IBOTvMFLoss, "all"), (IBOTvMFLoss, "masked")])
def test_nothing_of_the_size_of_the_logits_is_allocated(loss_class: type[IBOTLoss], tokens: str) -> None:
    networks, batch, masked = many_patches(MANY_IMAGES)
    loss = loss_class(*schedule((MANY, MANY), 0), center_tokens=tokens)
    peak = allocations_of(lambda: our_step(loss)(*networks, batch, 0)["loss"].backward()).peak
    assert peak < masked * MANY * 4, f"{peak} bytes live at once for {masked} masked patches"


def test_logits_of_all_patches_are_seen_where_they_are_stored() -> None:
    """Negative control of the one above."""
    networks, batch, _ = many_patches(MANY_IMAGES // 2)
    loss = IBOTLoss(*schedule((MANY, MANY), 0))
    peak = allocations_of(lambda: our_step(loss, "stored")(*networks, batch, 0)["loss"].backward()).peak
    assert peak >= batch.crops.shape[0] * PATCHES * MANY * 4


def many_patches(images: int) -> tuple[tuple[nn.Module, nn.Module], Batch, int]:
    """Networks, a batch, and how many patches are masked in it."""
    batch = make_batch(0, images=images, local=0)
    batch = batch._replace(masks=[torch.rand(mask.shape) < 0.6 for mask in batch.masks])
    return heads(prototypes=(MANY, MANY)), batch, sum(int(mask.sum()) for mask in batch.masks)


@pytest.mark.quick
def test_class_tokens_in_more_than_one_dim_have_the_mean_over_all() -> None:
    student, teacher, local = torch.randn(4, 2, 50), torch.randn(4, 2, 50), torch.randn(2, 2, 50)
    patches, masks = torch.randn(4, 9, 50), [torch.rand(2, 3, 3) < 0.5 for _ in range(2)]
    given = (50, 50, 2, 1, *schedule()[4:])
    joint = IBOTLoss(*given)((student, patches), (teacher, patches), local, masks, 0)["cls"]
    alone = [
        IBOTLoss(*given)((student[:, i], patches), (teacher[:, i], patches), local[:, i], masks, 0)["cls"]
        for i in range(2)
    ]
    torch.testing.assert_close(joint, sum(alone) / 2)
