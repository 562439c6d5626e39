"""A run that nothing stops and one that is stopped half-way, for all files of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.pretrain.engine.stopping import state_of, stopped_at, untimed
from tests.pretrain.tiny import a_run
from tests.reliability.disk import disk
from tests.reliability.runs import Ended, small_digits
from vmf_pretrain.engine.history import trained
from vmf_pretrain.report.plots import plot_knn
from vmf_pretrain.storage.run_folder import RunFolder


def _one_plot(folder: RunFolder, *_: Any) -> None:
    plot_knn([], {}, folder.plots / "knn.png")


@pytest.fixture(scope="package", autouse=True)
def one_plot() -> Iterator[None]:
    """All of them take longer than a run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vmf_pretrain.engine.run.draw_plots", _one_plot)
        yield


@pytest.fixture(scope="package")
def whole(tmp_path_factory: pytest.TempPathFactory, one_plot: None) -> Ended:
    """Ten steps."""
    with disk(tmp_path_factory.mktemp("whole")) as watched:
        run, _ = a_run(small_digits(), watched.folder / "run")
        assert trained(run) == 0
    return Ended(watched.calls, state_of(run), untimed(run))


@pytest.fixture(scope="package")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the same run with checkpoints of steps 5 and 8."""
    out = tmp_path_factory.mktemp("stopped") / "run"
    assert stopped_at(a_run(small_digits(), out)[0], 7) == 130
    return out
