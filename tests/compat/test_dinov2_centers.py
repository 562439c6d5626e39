"""Pending updates of the centres of ``compat.dinov2`` and ``compat.dinov3``: several batches, bad ones, copies, dtypes.

Legend: K prototypes.
"""

from __future__ import annotations

import copy
import math
import pickle
from types import ModuleType

import pytest
import torch

from tests.compat.test_dinov2_parts import MODULES, OUTPUTS, assert_close, given, logits, made
from vmf_kernels.compat import dinov2

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("output", OUTPUTS)
def test_two_updates_in_a_row_count_as_one_batch(output: str) -> None:
    loss, whole = made(dinov2.DINOLoss), made(dinov2.DINOLoss)
    first, second = logits(6, seed=1), logits(2, seed=2)
    for raw in (first, second):
        loss.update_center(given(raw, output))
    whole.update_center(torch.cat([first.materialize(), second.materialize()]))
    assert_close(loss.state_dict()["center"], whole.state_dict()["center"])


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("output", OUTPUTS)
def test_a_batch_that_is_not_finite_leaves_the_center(output: str, value: float) -> None:
    loss, raw = made(dinov2.iBOTPatchLoss), logits(1, 4)
    with torch.no_grad():
        raw.features[0, 0, 0] = value
    loss.update_center(given(raw, output))
    loss.apply_center_update()
    assert loss.center.eq(0).all()


@pytest.mark.parametrize("bad_at", [0, 1, 2])
@pytest.mark.parametrize("output", OUTPUTS)
def test_a_bad_batch_among_those_that_wait_counts_as_none(output: str, bad_at: int) -> None:
    loss, without, bad = made(dinov2.DINOLoss), made(dinov2.DINOLoss), logits(3)
    with torch.no_grad():
        bad.features[1, 1] = math.nan
    good = [logits(6, seed=1), logits(2, seed=2)]
    for raw in (*good[:bad_at], bad, *good[bad_at:]):
        loss.update_center(given(raw, output))
    for raw in good:
        without.update_center(given(raw, output))
    centers = [each.state_dict()["center"] for each in (loss, without)]
    assert centers[1].ne(0).any()
    assert torch.equal(*centers)


@pytest.mark.parametrize("module", MODULES)
def test_the_center_stays_fp32_in_a_short_module(module: ModuleType) -> None:
    losses = [made(module.iBOTPatchLoss).float() for _ in range(3)]
    losses[1].half()
    losses[2].to(torch.bfloat16)
    for loss in losses:
        for seed in range(3):
            loss.update_center(logits(6, seed=seed, dtype=torch.float32))
            loss.apply_center_update()
        assert loss.center.dtype == torch.float32
        assert torch.equal(loss.center, losses[0].center)


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("copied", ["deepcopy", "pickle"])
def test_a_copy_has_the_update_that_waits(copied: str, module: ModuleType) -> None:
    loss = made(module.iBOTPatchLoss)
    loss.update_center(logits(1, 6))
    other = copy.deepcopy(loss) if copied == "deepcopy" else pickle.loads(pickle.dumps(loss))
    for each in (loss, other):
        each.apply_center_update()
    assert loss.center.abs().max() > 0
    assert torch.equal(other.center, loss.center)
