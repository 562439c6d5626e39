"""Losses' state dicts that do not fit the module, and losses that are copied with their process groups."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn
from torch.distributed import HashStore, ProcessGroup

from tests.losses.ibot_steps import PROTOTYPES
from tests.losses.ibot_steps import schedule as ibot_schedule
from tests.steps import SCHEDULE, outputs
from vmf_kernels import DINOLoss, DINOvMFLoss
from vmf_kernels.compat import lightly
from vmf_kernels.losses.ibot import IBOTLoss, IBOTPatchLoss

pytestmark = pytest.mark.quick

K = 50
LOSSES: dict[str, tuple[Callable[..., nn.Module], list[str]]] = {
    "dino": (lambda **options: DINOLoss(K, *SCHEDULE, **options), ["center"]),
    "dino-vmf": (lambda **options: DINOvMFLoss(K, *SCHEDULE, **options), ["center"]),
    "patch": (lambda **options: IBOTPatchLoss(PROTOTYPES[1], **options), ["center"]),
    "ibot": (lambda **options: IBOTLoss(*ibot_schedule(), **options), ["center", "center2"]),
    "lightly-dino": (lambda **options: lightly.DINOLoss(K, **options), ["center"]),
    "lightly-ibot": (lambda **options: lightly.IBOTPatchLoss(K, **options), ["center.center"]),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_run_is_switched_to_sinkhorn_knopp_with_a_warning(name: str) -> None:
    make, keys = LOSSES[name]
    state = make().state_dict()
    assert sorted(state) == keys
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make(centering="sinkhorn_knopp").load_state_dict(state)
    said = sorted(str(warning.message) for warning in caught)
    assert len(said) == len(keys)
    for message, key in zip(said, keys, strict=True):
        assert f"keeps no centre: '{key}' of the checkpoint is not used" in message
    assert sorted(state) == keys, "the caller's state dict was changed"


@pytest.mark.parametrize("name", LOSSES)
def test_a_fitting_state_loads_without_a_warning(name: str) -> None:
    """Negative control of the one above."""
    make, _ = LOSSES[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for options in ({}, {"centering": "sinkhorn_knopp"}):
            make(**options).load_state_dict(make(**options).state_dict())


@pytest.mark.parametrize("holder", ["", "loss."])
@pytest.mark.parametrize("name", LOSSES)
def test_a_missing_center_is_named_as_it_is_stored(name: str, holder: str) -> None:
    make, keys = LOSSES[name]
    module = nn.ModuleDict({"loss": make()}) if holder else make()
    with pytest.raises(RuntimeError, match="Missing key") as raised:
        module.load_state_dict({})
    assert "stream" not in str(raised.value)
    missing, unexpected = module.load_state_dict({}, strict=False)
    assert sorted(missing) == [holder + key for key in keys]
    assert not unexpected


def test_other_keys_left_over_are_still_refused() -> None:
    loss = DINOLoss(K, *SCHEDULE, centering="sinkhorn_knopp")
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"centre"'):
        loss.load_state_dict({"centre": torch.zeros(1, K)})


@pytest.fixture
def group() -> Iterator[ProcessGroup]:
    """A process group of one."""
    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    assert torch.distributed.group.WORLD is not None
    yield torch.distributed.group.WORLD
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("rule", ["logit", "probability", "sinkhorn_knopp"])
def test_a_loss_with_process_groups_is_deep_copied(rule: str, group: ProcessGroup) -> None:
    loss = DINOLoss(K, *SCHEDULE, centering=rule, prototype_group=group, row_group=group)
    batch = outputs()
    loss(*batch, 0)
    other = copy.deepcopy(loss)
    assert other.centering.prototype_group is group
    assert loss(*batch, 1) == other(*batch, 1)
