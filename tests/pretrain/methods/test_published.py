"""The loss as the published trainers compute it, on one batch, against the library's."""

from __future__ import annotations

import pytest
import torch

from vmf_kernels import DINOHead, DINOLoss, DINOvMFHead, DINOvMFLoss
from vmf_pretrain.methods.published import PublishedLoss

pytestmark = pytest.mark.quick

IMAGES, CROPS, PROTOTYPES = 3, 4, 11


@pytest.mark.parametrize(("head_class", "loss_class"), [(DINOHead, DINOLoss), (DINOvMFHead, DINOvMFLoss)])
def test_two_steps_have_the_losses_gradients_and_centres_of_ours(
    head_class: type[DINOHead], loss_class: type[DINOLoss]
) -> None:
    torch.manual_seed(0)
    head = head_class(6, PROTOTYPES, hidden_dim=8, bottleneck_dim=4).double()
    ours = loss_class(PROTOTYPES, CROPS, 0.04, 0.07, 2, 4).double()
    losses = (ours, PublishedLoss(ours))
    for epoch in (0, 1):
        crops = torch.randn(CROPS * IMAGES, 6, dtype=torch.float64)
        found = []
        for criterion in losses:
            head.zero_grad()
            with torch.no_grad():
                teacher = head(crops[: 2 * IMAGES])
            value = criterion(head(crops), teacher, epoch)
            value.backward()
            gradients = [p.grad.clone() for p in head.parameters() if p.grad is not None]
            found.append([value.detach(), criterion.center.clone(), *gradients])
        torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)  # centres are fp32
        assert found[0][1].abs().max() > 0, "the centre has not moved"
