"""Unreadable images under whitening."""

import torch

from vmf_pretrain.evaluation.tasks.retrieval import whitened
from vmf_pretrain.evaluation.whitening import whitening_of


def test_an_unreadable_image_is_like_nothing_after_whitening() -> None:
    rows = torch.randn(12, 4, generator=torch.Generator().manual_seed(0)) + 2
    whitening = whitening_of(rows)
    found = whitened(whitening, torch.cat([rows[:3], torch.zeros(1, 4)]))
    assert not found[3].any(), f"an unreadable image became {found[3].tolist()}"
    assert torch.equal(found[:3], whitening.apply(rows[:3])), "whitening of a readable image has changed"
