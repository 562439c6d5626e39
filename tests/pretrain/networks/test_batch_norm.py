"""Batch normalisation over ranks is torch's own where there is one rank; two ranks are in engine/test_ranks.py."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import distributed, nn

from vmf_pretrain.networks.batch_norm import GlobalBatchNorm, synchronise

pytestmark = pytest.mark.quick


@pytest.fixture(params=["no group", "a group of one"])
def _ranks(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.param == "no group":
        yield
        return
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("_ranks")
@pytest.mark.parametrize("momentum", [0.1, None])
def test_one_rank_has_the_results_gradients_and_statistics_of_torch(momentum: float | None) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, momentum=momentum)).double()
    ours = copy.deepcopy(plain)
    synchronise(ours)
    assert isinstance(ours[1], GlobalBatchNorm)
    for _ in range(2):
        rows, weights = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
        for network in (plain, ours):
            network.zero_grad()
            (network(rows) * weights).sum().backward()
        torch.testing.assert_close(ours(rows), plain(rows), rtol=1e-12, atol=1e-12)
        for one, other in zip(ours.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(ours.state_dict(), plain.state_dict(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.eval()(rows), plain.eval()(rows), rtol=1e-12, atol=1e-12)
