"""Average precision of copies among the first 20 against scikit-learn's curve; altered images; names that belong together."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_sample_image
from sklearn.metrics import auc, precision_recall_curve
from torch.nn import functional

from vmf_pretrain.evaluation.copies import score
from vmf_pretrain.evaluation.copies.alter import crop, jpeg
from vmf_pretrain.evaluation.copies.score import copy_precisions, originals_of

pytestmark = pytest.mark.quick


def test_only_what_is_found_among_the_first_20_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Area under scikit-learn's curve as far as the last of the first 20, in units of all positives."""
    monkeypatch.setattr(score, "SIMILARITIES_AT_ONCE", 150)
    generator = np.random.default_rng(0)
    queries, database = (torch.from_numpy(generator.normal(size=(n, 6))) for n in (15, 60))
    positives = [sorted(int(n) for n in generator.choice(60, 1 + row % 5, replace=False)) for row in range(15)]
    positives[3] = []
    found = copy_precisions(queries, database, positives)
    similarity = (
        functional.normalize(queries.float(), dim=1) @ functional.normalize(database.float(), dim=1).T
    ).numpy()
    for row, wanted in enumerate(positives):
        hits = np.isin(np.argsort(-similarity[row], kind="stable")[:20], wanted)
        if not wanted:
            assert np.isnan(found[row])
        elif not hits.any():
            assert found[row] == 0
        else:
            precision, recall, _ = precision_recall_curve(hits, -np.arange(20))
            expected = auc(recall, precision) * hits.sum() / len(wanted)
            assert found[row] == pytest.approx(expected, abs=1e-12)
    assert 0 < np.nanmean(found) < 1


def test_copies_share_four_characters_with_their_original() -> None:
    found = originals_of(["strong/200001.jpg", "200103.jpg", "9.jpg"], ["original/200000.jpg", "original/200100.jpg"])
    assert found == [[0], [1], []]
    assert originals_of(["2101x.png"], ["2100.png", "2101.png"]) == [[1]]


def test_altered_images_are_what_their_block_says() -> None:
    photograph = torch.from_numpy(load_sample_image("flower.jpg")[::4, ::4].copy()).permute(2, 0, 1)
    errors = [float((jpeg(photograph, q).float() - photograph.float()).abs().mean()) for q in (3, 20, 75)]
    assert errors[0] > errors[1] > errors[2] > 0
    for removed in (10, 80):
        small = crop(photograph, removed)
        surface = small.shape[1] * small.shape[2] / (photograph.shape[1] * photograph.shape[2])
        assert surface == pytest.approx(1 - removed / 100, abs=0.01)
    height, width = crop(photograph, 80).shape[1:]
    top, left = (photograph.shape[1] - height) // 2, (photograph.shape[2] - width) // 2
    assert torch.equal(crop(photograph, 80)[:, 0, 0], photograph[:, top, left])
