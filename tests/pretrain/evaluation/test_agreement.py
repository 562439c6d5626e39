"""Log and summary agree about the mutual information, or the summary says that they do not."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.pretrain.tiny import a_run, photos_config, save_ramps
from vmf_pretrain.config.views import PhotoViewConfig
from vmf_pretrain.engine.run import Run
from vmf_pretrain.evaluation.agreement import SPREADS, agreement
from vmf_pretrain.evaluation.judge import Judge

MILD = PhotoViewConfig(
    global_area=(0.9, 1.0), jitter=0.0, grayscale=0.0, blur=(0.0, 0.0, 0.0), solarize=0.0
)  # as an image is judged, nearly
ONCE = [2.0, 2.1, 1.9, 2.0]
TWICE = [2.2, 2.3]
LOGGED = [2.0, 2.2]
SPREAD = math.hypot(0.1 * math.sqrt(2), math.sqrt(0.02 / 3))  # deviations of LOGGED and ONCE


@pytest.mark.quick
def test_log_between_batches_of_once_and_twice_the_size_agrees() -> None:
    found = agreement(LOGGED, ONCE, TWICE)
    assert found is not None
    assert (found.logged, *found.judged) == pytest.approx((2.1, 2.0, 2.25))
    assert found.tolerance == pytest.approx(SPREADS * SPREAD)
    assert found.distance == 0.0
    assert found.holds


@pytest.mark.quick
@pytest.mark.parametrize("side", [-1, 1], ids=["below", "above"])
@pytest.mark.parametrize(("spreads", "holds"), [(SPREADS - 0.1, True), (SPREADS + 0.1, False)])
def test_log_outside_agrees_within_the_spread_of_batches(side: int, spreads: float, holds: bool) -> None:
    end = 2.0 if side < 0 else 2.25
    shift = end + side * spreads * SPREAD - 2.1
    found = agreement([value + shift for value in LOGGED], ONCE, TWICE)
    assert found is not None
    assert found.distance == pytest.approx(spreads * SPREAD)
    assert found.holds is holds


@pytest.mark.quick
@pytest.mark.parametrize(
    ("logged", "once", "twice"),
    [([2.0], ONCE, TWICE), (LOGGED, [2.0], TWICE), (LOGGED, ONCE, []), ([2.0, math.nan], ONCE, TWICE)],
    ids=["one line", "one batch", "no larger batch", "not finite"],
)
def test_too_little_is_not_compared(logged: list[float], once: list[float], twice: list[float]) -> None:
    assert agreement(logged, once, twice) is None


@pytest.mark.quick
def test_batch_that_sees_each_image_twice_lies_between_its_size_and_twice_that() -> None:
    """Of assignments drawn for images, a second time with some of them changed."""
    source = torch.Generator().manual_seed(0)
    images, prototypes, batch = 4096, 32, 32
    first = torch.randint(prototypes, (images,), generator=source)
    other = torch.randint(prototypes, (images,), generator=source)
    second = torch.where(torch.rand(images, generator=source) < 0.5, first, other)
    once, twice = (information(first, size, prototypes) for size in (batch, 2 * batch))
    seen_twice = information(torch.stack([first, second], dim=1).flatten(), 2 * batch, prototypes)
    assert once + 0.05 < seen_twice < twice - 0.05, f"{once:.3f}, {seen_twice:.3f}, {twice:.3f}"


def information(assigned: Tensor, rows: int, prototypes: int) -> float:
    """Mean over batches of the mutual information of one-hot assignments: the entropy of their usage, nats."""
    usage = torch.stack([part.bincount(minlength=prototypes) / rows for part in assigned.split(rows)])
    return float(-torch.xlogy(usage, usage).sum(dim=1).mean())


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Run, str]]:
    """A run on photographs whose network stands still, so that batch normalisation settles, and what it printed."""
    folder = tmp_path_factory.mktemp("judged")
    for name in ("cats", "dogs"):
        save_ramps(folder / "photos" / name, 40)
    config = photos_config(
        folder / "photos",
        data={"batch_size": 16, "held_out": 0.2},
        optim={"learning_rate": 1e-30, "final_learning_rate": 0.0, "warmup_epochs": 0},
        views={"photos": MILD, "local_count": 0},
        train={"epochs": 20, "log_every": 4},
        evaluate={"every": 20, "neighbours": 3},
    )
    with pytest.MonkeyPatch.context() as patch:  # drawing takes longer than these runs
        patch.setattr("vmf_pretrain.engine.run.draw_plots", lambda *arguments: None)
        run, printed = a_run(config, folder / "run")
        assert run.train() == 0
        yield run, printed.getvalue()


def test_run_that_is_judged_on_what_it_was_trained_on_says_that_they_agree(judged: tuple[Run, str]) -> None:
    run, printed = judged
    figures = json.loads(run.folder.summary.read_text())
    assert figures["mutual_information_agrees"] is True, figures
    assert "Log and summary agree on the mutual information" in printed, printed
    assert f"{figures['mutual_information_logged']:.2f} nats in the last training batches" in printed


def test_run_that_is_judged_on_another_scale_says_that_they_disagree(
    judged: tuple[Run, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same run, finished and judged anew."""
    shutil.copytree(judged[0].folder.path, tmp_path / "run")
    unscaled = lambda judge, images, places: images.evaluation_pixels(places)  # noqa: E731
    monkeypatch.setattr(Judge, "inputs", unscaled)  # the fault that this is for
    run, said = a_run(judged[0].config, tmp_path / "run", resume=True)
    assert run.train() == 0
    figures, printed = json.loads(run.folder.summary.read_text()), said.getvalue()
    assert figures["mutual_information_agrees"] is False, figures
    assert "LOG AND SUMMARY DISAGREE on the mutual information" in printed, printed
