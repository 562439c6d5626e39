"""The scale of an fp16 loss, against torch's GradScaler."""

from __future__ import annotations

import pytest
import torch

from vmf_pretrain.engine import loss_scale
from vmf_pretrain.engine.loss_scale import LossScale

pytestmark = pytest.mark.quick


def test_scale_moves_as_gradscaler_moves_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_scale, "PATIENCE", 3)
    ours = LossScale(active=True, device=torch.device("cpu"))
    theirs = torch.amp.GradScaler("cpu", growth_interval=3)
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=1e-3)
    for step, broken in enumerate([0, 1, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0]):
        loss = (weight * (torch.inf if broken else 1.0)).sum()
        optimizer.zero_grad()
        scaled = ours.scaled(loss.detach())
        theirs.scale(loss).backward()
        assert scaled == loss.detach() * theirs.get_scale() or broken
        assert weight.grad is not None
        gradient = weight.grad.clone()
        ours.unscale([gradient])
        theirs.unscale_(optimizer)
        assert torch.equal(gradient, weight.grad), f"step {step}"
        theirs.step(optimizer)
        theirs.update()
        ours.update(torch.tensor(float(broken)))
        assert ours.scale.item() == theirs.get_scale(), f"step {step}"


def test_scale_that_is_not_active_changes_nothing() -> None:
    scale = LossScale(active=False, device=torch.device("cpu"))
    scale.update(torch.tensor(1.0))
    assert scale.scaled(torch.tensor(2.5)) == 2.5
    gradient = torch.tensor([0.1])
    scale.unscale([gradient])
    assert gradient == 0.1
