"""What is evaluated during training, on two ranks: the figures of one, of which each has computed its share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.on_ranks import Runs, run_cases
from tests.pretrain.tiny import Pixels, digits_config
from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.data.bundled import DigitImages, digits
from vmf_pretrain.evaluation.given import Splits
from vmf_pretrain.evaluation.judge import Judge
from vmf_pretrain.evaluation.shown import spread

ODD = 501  # images of a split
FAR = spread(1297, ODD)[-3]  # place of an image that is evaluated by the second rank
FEW_IMAGES = 1  # of another set, fewer than ranks


class Broken(DigitImages):
    """Digits of which one of the second half of those that are evaluated cannot be read."""

    def evaluation_pixels(self, indices: Sequence[int]) -> Tensor:
        if FAR in indices:
            raise PretrainError("one cannot be read")
        return super().evaluation_pixels(indices)


def judged(rank: int | None, *, train: DigitImages | None = None, most: int = ODD) -> Judge:
    """A judge of 501 training and 497 held-out digits, and of another set of a single image to compare with."""
    some, kept = digits()
    wanted = {"max_images": most, "online": ("knn", "few_shot")}
    one = kept.subset(torch.arange(FEW_IMAGES))
    sets = {"single": Splits(some.subset(torch.arange(60)), one, "0123456789", "here")}
    config = digits_config(evaluate=wanted, data={"batch_size": 64})
    return Judge(train or some, kept.subset(torch.arange(497)), config, sets, judging=not rank)


def figures(rank: int | None) -> dict[str, Any]:
    backbone = Pixels()
    found = judged(rank).online(backbone)
    return {"found": found, "batches": backbone.batches}


def before_training(rank: int | None) -> dict[str, Any]:
    return dict(judged(rank, most=51).baselines(Pixels()))


def failures(rank: int | None) -> list[str]:
    """What ranks say where the images of one cannot be read, and where the features of one are not finite."""
    some, _ = digits()
    odd = DigitImages(some.canvases.clone(), some.middles, some.labels)
    odd.canvases[FAR] = torch.nan
    said = []
    for train in (Broken(some.canvases, some.middles, some.labels), odd):
        with pytest.raises(PretrainError) as raised:
            judged(rank, train=train).baselines(Pixels())
        said.append(str(raised.value))
    return said


def itself(rank: int | None) -> int | None:
    return rank


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return run_cases(tmp_path_factory.mktemp("ranks"), (figures, before_training, failures), itself)


def test_each_rank_computes_its_share_and_all_have_the_figures_of_one(runs: Runs) -> None:
    alone = runs.alone["figures"]
    assert list(alone["found"])[-1] == "few_shot/single"
    assert alone["batches"] == [256, 245, 256, 241, 60, 1]
    for rank in runs.ranks:
        assert rank["figures"]["found"] == alone["found"]
        assert rank["figures"]["batches"] == [251, 249, 30, 1], "about half of the images, and as many on every rank"
        assert rank["before_training"] == runs.alone["before_training"]


def test_what_fails_on_one_rank_ends_the_evaluation_on_all(runs: Runs) -> None:
    unread, infinite = runs.ranks[0]["failures"]
    assert unread == "one cannot be read"
    assert "NaN or infinite for 1 of 251" in infinite
    assert runs.ranks[1]["failures"] == [unread, infinite]
